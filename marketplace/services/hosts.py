"""What of each host is free: taken by commit, given back by release. The only writer of the `*_free` columns.

Callers hold the site's lock; rows are locked in id order. The database refuses a column under zero, so an error here is a
refused transaction, never an oversold GPU.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from django.db import connection

from marketplace import arrays
from marketplace.arrays import Ints
from marketplace.models import Host


class Share(Protocol):
    """What a placement holds of its host."""

    host_id: int
    gpu_indices: list[int]
    gpu_milli: int
    vram_mib: int
    vcpu_milli: int
    ram_mib: int
    nvme_gib: int


@dataclass(frozen=True)
class Left:
    """What is left of locked hosts after a commit, and what their power is now: columns [H]. `limits`: W of each GPU as an
    array literal, None where the host's power has not changed.
    """

    ids: Ints
    gpu_count: Ints
    gpu_free: Any  # [H, 16]
    vram_free: Any
    vcpu_free: Ints
    ram_free: Ints
    nvme_free: Ints
    cpu_only: Ints
    reserved_w: Ints
    limits: list[str | None]
    power_states: list[str | None]


_TAKE = """
UPDATE marketplace_host h SET gpu_free = u.gpus::int[], vram_free = u.vram::int[], vcpu_free = u.vcpu, ram_free = u.ram,
  nvme_free = u.nvme, cpu_only_active = u.cpu_only, reserved_w = u.reserved_w,
  desired_generation = h.desired_generation + CASE
    WHEN u.limits IS NOT NULL AND (h.desired_limits_w, h.desired_power_state) IS DISTINCT FROM (u.limits::int[], u.state) THEN 1
    ELSE 0 END,
  desired_limits_w = coalesce(u.limits::int[], h.desired_limits_w), desired_power_state = coalesce(u.state, h.desired_power_state)
FROM unnest(%s::bigint[], %s::text[], %s::text[], %s::bigint[], %s::bigint[], %s::bigint[], %s::bigint[], %s::bigint[], %s::text[],
  %s::text[]) AS u(id, gpus, vram, vcpu, ram, nvme, cpu_only, reserved_w, limits, state)
WHERE h.id = u.id
"""


def take(left: Left) -> None:
    """Write rows that the caller has locked and checked by the fit rule."""
    free = (arrays.texts(left.gpu_free, left.gpu_count), arrays.texts(left.vram_free, left.gpu_count))
    arrays.execute(
        _TAKE,
        [left.ids, *free, left.vcpu_free, left.ram_free, left.nvme_free, left.cpu_only, left.reserved_w, left.limits,
         left.power_states],
    )  # fmt: skip


def give_back(shares: Iterable[Share]) -> list[int]:
    """Add back; returns the ids of the hosts touched."""
    wanted = list(shares)
    hosts = lock({share.host_id for share in wanted})
    _add(wanted, hosts)
    return sorted(hosts)


def lock(ids: Iterable[int]) -> dict[int, Host]:
    rows = Host.objects.filter(pk__in=sorted(set(ids))).order_by("pk").select_for_update(no_key=True)
    return {host.pk: host for host in rows}


def _add(shares: Iterable[Share], hosts: dict[int, Host]) -> None:
    by_host: dict[int, list[Share]] = defaultdict(list)
    for share in shares:
        by_host[share.host_id].append(share)
    for pk in sorted(by_host):
        host = hosts[pk]
        for share in by_host[pk]:
            for index in share.gpu_indices:
                host.gpu_free[index] += share.gpu_milli
                host.vram_free[index] += share.vram_mib
            host.vcpu_free += share.vcpu_milli
            host.ram_free += share.ram_mib
            host.nvme_free += share.nvme_gib
            if not share.gpu_indices:
                host.cpu_only_active -= 1
    with connection.cursor() as cursor:
        cursor.executemany(
            "UPDATE marketplace_host SET gpu_free = %s, vram_free = %s, vcpu_free = %s, ram_free = %s, nvme_free = %s,"
            " cpu_only_active = %s WHERE id = %s",
            [
                (h.gpu_free, h.vram_free, h.vcpu_free, h.ram_free, h.nvme_free, h.cpu_only_active, h.pk)
                for h in (hosts[pk] for pk in sorted(by_host))
            ],
        )

"""What of each host is free: taken by commit, given back by release. The only writer of the `*_free` columns.

Callers hold the site's lock; rows are locked in id order. The database refuses a column under zero, so an error here is a
refused transaction, never an oversold GPU.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Protocol

from django.db import connection

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


def take(shares: Iterable[Share], hosts: dict[int, Host]) -> None:
    """Subtract from rows that the caller has locked (`lock`) and checked by the fit rule, and write them."""
    _apply(shares, hosts, sign=-1)


def give_back(shares: Iterable[Share]) -> list[int]:
    """Add back; returns the ids of the hosts touched."""
    wanted = list(shares)
    hosts = lock({share.host_id for share in wanted})
    _apply(wanted, hosts, sign=1)
    return sorted(hosts)


def lock(ids: Iterable[int]) -> dict[int, Host]:
    rows = Host.objects.filter(pk__in=sorted(set(ids))).order_by("pk").select_for_update(no_key=True)
    return {host.pk: host for host in rows}


def _apply(shares: Iterable[Share], hosts: dict[int, Host], *, sign: int) -> None:
    by_host: dict[int, list[Share]] = defaultdict(list)
    for share in shares:
        by_host[share.host_id].append(share)
    for pk in sorted(by_host):
        host = hosts[pk]
        for share in by_host[pk]:
            for index in share.gpu_indices:
                host.gpu_free[index] += sign * share.gpu_milli
                host.vram_free[index] += sign * share.vram_mib
            host.vcpu_free += sign * share.vcpu_milli
            host.ram_free += sign * share.ram_mib
            host.nvme_free += sign * share.nvme_gib
            if not share.gpu_indices:
                host.cpu_only_active -= sign
    with connection.cursor() as cursor:
        cursor.executemany(
            "UPDATE marketplace_host SET gpu_free = %s, vram_free = %s, vcpu_free = %s, ram_free = %s, nvme_free = %s,"
            " cpu_only_active = %s WHERE id = %s",
            [
                (h.gpu_free, h.vram_free, h.vcpu_free, h.ram_free, h.nvme_free, h.cpu_only_active, h.pk)
                for h in (hosts[pk] for pk in sorted(by_host))
            ],
        )

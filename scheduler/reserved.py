"""Reservations as the planner and the commit see them.

From its claim on a contract's GPUs are its own: they stand in rows of their own (pool = minus the contract's id), so that its jobs
find them and no other's can, and the host's open row shows them as taken. Before that they are lent: to spot, which is asked to
leave at the claim (`cycle.evict_for_reservations`), and to whatever is sure to be gone by then (`core.fit.bounds`). A job without
a limit may stand on them only while the claim is more than `CLAIM_AHEAD` away: until then a reservation that finds work on its
GPUs moves to others (`services.contracts.healing`); where there are none, that job leaves at the claim, too.

Announced maintenance is such a claim, of nobody's contract: what is sure to end before may come. When it begins its hosts are
drained (`services.maintenance`), and nothing stands in a row of it.
"""

from collections import Counter, defaultdict
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple

import numpy as np

from marketplace import prepared
from marketplace.models import Contract, Kind, Placement
from scheduler import fleet as cells
from scheduler.core.types import I32, I64, MAX_GPUS, Policy
from scheduler.standing import LAG_S

CLAIM_AHEAD: Final = timedelta(seconds=Policy().unknown_s)
_FIRM: Final = """
SELECT b.host_id, r.contract_id, b.gpu_indices, floor(extract(epoch FROM r.claims_at))::bigint,
  r.claims_at <= %(now)s AND r.contract_id IS NOT NULL
FROM marketplace_reservationblock b
JOIN marketplace_reservation r ON r.id = b.reservation_id JOIN marketplace_host h ON h.id = b.host_id
WHERE h.cell_id = %(cell)s AND r.state = 'firm' AND r.ends_at > %(now)s AND r.claims_at <= %(by)s
"""

Begun = dict[int, dict[int, set[int]]]  # host id -> contract id -> GPU indices


class Ahead(NamedTuple):
    """GPUs of a host (bit mask) that are reserved from `at` (s) on, the earliest of all its reservations to come."""

    at: int
    gpus: int


def reservations(cell_id: int, now: datetime, longest_s: int) -> tuple[Begun, dict[int, Ahead]]:
    """What is in force, and by host id what begins while a job could stand that is placed now and has this limit at most."""
    by = now + max(CLAIM_AHEAD, timedelta(seconds=longest_s)) + timedelta(seconds=LAG_S)
    begun: Begun = defaultdict(dict)
    ahead: dict[int, Ahead] = {}
    for host_id, contract_id, indices, at, in_force in prepared.rows(_FIRM, {"cell": cell_id, "now": now, "by": by}):
        if in_force:
            begun[host_id].setdefault(contract_id, set()).update(indices)
        else:
            was = ahead.get(host_id, Ahead(at, 0))
            ahead[host_id] = Ahead(min(was.at, at), was.gpus | sum(1 << i for i in indices))
    return begun, ahead


def claimed(hosts: cells.Hosts, ahead: dict[int, Ahead]) -> dict[str, Any]:
    """The columns of `Fleet` on reservations to come, for these hosts; none where there are none."""
    known = set(hosts.id_list) if ahead else set()
    here = sorted(known & ahead.keys())
    if not here:
        return {}
    rows, gpus = hosts.position(here), np.array([ahead[pk].gpus for pk in here], np.int64)
    columns: dict[str, Any] = {
        "claimed_at": np.zeros(len(hosts), np.int64),
        "claimed_gpus": np.zeros(len(hosts), np.int32),
    }
    columns["claimed_at"][rows] = [ahead[pk].at for pk in here]
    columns["claimed_gpus"][rows] = gpus
    lent = _lent(here, ahead)
    for name, total in (("owed_cpu", "cpu_total"), ("owed_ram", "ram_total"), ("owed_nvme", "nvme_total")):
        columns[name] = np.zeros(len(hosts), np.int64)
        share = hosts[total][rows] * np.bitwise_count(gpus) // np.maximum(1, hosts["gpu_count"][rows])
        columns[name][rows] = share - [lent[name][pk] for pk in here]
    return columns


def _lent(host_ids: list[int], ahead: dict[int, Ahead]) -> dict[str, Counter[int]]:
    """CPU, RAM and NVMe of what stands on such GPUs, by host: it comes back with them."""
    names = {"owed_cpu": "vcpu_milli", "owed_ram": "ram_mib", "owed_nvme": "nvme_gib"}
    lent: dict[str, Counter[int]] = {name: Counter() for name in names}
    live = Placement.objects.filter(host_id__in=host_ids).exclude(state__in=Placement.FINAL)
    for host_id, indices, *amounts in live.values_list("host_id", "gpu_indices", *names.values()):
        if any(ahead[host_id].gpus >> i & 1 for i in indices):
            for name, amount in zip(names, amounts, strict=True):
                lent[name][host_id] += amount
    return lent


class Parts:
    """Rows of GPUs whose claim has begun: which host each is part of, for which contract, which GPUs; and what is kept there for it.

    CPU, RAM and NVMe go with the GPUs: a reservation of g of n GPUs is owed g/n of the host, less what its own jobs hold
    already. The host's open row offers what is free beyond that.
    """

    def __init__(self, hosts: cells.Hosts, begun: Begun) -> None:
        here = set(hosts.id_list) if begun else set()
        found = [(pk, c, gpus) for pk in sorted(begun) if pk in here for c, gpus in sorted(begun[pk].items())]
        self.host_ids = [pk for pk, _, _ in found]
        self.contracts = [contract for _, contract, _ in found]
        self.gpus = [gpus for _, _, gpus in found]
        self.rows = hosts.position(self.host_ids)
        self.mine = np.zeros((len(found), MAX_GPUS), bool)
        for i, gpus in enumerate(self.gpus):
            self.mine[i, sorted(gpus)] = True

    def __len__(self) -> int:
        return len(self.rows)

    def row_of(self, first: int) -> dict[tuple[int, int], int]:
        """(host id, GPU) -> the row, where they stand behind `first` rows of hosts."""
        found = enumerate(zip(self.host_ids, self.gpus, strict=True), first)
        return {(pk, gpu): i for i, (pk, gpus) in found for gpu in gpus}

    def gpu_most_w(self, hosts: cells.Hosts) -> I32:
        """Per row: W that one of its GPUs may draw. On a host held lower for a call that is less for whom no call takes work: his hour
        has come, and he runs as low as those beside him. Whoever gives way to calls waits for full power.
        """
        full, most = hosts["gpu_max_w"][self.rows], hosts["gpu_most_w"][self.rows]
        if (full == most).all():
            return full
        firm = set(
            Contract.objects.filter(pk__in=self.contracts, kind=Kind.RESERVED, emergency_notice_s=None).values_list(
                "pk", flat=True
            )
        )
        return np.where([contract in firm for contract in self.contracts], most, full).astype(np.int32)

    def owed(self, hosts: cells.Hosts) -> dict[str, I64]:
        """Per row: CPU, RAM and NVMe that are owed and still free. Their sum is never more than the host has free."""
        held = self._held()
        out: dict[str, I64] = {}
        for name, total in (("cpu_free", "cpu_total"), ("ram_free", "ram_total"), ("nvme_free", "nvme_total")):
            left = dict(zip(self.host_ids, hosts[name][self.rows].tolist(), strict=True))
            offers = []
            for i, (pk, contract) in enumerate(zip(self.host_ids, self.contracts, strict=True)):
                row = self.rows[i]
                share = int(hosts[total][row]) * len(self.gpus[i]) // max(1, int(hosts["gpu_count"][row]))
                offer = min(left[pk], max(0, share - held[name].get((pk, contract), 0)))
                left[pk] -= offer
                offers.append(offer)
            out[name] = np.array(offers, np.int64)
        return out

    def _held(self) -> dict[str, dict[tuple[int, int], int]]:
        """What each contract's own jobs hold on these hosts."""
        names = {"cpu_free": "vcpu_milli", "ram_free": "ram_mib", "nvme_free": "nvme_gib"}
        held: dict[str, Counter[tuple[int, int]]] = {name: Counter() for name in names}
        live = Placement.objects.filter(host_id__in=set(self.host_ids)).exclude(state__in=Placement.FINAL)
        for host_id, contract_id, *amounts in live.values_list("host_id", "contract_id", *names.values()):
            for name, amount in zip(names, amounts, strict=True):
                held[name][host_id, contract_id] += amount
        return held  # type: ignore[return-value]

"""A site's meters beside its devices' readings, in the terms of scheduler.core.power_proof."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from statistics import median_low

import numpy as np
import numpy.typing as npt
from django.db import connection

from marketplace.models import Miner, NodeResidual, PowerNode, ShedBatch
from marketplace.services.power.ledger import FRESH, Ledger
from scheduler.core import power as core
from scheduler.core import power_proof as proof

KEPT = 3  # looks: their median is not moved by one that fell into a ramp
PARKED_PERMILLE = 1050  # a host that reads more than this of its parked draw has work, which may ramp at any moment


@dataclass
class Look:
    """The site at one moment. Node keys are positions in the ledger's tree; `at`: when the meter was read."""

    ledger: Ledger
    devices: proof.Devices
    residual: dict[int, int]  # mW, of nodes whose meter is fresh
    at: dict[int, datetime]
    history: dict[int, list[int]]  # W
    calm: npt.NDArray[np.bool_]
    error: core.Ints
    held_mw: core.Ints  # booked for devices that are silent

    @classmethod
    def of(cls, ledger: Ledger, miners: Sequence[Miner], *, now: datetime) -> "Look":
        tree = ledger.tree
        hosts, booked = _hosts(ledger, now), [h.reserved_w for h in ledger.hosts.values()]
        devices = proof.Devices.of([*hosts, *(_row(ledger, m, now) for m in miners)])
        held = np.array([*booked, *(m.reserved_w for m in miners)], np.int64)
        silent = core.Load.of(tree, devices.node[~devices.known], devices.kind[~devices.known], held[~devices.known])
        fresh = {
            tree.index[n.pk]: n
            for n in ledger.nodes.values()
            if n.metering == PowerNode.Metering.METER and n.measured_at and now - n.measured_at <= FRESH
        }
        return cls(
            ledger,
            devices,
            proof.residuals_mw(tree, {n: row.measured_w or 0 for n, row in fresh.items()}, devices),
            {n: row.measured_at for n, row in fresh.items() if row.measured_at},
            {},
            proof.calm(tree, devices),
            proof.error_mw(tree, devices),
            core.reserved_mw(tree, silent),
        )

    def remember(self) -> None:
        """Keep this look beside the last ones, once for every few seconds of each meter. The caller holds the site's lock."""
        known = {r.node_id: r for r in NodeResidual.objects.filter(node_id__in=self.ledger.nodes)}
        rows: list[tuple[int, datetime, list[int]]] = []
        for n, mw in self.residual.items():
            node_id: int = self.ledger.tree.keys[n]  # type: ignore[assignment]
            row = known.get(node_id)
            watts = row.watts if row is not None and self.at[n] - row.at <= FRESH else []
            if not watts or row is None or self.at[n] - row.at >= timedelta(seconds=proof.APART_S):
                watts = [*watts, mw // 1000][-KEPT:]
                rows.append((node_id, self.at[n], watts))
            self.history[n] = watts
        if rows:
            with connection.cursor() as cursor:
                cursor.executemany(
                    "INSERT INTO marketplace_noderesidual (node_id, at, watts) VALUES (%s, %s, %s)"
                    " ON CONFLICT (node_id) DO UPDATE SET at = EXCLUDED.at, watts = EXCLUDED.watts",
                    rows,
                )

    def hear(self, batches: Iterable[ShedBatch]) -> None:
        """Keep what devices draw that speak for the first time since a batch found them silent. The caller holds the site's lock."""
        now = {
            k: int(w)
            for k, w, known in zip(self.devices.key, self.devices.watts, self.devices.known, strict=True)
            if known
        }
        for batch in batches:
            news = {key: now[key] for key in batch.silent if key in now and key not in batch.answered}
            if news:
                batch.answered |= news
                batch.save(update_fields=["answered"])

    def metered_above(self, node_id: int) -> list[int]:
        """Positions of the nodes at and above that have a meter, nearest first, fresh or not."""
        tree = self.ledger.tree
        return [n for n in tree.paths[tree.index[node_id]] if tree.metering[n] == PowerNode.Metering.METER]

    def settled(self) -> dict[int, int]:
        """Residuals that one ramp has not moved, mW: the look itself in calm, else the median of the last ones."""
        return {
            n: mw if self.calm[n] or not self.history.get(n) else 1000 * median_low(self.history[n])
            for n, mw in self.residual.items()
        }

    def rise(self, batch: ShedBatch, residual: dict[int, int]) -> dict[int, int]:
        tree = self.ledger.tree
        before = {tree.index[int(pk)]: 1000 * w for pk, w in batch.before.items() if int(pk) in tree.index}
        return proof.rise_mw(tree, residual, before, self.devices, batch.answered)

    def doubted(
        self, since: datetime, silent: Sequence[str], miners: Sequence[Miner], doubts: dict[int, datetime]
    ) -> core.Load:
        """What the books hold above the readings of machines doubted since then, and of those fallen silent since."""
        rows = []
        reading = {
            key: w if known else 0
            for key, w, known in zip(self.devices.key, self.devices.watts, self.devices.known, strict=True)
        }
        gone = set(self.devices.silent()) - set(silent)
        for miner in miners:
            key = f"m{miner.pk}"
            if key in gone or (miner.pk in doubts and doubts[miner.pk] >= since):
                above = max(0, miner.reserved_w - int(reading[key]))
                rows.append((self.ledger.tree.index[miner.power_node_id], core.MINER, above))
        return core.Load.of(self.ledger.tree, *(zip(*rows, strict=True) if rows else ([], [], [])))


def baseline(ledger: Ledger, *, now: datetime) -> ShedBatch:
    """A batch (unsaved) with what the meters see before a command: the median of the last looks, where they are fresh."""
    before = {
        str(row.node_id): median_low(row.watts)
        for row in NodeResidual.objects.filter(node_id__in=ledger.nodes)
        if now - row.at <= FRESH
    }
    silent = [key for key, *_, known, _stirs in _hosts(ledger, now) if not known]
    unread = Miner.objects.filter(site_id=ledger.site_id).exclude(measured_at__gte=now - FRESH)
    silent += [f"m{pk}" for pk in unread.values_list("pk", flat=True)]
    return ShedBatch(site_id=ledger.site_id, commanded_at=now, before=before, silent=silent)


def _hosts(ledger: Ledger, now: datetime) -> list[tuple[str, int, int, int, bool, bool]]:
    """Rows of proof.Devices."""
    return [
        (
            f"h{h.pk}",
            ledger.tree.index[h.power_node_id],
            core.HOST,
            h.measured_w or 0,
            h.measured_w is not None and h.beat_at is not None and now - h.beat_at <= FRESH,
            1000 * (h.measured_w or 0) > PARKED_PERMILLE * h.parked_w,
        )
        for h in ledger.hosts.values()
    ]


def _row(ledger: Ledger, miner: Miner, now: datetime) -> tuple[str, int, int, int, bool, bool]:
    watts = miner.measured_w or 0
    known = miner.measured_w is not None and miner.measured_at is not None and now - miner.measured_at <= FRESH
    # On its way down its reading is a second older than the meter, and higher. On its way up it takes most of a minute.
    falling = 100 * (watts - miner.commanded_w) > 15 * miner.mode_watts[-1]
    return f"m{miner.pk}", ledger.tree.index[miner.power_node_id], core.MINER, watts, known, falling

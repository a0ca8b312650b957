"""What customers of the fault harness ask for: jobs of every shape, with every rule that a job can have."""

from __future__ import annotations

import random
from typing import Any

from marketplace.models import Contract

LABELS = ({"app": "db"}, {"app": "web"}, {"app": "db", "tier": "a"})
TAINT = "ssd=slow"
LEVELS = ("host", "leaf", "spine", "site")


def draw(contract: Contract, dice: random.Random) -> dict[str, Any]:
    """One job under the contract: its shape, and in half of them what binds it beyond that."""
    most = min(contract.gpu_count, max(contract.listing.hosts.values_list("gpu_count", flat=True)))
    gpus = min(most, dice.choice((0, 1, 1, 1, 2, most)))
    share = gpus == 1 and dice.random() < 0.4
    replicas = dice.choice((1, 1, 1, 2, 2, 3, 4, 6))
    replicas = min(replicas, contract.gpu_count // max(gpus, 1))
    spec: dict[str, Any] = {
        "command": ["true"], "gpus": gpus, "gpu_milli": dice.choice((250, 500)) if share else 1000, "replicas": replicas,
        "vcpu_milli": dice.choice((500, 4000)), "ram_mib": dice.choice((1024, 16_384)), "nvme_gib": dice.choice((0, 0, 50)),
        "vram_mib": dice.choice((0, 0, 20_000)) if gpus else 0,
        "max_seconds": dice.choice((None, None, 60, 1800)),
        "priority": dice.choice((0, 0, 5)), "topology": dice.choice(("pack", "pack", "spread", "host", "leaf", "spine", "site")),
        "topology_required": dice.random() < 0.3, "movable": dice.random() < 0.3,
    }  # fmt: skip
    _loss(spec, dice)
    if dice.random() < 0.5:
        for rule in dice.sample(_RULES, dice.choice((1, 1, 2))):
            rule(spec, contract, dice)
    return spec


def _loss(spec: dict[str, Any], dice: random.Random) -> None:
    spec["on_replica_loss"] = dice.choice(("restart_gang", "replace_replica", "shrink"))
    if spec["on_replica_loss"] == "shrink":
        if spec["replicas"] == 1:
            spec["on_replica_loss"] = "restart_gang"
        else:
            spec["min_replicas"] = dice.randrange(1, spec["replicas"])


def _spread(spec: dict[str, Any], _contract: Contract, dice: random.Random) -> None:
    spec["topology"] = dice.choice(("spread", "site"))
    spec["spread_level"] = dice.choice(("host", "leaf"))
    if dice.random() < 0.6:
        spec["max_per_domain"] = dice.choice((1, 2))


def _nvlink(spec: dict[str, Any], _contract: Contract, dice: random.Random) -> None:
    spec["nvlink"] = dice.choice(("preferred", "required"))


def _affinity(spec: dict[str, Any], _contract: Contract, dice: random.Random) -> None:
    spec["labels"] = [f"{name}={value}" for name, value in sorted(dice.choice(LABELS).items())]
    if dice.random() < 0.7:
        wanted = [f"{name}={value}" for name, value in sorted(dice.choice(LABELS).items())]
        rule = dice.choice(("apart", "apart", "near"))
        spec["affinity"] = [{"rule": rule, "level": dice.choice(LEVELS[:3]), "labels": wanted}]


def _tolerates(spec: dict[str, Any], _contract: Contract, _dice: random.Random) -> None:
    spec["tolerations"] = [TAINT]


def _site(spec: dict[str, Any], contract: Contract, _dice: random.Random) -> None:
    spec["site_id"] = contract.listing.site_id


def _price(spec: dict[str, Any], contract: Contract, dice: random.Random) -> None:
    spec["price_limit"] = max(1, (contract.limit_price or contract.price) + dice.choice((-100_000, 0, 500_000)))


_RULES = (_spread, _nvlink, _affinity, _affinity, _tolerates, _site, _price)

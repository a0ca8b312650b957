"""Where a job may go beyond what its shape says: topology, failure domains, labels and affinity, taints, site, price.

The columns are read by `scheduler.rules`; here they are checked when a job is submitted, and shown.
"""

from typing import Any

from marketplace import ids
from marketplace.errors import MarketError
from marketplace.models import Job, Kind
from marketplace.services.job_terms import Terms

NEAR, APART = "near", "apart"
LEVELS = ("host", "leaf", "spine", "site")  # of affinity, from the narrowest up
MAX_LABELS, MAX_RULES = 16, 8
WORD = r"^[A-Za-z0-9]([A-Za-z0-9_./-]{0,62})$"  # a label's name and value
TAINT = r"^[A-Za-z0-9]([A-Za-z0-9_./-]{0,38})(=[A-Za-z0-9_./-]{1,40})?$"


def pairs(labels: dict[str, str]) -> list[str]:
    """As the row keeps them: name=value, sorted."""
    return sorted(f"{name}={value}" for name, value in labels.items())


def labels(kept: list[str]) -> dict[str, str]:
    """As they were given."""
    return dict(pair.partition("=")[::2] for pair in kept)


_SAME = {
    "host": "on the same host",
    "leaf": "at the same leaf switch",
    "spine": "in the same fabric",
    "site": "at the same site",
}
_NONE = {"host": "on a host", "leaf": "at a leaf switch", "spine": "in a fabric", "site": "at a site"}


_PLACES = {
    "pack": "packed closely",
    "spread": "spread out",
    "host": "in one host",
    "leaf": "in one leaf",
    "spine": "in one fabric",
}


def place(job: Job) -> str:
    """What its topology asks for, as its owner reads it."""
    asked = _PLACES.get(job.topology, "in one site")
    if not job.spread_level:
        return asked
    spread = f"spread by {job.spread_level}"
    return spread if job.topology == Job.Topology.SPREAD else f"{asked}, {spread}"


def sentence(rule: dict[str, Any]) -> str:
    """One rule of affinity as its owner reads it."""
    who = "a job of yours with " + " and ".join(rule["labels"])
    if rule["rule"] == NEAR:
        return f"each replica {_SAME[rule['level']]} as {who}"
    return f"no replica {_NONE[rule['level']]} where {who} runs"


def without(job: Job, side: str) -> dict[str, Any]:
    """What the job would be submitted with so that its rules of one side (near, apart), or all (affinity), no longer bind it.
    Others keep apart from it for its labels.
    """
    kept = [] if side == "affinity" else [rule for rule in job.affinity if rule["rule"] != side]
    fields: dict[str, Any] = {"affinity": [{**rule, "labels": labels(rule["labels"])} for rule in kept]}
    return fields if side == NEAR or not job.labels else fields | {"labels": {}}


def check(job: Job, terms: Terms) -> None:
    """Refuse rules that contradict each other, and what the contract can never give; say whether there are any."""
    problems = _contradictions(job)
    if problems:
        raise MarketError("invalid_request", " ".join(problems.values()), problems)
    if job.site_id is not None and job.site_id != terms.site_id:
        at = ids.encode("sit", terms.site_id)
        raise _never("site", f"{terms.public_id} is at {terms.site_name} ({at}).", at)
    if job.region and job.region != terms.region:
        raise _never("region", f"{terms.public_id} is in region {terms.region}.", terms.region)
    limit = job.price_limit
    if limit is not None and terms.kind != Kind.SPOT and terms.price > limit:
        raise _never("price_limit", f"{terms.public_id} costs {terms.price} per GPU-hour.", str(terms.price))
    job.ruled = bool(
        job.nvlink != Job.Nvlink.ANY or job.spread_level or job.max_per_domain or job.site_id or limit is not None
        or job.labels or job.affinity or job.tolerations
    )  # fmt: skip


def _never(field: str, detail: str, hint: str) -> MarketError:
    return MarketError("never_fits", detail, {f"/{field}": hint}, {"reason": f"no_{field}"})


def _contradictions(job: Job) -> dict[str, str]:
    found: dict[str, str] = {}
    spreads = job.topology == Job.Topology.SPREAD or job.spread_level
    if job.max_per_domain is not None and not spreads:
        found["/max_per_domain"] = "A bound per failure domain needs topology spread, or a spread_level."
    if job.spread_level and job.topology != Job.Topology.SPREAD:
        if job.topology == Job.Topology.PACK:
            found["/spread_level"] = (
                "Packed closely and spread contradict each other: set topology to spread, or to a level."
            )
        elif LEVELS.index(job.topology) <= LEVELS.index(job.spread_level):
            found["/spread_level"] = f"Inside one {job.topology} there is nothing to spread over but a narrower level."
    if job.movable and not job.checkpoint_grace_s:
        found["/movable"] = (
            "A job that may be moved needs a checkpoint grace above 0: the time in which it saves its work."
        )
    if job.on_replica_loss == Job.OnReplicaLoss.SHRINK:
        if not job.min_replicas or job.min_replicas >= job.replicas:
            found["/min_replicas"] = "To shrink, give the fewest replicas that can go on: at least 1, under replicas."
    elif job.min_replicas is not None:
        found["/min_replicas"] = "A minimum goes with on_replica_loss: shrink."
    return found


def shown(job: Job) -> dict[str, Any]:
    """The part of the job's resource that these rules are."""
    return {
        "topology": job.topology,
        "topology_required": job.topology_required,
        "nvlink": job.nvlink,
        "spread_level": job.spread_level or None,
        "max_per_domain": job.max_per_domain,
        "labels": labels(job.labels),
        "affinity": [{**rule, "labels": labels(rule["labels"])} for rule in job.affinity],
        "tolerations": job.tolerations,
        "site": ids.encode("sit", job.site_id) if job.site_id else None,
        "region": job.region or None,
        "price_limit": job.price_limit,
        "on_replica_loss": job.on_replica_loss,
        "min_replicas": job.min_replicas,
        "epoch": job.epoch,
        "lost_ranks": job.lost_ranks,
    }

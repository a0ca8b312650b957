"""The scheduler's reasons and suggestions in words: for the customer, who learns nothing of others, and for our own people."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

from scheduler.core.changes import Change
from scheduler.core.types import Level, Reason, Request

# So begins the event of a waiting job for which others leave a host (scheduler.defrag).
ROOM: Final = "room is being made"
# And so that of one whose promised start is lost (scheduler.promises).
BROKEN: Final = "the start promised for"

# What stops it, and what the hosts left after the stage have.
REASONS: Final[dict[Reason, tuple[str, str]]] = {
    Reason.OK: ("it fits", "fit"),
    Reason.NOT_IN_POOL: ("its contract's listing has no host here", "belong to its contract's listing"),
    Reason.WRONG_SITE: ("the site asked for has no host that would do", "at the site asked for"),
    Reason.WRONG_MODEL: ("no host has a GPU model that it accepts", "of a GPU model that it accepts"),
    Reason.HOST_UNSCHEDULABLE: (
        "the hosts that would do take no work now (they leave for maintenance, are in it, or their site is silent or starts nothing)",
        "taking work",
    ),
    Reason.HOST_RESERVED_FOR_OWNER: ("the hosts that would do are reserved", "not reserved for others"),
    Reason.HELD_FOR_EARLIER_JOB: (
        "the hosts that would do are held for a job before it",
        "not held for a job before it",
    ),
    Reason.NO_CPU: ("vCPU", "with the vCPU free"),
    Reason.NO_RAM: ("memory", "with the memory free"),
    Reason.NO_NVME: ("local NVMe", "with the NVMe free"),
    Reason.NO_GPU: ("idle GPUs on one host", "with the idle GPUs"),
    Reason.NO_GPU_SHARE: ("a large enough share of one GPU", "with room on one GPU"),
    Reason.NO_VRAM: ("GPU memory", "with the GPU memory free"),
    Reason.TOPOLOGY: ("a place where its replicas may stand as asked (topology)", "in the right NVLink domain"),
    Reason.NO_WATTS: ("power at the site", "with power for it"),
    Reason.GANG_INCOMPLETE: ("room for all replicas at once", "with room for all"),
    Reason.OVER_QUOTA: ("its contract's ceiling of GPUs is reached", "under the ceiling"),
    Reason.ORGANIZATION_LIMIT: ("the organization limit of GPUs is reached", "under the organization's limit"),
    Reason.HOURLY_LIMIT: (
        "it would take what running work costs an hour over the organization's limit",
        "within the hourly limit",
    ),
    Reason.BUDGET_USED: ("the organization's budget of this month is used up", "within the month's budget"),
    Reason.PRICE_LIMIT: ("the price is above its limit", "within the price limit"),
    Reason.INVALID: ("the job as it stands cannot be placed", "valid"),
    Reason.EMPTY_CELL: ("its region has no host", "in its region"),
    Reason.TAINTED: ("the hosts that would do have taints that it does not tolerate", "whose taints it tolerates"),
    Reason.LEAVES_TOO_SOON: (
        "the hosts that would do leave for maintenance before it would end",
        "staying long enough",
    ),
    Reason.RESERVED_SOON: (
        "the GPUs that would do are reserved before it would end",
        "free of reservations for long enough",
    ),
    Reason.AFFINITY: ("its affinity rules keep it off the hosts that would do", "where its affinity rules let it go"),
}
# Reasons whose words are what is missing: it waits for that. The others are sentences.
LACKS: Final = {Reason(n) for n in range(Reason.NO_CPU, Reason.GANG_INCOMPLETE + 1)}
# Why a job lost its place or ended: first words of a reason (docs/agent-protocol.md, services.jobs.FAULTS), as its owner reads them.
_LEFT: Final[dict[str, str]] = {
    "host_lost": "its host was lost",
    "site_lost": "its site was silent for too long",
    "start_failed": "a replica could not be started",
    "supervisor_lost": "a replica vanished from its host",
    "lease_expired": "its site could not be reached for too long",
    "power_shed": "its site had to shed power",
    "power_lost": "its host lost power",
    "gang_member_failed": "another of its replicas failed",
    "drained": "it was asked to leave its host",
    "host drained": "its host leaves",
    "killed_after_grace": "a replica did not stop within its grace",
    "stopped": "it was stopped",
    "not_started": "the power for it did not come free in time",
    "max_seconds": "its time limit was reached",
}
TERMS: Final[dict[str, str]] = {
    "fragmentation": "free GPU that typical jobs can no longer use there",
    "hole": "worth of the rest of the GPU that it shares",
    "balance": "free GPU left without the CPU or memory to serve it",
    "spec": "others insist on this GPU model",
    "slots": "idle GPUs together that jobs of several GPUs will want",
    "opening": "breaks into an empty host",
    "best fit": "fuller is better",
    "fgd": "score of fragmentation gradient descent",
}
_LEVELS: Final = {
    Level.NONE: "cell", Level.NVLINK: "NVLink domain", Level.HOST: "host", Level.LEAF: "leaf switch", Level.SPINE: "fabric (spine)",
    Level.SITE: "site",
}  # fmt: skip


def reason(name: str) -> Reason:
    """The reason of that name, INVALID for one that the code no longer has."""
    return Reason[name] if name in Reason.__members__ else Reason.INVALID


def stage(name: str) -> str:
    """What the hosts left after the stage have."""
    return REASONS[Reason[name]][1] if name in Reason.__members__ else name.lower().replace("_", " ")


def binds(found: Reason, binding: Reason, short: int = 0) -> str:
    """`idle GPUs on one host, short by 2 GPUs`; both where the job's reason and the hosts' differ."""
    text = REASONS[found][0]
    if binding not in {found, Reason.OK}:
        text += f" (most hosts lack {REASONS[binding][0]})"
    return f"{text}, short by {_lack(found, short)}" if short else text


def _lack(found: Reason, short: int) -> str:
    if found is Reason.NO_CPU:
        return f"{short / 1000:g} vCPU"
    if found in {Reason.NO_RAM, Reason.NO_VRAM}:
        return _size(short)
    if found is Reason.NO_GPU_SHARE:
        return f"{short / 1000:g} of a GPU"
    unit = {Reason.NO_GPU: "GPU", Reason.TOPOLOGY: "replica", Reason.GANG_INCOMPLETE: "replica"}.get(found)
    return count(short, unit) if unit else f"{short} {'GiB' if found is Reason.NO_NVME else 'W'}"


def left(reason: str) -> str:
    """A reason of a job's or a placement's end, without our own short words for it."""
    head, _, rest = reason.partition(": ")
    if head == "preempted" and rest:
        return rest
    said = _LEFT.get(head, head)
    return f"{said}: {rest}" if rest else said


def moment(at: datetime) -> str:
    return at.astimezone(UTC).strftime("%-d %b %Y %H:%M:%S UTC")


def amount(millionths: int) -> str:
    return f"{millionths / 1_000_000:g}"


def level(of: Level) -> str:
    return _LEVELS[of]


def change(c: Change, was: Request, names: dict[str, Any]) -> str:
    """One suggestion as a sentence. `names`: model, site, listing (of where it would go), price, when, jobs: words."""
    r, when = c.request, names.get("when", "now")
    each = "a replica " if was.replicas > 1 else ""
    t, text = r.topology, ""
    if c.kind == "gpus":
        text = f"With {count(r.gpus, 'GPU')} {each}instead of {was.gpus}"
    elif c.kind == "split":
        split = f"{count(r.replicas, 'replica')} of {count(r.gpus, 'GPU')}"
        text = f"As {split} instead of {was.replicas} of {was.gpus}, the rest in proportion"
    elif c.kind == "replicas":
        text = f"With {count(r.replicas, 'replica')} instead of {was.replicas}"
    elif c.kind == "share":
        text = f"With {r.gpu_milli} thousandths of a GPU {each}instead of {was.gpu_milli}"
    elif c.kind == "cpu":
        text = f"With {r.cpu / 1000:g} vCPU {each}instead of {was.cpu / 1000:g}"
    elif c.kind in {"ram", "vram"}:
        what = "memory" if c.kind == "ram" else "memory on each GPU"
        text = f"With {_size(getattr(r, c.kind))} {what} {each}instead of {_size(getattr(was, c.kind))}"
    elif c.kind == "nvme":
        text = f"With {r.nvme} GiB of NVMe {each}instead of {was.nvme}"
    elif c.kind in {"model", "site", "listing"}:
        text = {
            "model": f"On {names.get('model')}",
            "site": f"At {names.get('site')}",
            "listing": f"Under a contract on {names.get('listing')} ({names.get('model')}, {names.get('site')})",
        }[c.kind]
    elif c.kind == "topology":
        text = f"With all replicas in one {level(t.pack)} instead of one {level(was.topology.pack)}" if t.required else (
            "With its placement preferred instead of required"
        )  # fmt: skip
    elif c.kind == "nvlink":
        text = "With NVLink preferred instead of required"
    elif c.kind == "spread":
        text = (
            f"With up to {t.max_per_domain} replicas in one {level(t.spread)} instead of {was.topology.max_per_domain}"
        )
    elif c.kind in {"near", "apart", "affinity"}:
        text = {
            "near": "Without its rules to stand close to others",
            "apart": "Without its rules to stand apart, and without the labels for which others stand apart from it",
            "affinity": "Without its affinity rules and labels",
        }[c.kind]
    elif c.kind == "taints":
        text = "With tolerations for the taints of the hosts that would do"
    elif c.kind == "duration":
        text = f"With a time limit of {span(r.duration_s)} or less"
    elif c.kind == "price":
        price = names.get("price")
        text = f"With a price limit of {price} or more per GPU-hour" if price else "With a higher price limit"
    elif c.kind == "quota":
        text = "With a higher ceiling of GPUs"
    elif c.kind == "limit":
        text = "With a higher limit of GPUs for the organization"
    elif c.kind == "rate":
        text = "With a higher hourly spending limit"
    elif c.kind == "budget":
        text = "With a larger budget for the month"
    elif c.kind == "contract":
        text = "Under an on-demand contract instead of spot"
    elif c.kind == "job":
        text = f"Without {names.get('jobs') or 'another running job'}"
    elif c.kind == "window":
        return (
            f"As it is, from {when}, when {names.get('jobs') or 'a reservation'} ends, if nothing else takes its place."
        )
    elif c.kind == "ends":
        text = names.get("jobs") or "running work"
        return f"As it is, from {when}, when {text} ends by its time limit, if nothing else takes its place."
    elif c.kind == "now":
        return "It fits on what is free: the next cycle places it, if nothing else takes its place."
    return f"{text} it would fit now."


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _size(mib: int) -> str:
    return f"{mib / 1024:g} GiB" if mib >= 1024 else f"{mib} MiB"


def span(time: float) -> str:
    seconds = int(time)
    if seconds >= 7200:
        return f"{seconds // 3600} h" + (f" {seconds % 3600 // 60} min" if seconds % 3600 >= 60 else "")
    return f"{seconds // 60} min" if seconds >= 120 else f"{seconds} s"

"""What each host behind an offer has at the least: shown with the listing, frozen into quotes, contracts and order forms.

A promise holds for every host, so it is that of the poorest in each respect, as search compares it (services.offers.OF_HOSTS).
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from marketplace.compiled import Compiled, slot
from marketplace.models import Listing
from marketplace.models.listings import hosts_behind

NAMEPLATE = "always at nameplate power (no cap control)"
FIELDS = ("gpu_count", "vcpu_milli", "ram_mib", "nvme_gib", "cap_control", "nvlink_gpus")


_SHAPES = Compiled(
    lambda is_resale: (
        hosts_behind(slot("listing"), is_resale=is_resale)
        .order_by()
        .values_list("gpu_count", "vcpu_milli", "ram_mib", "nvme_gib", "cap_control", "nvlink_domains")
    )
)


def of_listing(listing: Listing) -> dict[str, int] | None:
    """`gpu_count`, `vcpu_milli`, `ram_mib`, `nvme_gib`, `cap_control` (whether the power of its GPUs can be limited: without that it
    counts at its nameplate at all times) and `nvlink_gpus` (of the largest NVLink domain); None without hosts.
    """
    rows = _SHAPES(listing.is_resale, listing=listing.pk)
    found = [(*plain, min(_largest(domains), plain[0])) for *plain, domains in rows]
    return of_values(list(map(min, zip(*found, strict=True)))) if found else None


def of_values(values: Sequence[int]) -> dict[str, int]:
    """Of the least of each field, in their order."""
    made = dict(zip(FIELDS, values, strict=True))
    return made | {"cap_control": bool(made["cap_control"])}


def _largest(domains: list[int]) -> int:
    """GPUs of the largest NVLink domain; below 0: in none."""
    return max(Counter(domain for domain in domains if domain >= 0).values(), default=0)


def words(shape: dict[str, Any] | None) -> str:
    """For people: `8 GPUs, 96 vCPU, 1,024 GiB RAM, 7,680 GiB NVMe, NVLink among 8`."""
    if not shape:
        return ""
    said = [
        f"{shape['gpu_count']} GPUs", f"{shape['vcpu_milli'] // 1000} vCPU", f"{round(shape['ram_mib'] / 1024):,} GiB RAM",
        f"{shape['nvme_gib']:,} GiB NVMe" if shape["nvme_gib"] else "",
        f"NVLink among {shape['nvlink_gpus']}" if shape["nvlink_gpus"] > 1 else "",
        "" if shape.get("cap_control", True) else NAMEPLATE,
    ]  # fmt: skip
    return ", ".join(filter(None, said))

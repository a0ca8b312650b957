"""Under what a job is submitted: its contract as it is now, and whether a host behind it could hold the job at all."""

from collections.abc import Iterable
from datetime import datetime
from typing import Any, NamedTuple

from marketplace import ids, prepared
from marketplace.errors import MarketError
from marketplace.models import BillingStanding, Contract, Host, Job, Listing
from marketplace.services import screening
from marketplace.tenancy import Actor

Shape = tuple[int, int, int, int, int, str]  # GPUs, vCPU, RAM, NVMe, VRAM a GPU, models as an array literal


class Terms(NamedTuple):
    """What submitting reads of a contract. Columns of `_HELD`, in order."""

    id: int
    organization_id: int
    listing_id: int
    cell_id: int
    state: str
    ends_at: datetime | None
    kind: str
    price: int
    gpu_count: int
    site_id: int
    site_name: str
    region: str
    standing: str | None  # of the organization's billing
    rejected: list[str]  # checks that the organization did not pass
    gpu_model: str | None

    @property
    def public_id(self) -> str:
        return ids.encode(Contract.PREFIX, self.id)


# The contracts as they are now, and none of them ends before we commit: who ends it sees our jobs, or we see its end.
# With each shape asked for under it: whether a host behind it holds a replica when it is empty.
_HELD = """
SELECT c.id, c.organization_id, c.listing_id, c.cell_id, c.state, c.ends_at, c.kind, c.price, c.gpu_count, c.site_id, t.name, t.region,
  s.state, ARRAY(SELECT x.kind::text FROM marketplace_screening x WHERE x.organization_id = c.organization_id AND x.state = 'rejected'
    ORDER BY 1), c.terms->>'gpu_model', a.n,
  EXISTS (SELECT 1 FROM marketplace_host h WHERE h.listing_id = c.listing_id AND h.state <> 'retired'
    AND h.gpu_count >= a.gpus AND h.vcpu_milli >= a.vcpu AND h.ram_mib >= a.ram AND h.nvme_gib >= a.nvme
    AND (a.gpus = 0 OR h.vram_mib >= a.vram)
    AND (a.models = '{}' OR h.gpu_model_id IN (SELECT id FROM marketplace_gpumodel WHERE name = ANY(a.models::text[]))))
FROM unnest(%s::bigint[], %s::bigint[], %s::bigint[], %s::bigint[], %s::bigint[], %s::bigint[], %s::text[])
  WITH ORDINALITY a(contract, gpus, vcpu, ram, nvme, vram, models, n)
JOIN marketplace_contract c ON c.id = a.contract JOIN marketplace_site t ON t.id = c.site_id
LEFT JOIN marketplace_billingstanding s ON s.organization_id = c.organization_id
WHERE c.organization_id = %s ORDER BY c.id FOR SHARE OF c
"""


def shape_of(spec: dict[str, Any]) -> Shape:
    """What of a job a host must have, of those named in `spec` and the defaults of the others."""
    gpus, vcpu, ram, nvme, vram = (spec.get(name, default) for name, default in _SHAPE)
    models = ",".join(
        '"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"' for name in spec.get("gpu_models") or ()
    )
    return gpus, vcpu, ram, nvme, vram, "{" + models + "}"


_SHAPE = [(name, getattr(Job(), name)) for name in ("gpus", "vcpu_milli", "ram_mib", "nvme_gib", "vram_mib")]


def hold(actor: Actor, asked: Iterable[tuple[int, Shape]]) -> tuple[dict[int, Terms], set[tuple[int, Shape]]]:
    """The actor's own contracts of these, locked against their end, and which of the pairs some host could hold."""
    pairs = sorted(set(asked))
    *numbers, models = zip(*((pk, *shape) for pk, shape in pairs), strict=True)
    # As literals: lists of numbers would be of another type, and so another statement, with each size of number.
    literals = ["{" + ",".join(map(str, column)) + "}" for column in numbers]
    found = prepared.rows(_HELD, [*literals, list(models), actor.organization_id])
    width = len(Terms.__annotations__)
    return {row[0]: Terms(*row[:width]) for row in found}, {pairs[n - 1] for *_, n, fits in found if fits}


def check(pk: int, held: dict[int, Terms], now: datetime) -> None:
    """Refuses a contract that is not the actor's, is not in force, or whose organization does not pay."""
    terms = held.get(pk)
    if terms is None:
        raise MarketError("not_found", "contract: there is none of that id.", {"/contract": "unknown"})
    if terms.state != Contract.State.ACTIVE or (terms.ends_at and terms.ends_at <= now):
        raise MarketError("contract_inactive", f"{terms.public_id} is {terms.state}; book another one.")
    if terms.standing is None or terms.standing == BillingStanding.State.NO_CARD:
        raise MarketError("card_required", "Add a card on the page Payment methods, then submit again.")
    if terms.standing == BillingStanding.State.SUSPENDED:
        raise MarketError("billing_suspended", "Pay the open invoices, then submit again.")
    screening.refuse_rejected(terms.rejected, terms.gpu_model)


def check_size(job: Job, terms: Terms) -> None:
    """Refuses what the contract's ceiling can never hold."""
    if job.total_gpus > terms.gpu_count:
        raise MarketError(
            "over_ceiling",
            f"The job asks for {job.total_gpus} GPUs; the contract holds {terms.gpu_count}. Ask for fewer, or book more.",
            {"/replicas": f"at most {terms.gpu_count} GPUs in all"},
        )


def refuse_what_never_fits(job: Job, terms: Terms) -> None:
    """Names the first dimension that no host behind the contract meets, if there is one: all shapes of hosts are read for it."""
    names = ("gpu_model_id", "gpu_count", "vcpu_milli", "ram_mib", "nvme_gib", "vram_mib")
    hosts = Host.objects.filter(listing_id=terms.listing_id).exclude(state=Host.State.RETIRED)
    left = list(hosts.select_related("gpu_model").distinct(*names).order_by(*names))
    steps: list[tuple[str, str, Any]] = [
        ("gpu_models", "GPU model", lambda h: not job.gpu_models or h.gpu_model.name in job.gpu_models),
        ("gpus", "GPUs in one host", lambda h: h.gpu_count >= job.gpus),
        ("vram_mib", "VRAM per GPU", lambda h: not job.gpus or h.vram_mib >= job.vram_mib),
        ("vcpu_milli", "vCPU", lambda h: h.vcpu_milli >= job.vcpu_milli),
        ("ram_mib", "RAM", lambda h: h.ram_mib >= job.ram_mib),
        ("nvme_gib", "NVMe", lambda h: h.nvme_gib >= job.nvme_gib),
    ]
    for field, noun, fits in steps:
        kept = [host for host in left if fits(host)]
        if not kept:
            column = "gpu_count" if field == "gpus" else field
            if field == "gpu_models":
                hint = "offered: " + ", ".join({h.gpu_model.name for h in left})
            else:
                hint = f"the largest has {max((getattr(h, column) for h in left), default=0)}"
            listing = Listing.objects.get(pk=terms.listing_id)
            raise MarketError(
                "never_fits",
                f"No host of {listing} has {noun} of {getattr(job, field)}; {hint}.",
                {f"/{field}": hint},
                {"reason": f"no_{field}"},
            )
        left = kept

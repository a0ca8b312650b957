"""Which rows an operator sees in the admin: its own side of the market, never what the market shows to everybody."""

from typing import Any

from django.db.models import Model, QuerySet

from billing.models import Payout, PayoutLine
from marketplace.models import (
    Agent,
    AuditEvent,
    Contract,
    ConversionPlan,
    Curtailment,
    CurtailmentReport,
    Fill,
    GpuModel,
    GridSource,
    Host,
    Listing,
    Maintenance,
    Miner,
    Organization,
    Placement,
    PoolFeed,
    PowerNode,
    Receipt,
    Resale,
    Site,
    SiteMinute,
    SpotInterval,
)
from marketplace.tenancy import Actor, TenantQuerySet

# The path from a row to the operator that owns it. A model that is not here cannot be listed, chosen or filtered by.
OPERATOR_PATH: dict[type[Model], str] = {
    Agent: "site__organization",
    AuditEvent: "organization",
    Contract: "operator",
    ConversionPlan: "site__organization",
    Curtailment: "site__organization",
    CurtailmentReport: "curtailment__site__organization",
    GridSource: "site__organization",
    Host: "site__organization",
    Listing: "organization",
    Maintenance: "site__organization",
    Miner: "site__organization",
    Organization: "pk",
    Payout: "organization",
    PayoutLine: "payout__organization",
    Placement: "site__organization",
    PoolFeed: "site__organization",
    PowerNode: "site__organization",
    Receipt: "site__organization",
    Resale: "contract__operator",
    Fill: "contract__operator",
    Site: "organization",
    SiteMinute: "site__organization",
    SpotInterval: "listing__organization",
}
CATALOGUES: frozenset[type[Model]] = frozenset({GpuModel})  # the same for everybody


def own(model: type[Model], actor: Actor) -> QuerySet[Any]:
    """The rows of `model` that belong to the actor's organization as an operator. TypeError for a table without an owner."""
    rows: QuerySet[Any] = model._default_manager.all()  # noqa: SLF001 - a model's documented default manager
    if model in CATALOGUES:
        return rows
    if model not in OPERATOR_PATH or not isinstance(rows, TenantQuerySet):
        raise TypeError(f"{model.__name__} has no path to its operator: add it to OPERATOR_PATH")
    return rows.visible_to(actor).filter(**{OPERATOR_PATH[model]: actor.organization_id})

"""Sites, their power trees, and what an operator does to them by hand. The only writer of these rows but for watts and free
columns (services.power, services.hosts); hosts and miners in bulk stand in services.inventory.

Every change of a site's rows runs under its lock, is audited, raises the generation that the agent follows, and nudges the
site's power loop.
"""

from collections import defaultdict
from datetime import datetime, timedelta
from typing import Any
from zoneinfo import available_timezones

from django.db import transaction
from django.db.models import F

from marketplace.errors import MarketError
from marketplace.locks import Lock, acquire
from marketplace.models import Agent, Cell, EnrolmentToken, Host, Miner, Organization, PowerNode, Site
from marketplace.outbox import emit
from marketplace.services import audit, conditions, placements, power, tokens
from marketplace.services.drains import drain_host, drain_site, set_taints, undrain_host, undrain_site
from marketplace.services.inventory import Changes, over_cap, upsert_hosts, upsert_miners
from marketplace.tenancy import Actor
from scheduler.core import power as core
from scheduler.core import tariffs

__all__ = [
    "Changes",
    "add_power_node",
    "cell_for",
    "create_enrolment_token",
    "create_site",
    "drain_host",
    "drain_site",
    "nudge",
    "recompute_reserved",
    "revoke_agent",
    "set_miner_manual",
    "set_site_mode",
    "set_taints",
    "take_inventory",
    "tell_all",
    "undrain_host",
    "undrain_site",
    "update_power_node",
    "update_site",
    "upsert_hosts",
    "upsert_miners",
]

ROOT = "site"  # the name of every site's root node
TOKEN_HOURS = 24
EDITABLE = frozenset(
    {
        *("name", "country", "timezone", "grid_operator", "energy_price_microusd_per_kwh"),
        *("carbon_g_per_kwh", "renewable_permille", "tariff", "pool_scheme", "pool_fee_ppm", "switch_cost_uusd"),
    }
)


def nudge(site: Site) -> None:
    """Run the site's power loop soon, after this commit."""
    emit("scheduler.site_loop", key=str(site.pk), payload={"site": site.pk})


def cell_for(region: str, *, livemode: bool) -> Cell:
    """The cell in which a new site of that region is planned; the first site of a region opens it."""
    found = Cell.objects.filter(region=region, livemode=livemode).order_by("id").first()
    if found is not None:
        return found
    return Cell.objects.get_or_create(
        name=f"{region}{'' if livemode else '-test'}"[:40], defaults={"region": region, "livemode": livemode}
    )[0]


@transaction.atomic
def create_site(
    organization: Organization,
    *,
    name: str,
    region: str,
    contract_power_w: int,
    actor: Actor,
    now: datetime,
    cell: Cell | None = None,
    pue_permille: int = 1250,
    miner_pue_permille: int = 1050,
    fixed_w: int = 0,
    metering: str = PowerNode.Metering.METER,
    **fields: Any,
) -> Site:
    """A site with its root node `site`: cap = contract power, overheads = the PUEs. `fields`: some of EDITABLE."""
    assert set(fields) <= EDITABLE, fields
    _check(fields)
    if not organization.is_operator:
        raise MarketError("forbidden", f"{organization.name} is no operator; switch that on in its settings first.")
    if Site.objects.filter(organization=organization, name=name).exists():
        raise MarketError("invalid_request", f"There is a site {name} already.", {"/name": "choose another"})
    home = cell or cell_for(region, livemode=organization.livemode)
    if home.livemode != organization.livemode:
        raise MarketError(
            "invalid_request", f"Cell {home.name} is of the other mode.", {"/cell": "test and live differ"}
        )
    site = Site.objects.create(
        organization=organization,
        cell=home,
        name=name,
        region=region,
        contract_power_w=contract_power_w,
        pue_permille=pue_permille,
        miner_pue_permille=miner_pue_permille,
        safety_generation=1,
        **fields,
    )
    root = PowerNode(
        site=site,
        name=ROOT,
        kind=PowerNode.Kind.SITE,
        cap_w=contract_power_w,
        fixed_w=fixed_w,
        metering=metering,
        overhead_gpu_permille=pue_permille,
        overhead_miner_permille=miner_pue_permille,
    )
    _set_margin(root)
    root.save()
    audit.record(
        actor,
        "site.created",
        site.public_id,
        now=now,
        organization_id=organization.pk,
        after={"name": name, "contract_power_w": contract_power_w, "cell": home.name},
    )
    return site


@transaction.atomic
def update_site(site: Site, *, actor: Actor, now: datetime, **changes: Any) -> Site:
    """Change some of EDITABLE. Caps and PUEs are the root node's: `update_power_node`."""
    assert set(changes) <= EDITABLE, changes
    _check(changes)
    acquire((Lock.SITE, site.pk))
    name = changes.get("name", site.name)
    if Site.objects.filter(organization_id=site.organization_id, name=name).exclude(pk=site.pk).exists():
        raise MarketError("invalid_request", f"There is a site {name} already.", {"/name": "choose another"})
    before = {field: getattr(site, field) for field in changes}
    for field, value in changes.items():
        setattr(site, field, value)
    site.save(update_fields=list(changes))
    _audit(site, actor, "site.updated", site.public_id, now, before=before, after=changes)
    return site


def _check(values: dict[str, Any]) -> None:
    """What prices are worked out from must be readable: a clock that there is, a tariff of known parts."""
    if values.get("timezone", "UTC") not in available_timezones():
        raise MarketError(
            "invalid_request", f"{values['timezone']} is no time zone.", {"/timezone": "e.g. America/Chicago"}
        )
    try:
        tariffs.parse(values.get("tariff", []))
    except tariffs.TariffError as error:
        raise MarketError(
            "invalid_request", f"The tariff cannot be read: {error}.", {f"/{error.field}": "?"}
        ) from error


@transaction.atomic
def set_site_mode(site: Site, mode: str, *, actor: Actor, now: datetime) -> Site:
    """`mode`: auto | hold | shed | off (docs/agent-protocol.md); the power loop acts on it at once."""
    if mode not in Site.Mode.values:
        raise MarketError("invalid_request", f"mode {mode!r} is none of {', '.join(Site.Mode.values)}", {"/mode": "?"})
    acquire((Lock.SITE, site.pk))
    site.refresh_from_db(fields=["mode"])
    before, site.mode = site.mode, mode
    if before == mode:
        return site
    site.save(update_fields=["mode"])
    conditions.record(sites=[site.pk], now=now)
    _changed(site, safety=True)
    _audit(site, actor, "site.mode_changed", site.public_id, now, before={"mode": before}, after={"mode": mode})
    return site


def tell_all() -> None:
    """Every site's agent and power loop, because what may rise has changed everywhere: each under its own lock."""
    for site in Site.objects.order_by("pk").iterator():
        with transaction.atomic():
            acquire((Lock.SITE, site.pk))
            _changed(site)


# --- the power tree
@transaction.atomic
def add_power_node(
    site: Site,
    *,
    name: str,
    cap_w: int,
    actor: Actor,
    now: datetime,
    parent: PowerNode | None = None,
    kind: str = PowerNode.Kind.PDU,
    fixed_w: int = 0,
    metering: str = PowerNode.Metering.NAMEPLATE,
    overhead_gpu_permille: int = 1000,
    overhead_miner_permille: int = 1000,
) -> PowerNode:
    """A node under `parent` (default: the root). Its margin follows from how it is metered."""
    acquire((Lock.SITE, site.pk))
    above = parent or PowerNode.objects.get(site=site, parent=None)
    if above.site_id != site.pk:
        raise MarketError("invalid_request", f"{above.name} is a node of another site.", {"/parent": "another site's"})
    if PowerNode.objects.filter(site=site, name=name).exists():
        raise MarketError("invalid_request", f"{site.name} has a node {name} already.", {"/name": "choose another"})
    node = PowerNode(
        site=site,
        parent=above,
        name=name,
        kind=kind,
        depth=above.depth + 1,
        cap_w=cap_w,
        fixed_w=fixed_w,
        metering=metering,
        overhead_gpu_permille=overhead_gpu_permille,
        overhead_miner_permille=overhead_miner_permille,
    )
    _set_margin(node)
    node.save()
    _changed(site, safety=True)
    _audit(site, actor, "power_node.created", node.public_id, now, after={"name": name, "cap_w": cap_w})
    return node


_NODE_FIELDS = frozenset({"cap_w", "fixed_w", "metering", "overhead_gpu_permille", "overhead_miner_permille"})


@transaction.atomic
def update_power_node(node: PowerNode, *, actor: Actor, now: datetime, **changes: Any) -> PowerNode:
    """Change cap, fixed load, metering or overheads. Refused (over_power_cap) where what is booked would not fit."""
    assert set(changes) <= _NODE_FIELDS, changes
    acquire((Lock.SITE, node.site_id))
    node.refresh_from_db()
    before = {field: getattr(node, field) for field in changes}
    for field, value in changes.items():
        setattr(node, field, value)
    _set_margin(node)
    booked = node.reserved_mw
    if {"overhead_gpu_permille", "overhead_miner_permille"} & set(changes):
        booked = recompute_reserved(node.site, overheads={node.pk: node})[node.pk]
    if booked > node.allowed_mw:
        raise over_cap(node, booked - node.allowed_mw)
    node.reserved_mw = booked
    node.save(update_fields=[*changes, "margin_w", "reserved_mw"])
    if node.parent_id is None and "cap_w" in changes:
        Site.objects.filter(pk=node.site_id).update(contract_power_w=node.cap_w)
    _changed(node.site, safety=True)
    _audit(node.site, actor, "power_node.updated", node.public_id, now, before=before, after=changes)
    return node


def _set_margin(node: PowerNode) -> None:
    node.margin_w = core.margin_w(node.cap_w, node.metering)
    if node.allowed_mw < 0:
        raise MarketError(
            "invalid_request",
            f"{node.name}: fixed {node.fixed_w} W and margin {node.margin_w} W ({node.metering}) leave nothing of the "
            f"cap of {node.cap_w} W.",
            {"/fixed_w": "lower it, or raise cap_w"},
        )


def recompute_reserved(site: Site, *, overheads: dict[int, PowerNode] | None = None) -> dict[int, int]:
    """What each node's `reserved_mw` must be by its devices' `reserved_w`: {node id: mW}. Reads only; the books' check.

    `overheads`: nodes to take in place of the stored ones.
    """
    nodes = {node.pk: node for node in PowerNode.objects.filter(site=site)} | (overheads or {})
    sums: dict[int, int] = defaultdict(int, dict.fromkeys(nodes, 0))
    for model, column in ((Host, "overhead_gpu_permille"), (Miner, "overhead_miner_permille")):
        for node_id, watts in model.objects.filter(site=site).values_list("power_node_id", "reserved_w"):
            at: int | None = node_id
            while at is not None:
                sums[at] += watts * getattr(nodes[at], column)
                at = nodes[at].parent_id
    return dict(sums)


# --- devices by hand
@transaction.atomic
def set_miner_manual(miner: Miner, manual: bool, *, actor: Actor, now: datetime, mode: str | None = None) -> Miner:
    """Take a miner out of dispatch, or give it back. By hand it keeps its mode, or goes to `mode` (a name of its ladder).

    A wake that does not fit under its nodes is refused (over_power_cap).
    """
    acquire((Lock.SITE, miner.site_id))
    miner.refresh_from_db()
    if mode is not None and (not manual or mode not in miner.mode_names):
        raise MarketError(
            "invalid_request",
            f"mode {mode!r}: give one of {', '.join(miner.mode_names)}, together with manual: true",
            {"/mode": "unknown, or the miner is not manual"},
        )
    before = {"manual": miner.manual, "mode": miner.mode_names[miner.desired_mode]}
    miner.manual = manual
    miner.save(update_fields=["manual"])
    if mode is not None and mode != before["mode"]:
        wanted = miner.mode_names.index(mode)
        command = power.Command(miner_id=miner.pk, mode=wanted, seen_generation=miner.desired_generation)
        if wanted and power.frozen():
            raise MarketError("illegal_transition", f"The platform's power is frozen; {miner.name} may only sleep.")
        if not power.command_miners(miner.site_id, [command], now=now):
            raise MarketError(
                "over_power_cap",
                f"{miner.name} at {mode} would need {miner.mode_watts[wanted]} W, and a node above {miner.power_node.name} "
                "has not that much left. Choose a lower mode, or let other miners sleep.",
            )
        miner.refresh_from_db()
    after = {"manual": manual, "mode": miner.mode_names[miner.desired_mode]}
    _audit(miner.site, actor, "miner.manual_changed", miner.public_id, now, before=before, after=after)
    _changed(miner.site)
    return miner


# --- agents
@transaction.atomic
def create_enrolment_token(site: Site, *, actor: Actor, now: datetime) -> tuple[EnrolmentToken, str]:
    """(row, token), shown once; enrols one agent within 24 hours."""
    token = tokens.new("enr_")
    row = EnrolmentToken.objects.create(
        site=site,
        digest=tokens.digest(token),
        created_by=actor.label[:120],
        expires_at=now + timedelta(hours=TOKEN_HOURS),
    )
    _audit(
        site, actor, "enrolment_token.created", site.public_id, now, after={"expires_at": row.expires_at.isoformat()}
    )
    return row, token


@transaction.atomic
def revoke_agent(agent: Agent, *, actor: Actor, now: datetime) -> bool:
    """Its key stops working at once; what it was granted ends by its lease. False where it was revoked already."""
    done = Agent.objects.filter(pk=agent.pk, revoked_at=None).update(revoked_at=now)
    if done:
        _audit(agent.site, actor, "agent.revoked", agent.public_id, now, before={"name": agent.name})
    return bool(done)


def take_inventory(site: Site, inventory: dict[str, Any], *, now: datetime, actor: Actor) -> None:
    """What an agent sees at its site: `{"hosts": [...], "miners": [...]}`, both in one transaction."""
    with transaction.atomic():
        if rows := inventory.get("hosts"):
            upsert_hosts(site, rows, now=now, actor=actor)
        if rows := inventory.get("miners"):
            upsert_miners(site, rows, now=now, actor=actor)


# --- what every change ends with
def _changed(site: Site, *, safety: bool = False) -> None:
    """The agent is told, the power loop runs. `safety`: caps, margins or the shed order are other than they were."""
    if safety:
        Site.objects.filter(pk=site.pk).update(safety_generation=F("safety_generation") + 1)
    placements.touch_sites([site.pk])
    nudge(site)


def _audit(
    site: Site, actor: Actor, verb: str, subject: str, now: datetime, *, before: Any = None, after: Any = None
) -> None:
    audit.record(actor, verb, subject, now=now, organization_id=site.organization_id, before=before, after=after)

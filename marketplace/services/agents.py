"""The control side of docs/agent-protocol.md: what an agent sees comes in, what shall be goes out.

`observe` takes a report in; `desired` says what shall be. Both are level-triggered: a lost or doubled call changes nothing.
"""

from collections import defaultdict
from datetime import datetime, timedelta
from typing import Any

from django.conf import settings
from django.db import connection, transaction
from django.db.models import F

from marketplace import ids
from marketplace.errors import MarketError
from marketplace.models import (
    Agent,
    AgentEvent,
    Curtailment,
    EnrolmentToken,
    Host,
    Job,
    Kind,
    LogChunk,
    Miner,
    Placement,
    PowerNode,
    Site,
)
from marketplace.services import gpu_health, placements, power, reliability, site_alerts, tokens
from marketplace.services.secrets import unseal
from marketplace.tenancy import Actor

MAX_SKEW_S = 30
LOG_CAP_BYTES = 5 << 20
LOG_NOTICE = "\n[tailrace] this stream has reached 5 MiB; what follows is not kept\n"


def enrol(*, token: str, name: str, version: str, runtime: str, now: datetime) -> tuple[Agent, str]:
    """Spend a token (guarded: two agents cannot) and make the site's agent; returns it with its key, shown once.

    An agent of the same name at the site is the same agent on new hardware: its old key stops working.
    """
    key = tokens.new("agk_")
    with transaction.atomic():
        spent = EnrolmentToken.objects.filter(digest=tokens.digest(token), used_at=None, expires_at__gt=now).update(
            used_at=now
        )
        if not spent:
            raise MarketError("enrolment_token_invalid", "Make a new one: admin, Sites, the site, Enrol an agent.")
        site_id = EnrolmentToken.objects.values_list("site_id", flat=True).get(digest=tokens.digest(token))
        agent, _ = Agent.objects.update_or_create(
            site_id=site_id,
            name=name[:60],
            defaults={
                "version": version[:24],
                "runtime": runtime[:24],
                "digest": tokens.digest(key),
                "revoked_at": None,
                "boot": "",
                "sequence": 0,
            },
        )
    return agent, key


def observe(agent: Agent, report: dict[str, Any], *, now: datetime) -> bool:
    """Take a report in. Returns whether the full inventory is wanted next time. Raises clock_skew, and applies nothing then.

    Readings wait for the site's lock as all that writes its rows does: hosts, miners and nodes are each written in one statement,
    in no order, and a site loop that had locked some of them could otherwise wait for this, and this for it.
    """
    skew = abs((now - report["agent_time"]).total_seconds())
    if skew > MAX_SKEW_S:
        raise MarketError("clock_skew", f"The agent's clock is {skew:.0f} s off; at most {MAX_SKEW_S} s.")
    if report.get("inventory"):
        _take_inventory(agent, report["inventory"], now)
    with transaction.atomic():
        site_alerts.raise_new(agent, report.get("events") or [])
        _events(agent, report.get("events") or [])
        if reliability.take_errors(agent.site_id, report.get("events") or [], now=now):
            placements.lock_sites([agent.site_id])
            gpu_health.judge(agent.site_id, now=now)
        if agent.boot == report["boot"][:40] and report["sequence"] < agent.sequence:
            return False  # overtaken by a later sync of the same agent: its rows are older than ours
        placements.lock_sites([agent.site_id])
        _readings(agent, report, now)
    if report.get("placements"):
        with transaction.atomic():
            placements.lock_sites([agent.site_id])
            placements.observe(agent, report["placements"], now=now)
    Agent.objects.filter(pk=agent.pk).update(
        boot=report["boot"][:40],
        sequence=report["sequence"],
        last_sync_at=now,
        lease_until=now + timedelta(seconds=settings.SITE_LEASE_SECONDS),
    )
    return not report.get("inventory") and not Host.objects.filter(site_id=agent.site_id).exists()


def _take_inventory(agent: Agent, inventory: dict[str, Any], now: datetime) -> None:
    from marketplace.services import inventory as inventories

    actor = Actor(kind="agent", site_id=agent.site_id, label=f"agent {agent.name}")
    if inventory.get("hosts"):
        inventories.upsert_hosts(agent.site, inventory["hosts"], now=now, actor=actor)
    if inventory.get("miners"):
        inventories.upsert_miners(agent.site, inventory["miners"], now=now, actor=actor)


def _readings(agent: Agent, report: dict[str, Any], now: datetime) -> None:
    """Hosts, miners and meters, each kind in one statement; a reading older than the stored one is dropped."""
    site_id = agent.site_id
    hosts = report.get("hosts") or []
    miners = report.get("miners") or []
    meters = [
        (name, int(w), at) for name, w, at in report.get("meters") or [] if at <= now + timedelta(seconds=MAX_SKEW_S)
    ]
    with connection.cursor() as cursor:
        if hosts:
            cursor.execute(
                "UPDATE marketplace_host AS h SET beat_at = r.beat_at, power_state = r.power_state, measured_w = r.measured_w,"
                " applied_generation = GREATEST(h.applied_generation, r.generation)"
                " FROM unnest(%s::text[], %s::timestamptz[], %s::text[], %s::int[], %s::bigint[])"
                " AS r(name, beat_at, power_state, measured_w, generation)"
                " WHERE h.site_id = %s AND h.name = r.name AND (h.beat_at IS NULL OR h.beat_at <= r.beat_at)",
                [
                    [h["name"] for h in hosts],
                    [h["beat_at"] for h in hosts],
                    [h["power_state"] for h in hosts],
                    [h.get("measured_w") for h in hosts],
                    [h.get("generation", 0) for h in hosts],
                    site_id,
                ],
            )
        if miners:
            # low_samples counts fresh readings in a row at or under 15 % of the top mode: what confirms a sleep.
            cursor.execute(
                "UPDATE marketplace_miner AS m SET measured_w = r.watts, measured_ghs = r.ghs, measured_at = r.at,"
                " applied_generation = GREATEST(m.applied_generation, r.generation),"
                " low_samples = CASE WHEN r.generation >= m.desired_generation AND m.desired_mode = 0"
                "   AND (m.changed_at IS NULL OR r.at > m.changed_at)"
                "   AND r.watts * 100 <= 15 * m.mode_watts[cardinality(m.mode_watts)] THEN LEAST(m.low_samples + 1, 100) ELSE 0 END"
                " FROM unnest(%s::text[], %s::bigint[], %s::int[], %s::int[], %s::timestamptz[]) AS r(name, generation, watts, ghs, at)"
                " WHERE m.site_id = %s AND m.name = r.name AND (m.measured_at IS NULL OR m.measured_at < r.at)",
                [
                    [m[0] for m in miners],
                    [m[2] for m in miners],
                    [m[3] for m in miners],
                    [m[4] for m in miners],
                    [m[5] for m in miners],
                    site_id,
                ],
            )
        if meters:
            cursor.execute(
                "WITH fresh AS (UPDATE marketplace_powernode AS n SET measured_w = r.watts, measured_at = r.at"
                " FROM unnest(%s::text[], %s::bigint[], %s::timestamptz[]) AS r(name, watts, at)"
                " WHERE n.site_id = %s AND n.name = r.name AND (n.measured_at IS NULL OR n.measured_at < r.at)"
                " RETURNING n.id, n.measured_at, n.measured_w) INSERT INTO marketplace_meterreading (node_id, at, watts)"
                " SELECT id, measured_at, measured_w FROM fresh ON CONFLICT DO NOTHING",
                [[m[0] for m in meters], [m[1] for m in meters], [m[2] for m in meters], site_id],
            )


def _events(agent: Agent, events: list[dict[str, Any]]) -> None:
    AgentEvent.objects.bulk_create(
        [
            AgentEvent(
                agent=agent,
                event_id=e["id"],
                at=e["at"],
                kind=e["kind"][:40],
                subject=str(e.get("subject", ""))[:80],
                data=e.get("data") or {},
            )
            for e in events
        ],
        ignore_conflicts=True,
    )


def desired(agent: Agent, report: dict[str, Any], *, now: datetime, inventory_wanted: bool = False) -> dict[str, Any]:
    """What shall be at the agent's site, in the shape of docs/agent-protocol.md."""
    site = Site.objects.get(pk=agent.site_id)
    hosts = Host.objects.filter(site=site).exclude(applied_generation=F("desired_generation"))
    miners = Miner.objects.filter(site=site, applied_generation__lt=F("desired_generation")).exclude(manual=True)
    return {
        "server_time": now,
        "generation": site.desired_generation,
        "lease_until": now + timedelta(seconds=settings.SITE_LEASE_SECONDS),
        "acknowledged_sequence": report["sequence"],
        "acknowledged_events": [e["id"] for e in report.get("events") or []],
        "mode": Site.Mode.HOLD if site.mode == Site.Mode.AUTO and power.frozen() else site.mode,
        "inventory_wanted": inventory_wanted,
        "placements": _desired_placements(site),
        "hosts": [
            {"name": name, "generation": generation, "power_state": state, "limits_w": limits}
            for name, generation, state, limits in hosts.values_list(
                "name", "desired_generation", "desired_power_state", "desired_limits_w"
            )
        ],
        "miners": [
            [name, names[mode], generation]
            for name, names, mode, generation in miners.values_list(
                "name", "mode_names", "desired_mode", "desired_generation"
            )
        ],
        "safety": _safety(site) if report.get("known_safety") != site.safety_generation else None,
    }


def _desired_placements(site: Site) -> list[dict[str, Any]]:
    live = (
        Placement.objects.filter(site=site, state__in=("intended", "shedding", *Placement.AT_SITE))
        .select_related("job", "host", "contract")
        .order_by("job_id", "attempt", "rank")
    )
    rows: list[Placement] = []
    gangs: dict[tuple[int, int], list[Placement]] = {}
    lack: set[tuple[int, int, int]] = set()  # placed together, and not all have their watts
    for row in live:
        if row.state not in Placement.AT_SITE:
            lack.add((row.job_id, row.attempt, row.epoch))
            continue
        rows.append(row)
        gangs.setdefault((row.job_id, row.attempt), []).append(row)
    return [_desired_placement(row, gangs[row.job_id, row.attempt]) for row in rows if _gang_is_here(row, gangs, lack)]


def _gang_is_here(
    row: Placement, gangs: dict[tuple[int, int], list[Placement]], lack: set[tuple[int, int, int]]
) -> bool:
    """A gang starts when all of it has its watts; members that already run stay listed. So do replicas that join one that runs,
    as soon as all that were placed with them have theirs.
    """
    if row.state not in {"granted", "unreachable"} or row.running_at or row.release_requested_at:
        return True
    if row.job.state == Job.State.RUNNING:
        return (row.job_id, row.attempt, row.epoch) not in lack
    return len(gangs[row.job_id, row.attempt]) >= row.job.replicas


def _desired_placement(row: Placement, gang: list[Placement]) -> dict[str, Any]:
    job = row.job
    shrunk = job.lost_ranks if job.on_replica_loss == Job.OnReplicaLoss.SHRINK else ()
    numbers = {rank: i for i, rank in enumerate(r for r in range(job.replicas) if r not in shrunk)}
    return {
        "id": row.public_id,
        "generation": row.generation,
        "desired": row.desired,
        "host": row.host.name,
        "gpus": row.gpu_indices,
        "gpu_milli": row.gpu_milli,
        "vcpu_milli": row.vcpu_milli,
        "ram_mib": row.ram_mib,
        "vram_mib": row.vram_mib,
        "job": job.public_id,
        "rank": numbers.get(row.rank, row.rank),
        "world_size": len(numbers),
        "gang": [p.public_id for p in gang if p.epoch == row.epoch],
        "epoch": job.epoch,
        "ranks": [
            {"rank": numbers[p.rank], "placement": p.public_id, "host": p.host.name} for p in gang if p.rank in numbers
        ],
        "master_host": gang[0].host.name,
        "command": job.command,
        "env": job.env,
        "secrets": unseal(job.secrets),
        "image": job.image,
        "grace_s": job.checkpoint_grace_s,
        "max_seconds": job.max_seconds,
        "organization": ids.encode("org", row.organization_id),
        "gives_way": _gives_way(row),
    }


_ORDER = (Kind.SPOT, Kind.FLEXIBLE, Kind.ON_DEMAND, Kind.RESERVED)


def _gives_way(row: Placement) -> list[int]:
    """Its place in the order in which work gives way to copper (docs/agent-protocol.md), lower first: spot by its bid, the lowest
    first; then flexible, on demand, reserved; of equals the youngest.
    """
    contract, limit = row.contract, row.job.price_limit
    bid = contract.limit_price or contract.price
    bid = bid if limit is None else min(bid, limit)
    spot = contract.kind == Kind.SPOT
    return [_ORDER.index(Kind(contract.kind)), bid if spot else 0, -int(row.created_at.timestamp()), -row.pk]


def _safety(site: Site) -> dict[str, Any]:
    """Caps, margins and the order in which to shed, for the loop that needs nothing outside the fence."""
    nodes = list(PowerNode.objects.filter(site=site).select_related("parent").order_by("depth", "pk"))
    calls: dict[int, list[Any]] = defaultdict(
        list
    )  # those to come: at their hour machines sleep, whether or not we are heard
    for call in Curtailment.objects.filter(site=site, state="announced", mandatory=True).order_by("starts_at", "pk"):
        calls[call.node_id].append([call.starts_at.timestamp(), call.ends_at.timestamp(), call.cap_w])
    worst_first = Miner.objects.filter(site=site).exclude(desired_mode=0)
    order = sorted(
        worst_first.values_list("name", "mode_watts", "mode_ghs", "desired_mode"),
        key=lambda m: (m[2][m[3]] / max(m[1][m[3]], 1), m[0]),
    )
    return {
        "generation": site.safety_generation,
        "nodes": [
            {
                "name": n.name,
                "parent": n.parent.name if n.parent else None,
                "cap_w": n.cap_w,
                "limit_w": n.limit_w,
                "calls": calls[n.pk],
                "margin_w": n.margin_w,
                "fixed_w": n.fixed_w,
                "overhead_gpu_permille": n.overhead_gpu_permille,
                "overhead_miner_permille": n.overhead_miner_permille,
            }
            for n in nodes
        ],
        "shed_order": [m[0] for m in order],
    }


def take_logs(agent: Agent, chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Store log chunks by byte offset; returns the next offset wanted for each (placement, stream) named."""
    wanted = sorted({(c["pk"], c["stream"]) for c in chunks})
    mine = set(
        Placement.objects.filter(pk__in=[pk for pk, _ in wanted], site_id=agent.site_id).values_list("pk", flat=True)
    )
    answer = []
    with transaction.atomic():
        for pk, stream in wanted:
            if pk not in mine:
                continue
            Placement.objects.select_for_update(no_key=True).only("pk").get(pk=pk)
            last = (
                LogChunk.objects.filter(placement_id=pk, stream=stream)
                .order_by("-offset")
                .values_list("offset", "size")
                .first()
            )
            end = sum(last) if last else 0
            for chunk in sorted(
                (c for c in chunks if (c["pk"], c["stream"]) == (pk, stream)), key=lambda c: c["offset"]
            ):
                end = _append(pk, stream, end, chunk["offset"], chunk["data"])
            answer.append({"placement": ids.encode("plc", pk), "stream": stream, "next": end, "offset": end})
    return answer


def _append(pk: int, stream: str, end: int, offset: int, text: str) -> int:
    data = text.encode()
    if offset > end or offset + len(data) <= end:
        return end
    fresh = data[end - offset :]
    kept = b"" if end >= LOG_CAP_BYTES else fresh[: LOG_CAP_BYTES - end]
    shown = kept.decode(errors="replace").replace("\x00", "\ufffd")
    if kept and end + len(fresh) >= LOG_CAP_BYTES:
        shown += LOG_NOTICE
    LogChunk.objects.create(placement_id=pk, stream=stream, offset=end, size=len(fresh), data=shown)
    return end + len(fresh)

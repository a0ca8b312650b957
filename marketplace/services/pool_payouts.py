"""What pools say that they paid: asked for over HTTP, each payout a receipt once, so that the P&L has it beside what was expected.

    GET URL?since=2027-03-01T00:00:00Z          Authorization: Bearer SECRET, where the feed has one
    {"payouts": [{"id": "8211", "start": "2027-03-01T00:00:00Z", "end": "2027-03-02T00:00:00Z", "sat": 1204417, "usd": "1091.73"}]}

`id` is the pool's own, never used again; `[start, end)` the time that was worked; `usd` may be missing and is then worked out at the
price of bitcoin as it was at `end`. The receipt's source is the feed's name. `since` goes back `BACK`, so that what could not be taken
comes again. A payout of zero, for a time that is not over, or with other figures than before is refused and named in the feed's
`error`; the others are taken. A failed poll changes nothing. Where nothing newer is paid for `stale_after_s` the feed is overdue, and
where it is overdue or a payout is refused its operator gets one mail.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal, InvalidOperation
from typing import Any

import httpx
from django.db import IntegrityError, transaction
from django.utils import timezone

from marketplace import outbox
from marketplace.errors import MarketError
from marketplace.models import FeedValue, PoolFeed, Receipt, Site
from marketplace.services import audit, feeds, mails, outbound, receipts, secrets
from marketplace.tenancy import Actor

ASK = "marketplace.ask_pool"
TROUBLE = "marketplace.pool_trouble"
TOLD = ("owner", "admin", "engineer", "billing")
FIELDS = ("url", "enabled", "poll_s", "stale_after_s")
BACK = timedelta(days=32)
TIMEOUT_S = 10
MOST_PAYOUTS = 1000
SAT = 10**8
MOST_SAT = 21 * 10**14
MICRO = 1_000_000


class RefusedPayoutError(ValueError):
    """One payout that is no receipt, in words for the feed's `error`."""


@dataclass(frozen=True)
class Payout:
    """`sat` for `[start, end)`; `microusd` None: the pool names no dollars."""

    id: str
    start: datetime
    end: datetime
    sat: int
    microusd: int | None


# --- the rows
def add(actor: Actor, site: Site, *, name: str, url: str, now: datetime, secret: str = "", **values: Any) -> PoolFeed:
    """A feed of one pool for a site. MarketError names every field that is wrong; conflict where the site has one of that name."""
    row = PoolFeed(site=site, name=name.strip(), created_by=actor.label[:120], created_at=now)
    if not row.name:
        raise MarketError("invalid_request", "name: is needed", {"/name": "is needed"})
    with transaction.atomic():
        _write(row, {"url": url, **values}, secret)
        _audit(actor, "added", row, now, after={"name": row.name, "url": url, **values, **_sealed(secret)})
    return row


def update(actor: Actor, row: PoolFeed, *, now: datetime, secret: str = "", **values: Any) -> PoolFeed:
    """Change it; it is asked anew at once."""
    with transaction.atomic():
        row = PoolFeed.objects.select_for_update(no_key=True, of=("self",)).select_related("site").get(pk=row.pk)
        before = {name: getattr(row, name) for name in values if name in FIELDS}
        row.asked_at, row.error = None, ""
        _write(row, values, secret)
        _audit(actor, "changed", row, now, before=before, after={**values, **_sealed(secret)})
    return row


def remove(actor: Actor, row: PoolFeed, *, now: datetime) -> None:
    """Its receipts stay."""
    with transaction.atomic():
        _audit(actor, "removed", row, now)
        row.delete()


def _write(row: PoolFeed, values: dict[str, Any], secret: str) -> None:
    wrong = {
        f"/{name}": "a pool feed has no such field, or it cannot be changed" for name in values if name not in FIELDS
    }
    for name, value in values.items():
        if name in FIELDS:
            setattr(row, name, value)
    if why := outbound.refused(row.url):
        wrong["/url"] = why
    for name, low, high in (("poll_s", 60, 86_400), ("stale_after_s", 3600, 40 * 86_400)):
        if not low <= getattr(row, name) <= high:
            wrong[f"/{name}"] = f"{low} to {high}"
    if wrong:
        raise MarketError("invalid_request", "; ".join(f"{k.strip('/')}: {v}" for k, v in wrong.items()), wrong)
    if secret:
        row.secret = secrets.seal({"bearer": secret})
    try:
        with transaction.atomic():
            row.save()
    except IntegrityError as error:
        raise MarketError(
            "conflict", f"The site has a feed of {row.name!r} already; change that one.", {"/name": "is taken"}
        ) from error


def _sealed(secret: str) -> dict[str, str]:
    return {"secret": "new"} if secret else {}


def _audit(actor: Actor, what: str, row: PoolFeed, now: datetime, **said: Any) -> None:
    audit.record(actor, f"pool_feed.{what}", row.public_id, now=now, organization_id=row.site.organization_id, **said)


# --- the clock
def tick(now: datetime) -> int:
    """A message for every feed to look at, so that one that does not answer holds up nobody; returns how many."""
    rows = [row for row in PoolFeed.objects.filter(enabled=True).order_by("pk") if _due(row, now) or overdue(row, now)]
    for row in rows:
        outbox.emit(ASK, key=str(row.pk), payload={"feed": row.pk})
    return len(rows)


def ask(feed_id: int, *, now: datetime) -> int:
    """Look at one feed: ask it, if it is due, and tell its operator of trouble that begins. Returns the payouts that are new."""
    row = PoolFeed.objects.select_related("site").filter(pk=feed_id, enabled=True).first()
    if row is None:
        return 0
    new, wrong = pull(row, now=now)
    _judge(row.pk, now, refused=bool(wrong))
    return new


def _due(row: PoolFeed, now: datetime) -> bool:
    return row.asked_at is None or now - row.asked_at >= timedelta(seconds=row.poll_s)


def pull(row: PoolFeed, *, now: datetime) -> tuple[int, list[str]]:
    """Ask it, if it is due and nobody else has just asked it; what it says that is new becomes receipts. Returns (how many, what
    was refused, in words).
    """
    mine = PoolFeed.objects.filter(pk=row.pk, asked_at=row.asked_at)  # a rival that has read the same finds it moved
    if not _due(row, now) or not mine.update(asked_at=now):
        return 0, []
    try:
        said = _ask(row, now - BACK)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        PoolFeed.objects.filter(pk=row.pk).update(error=f"no answer that can be understood: {error}"[:400])
        return 0, []
    new, wrong, until = 0, [], row.paid_until
    for raw in said:
        try:
            payout = read(raw)
            new += _take(row, payout, now)
        except (RefusedPayoutError, MarketError) as error:
            wrong.append(str(error))
            continue
        until = max(filter(None, (until, payout.end)))
    heard = {} if wrong else {"heard_at": now}
    PoolFeed.objects.filter(pk=row.pk).update(error="; ".join(wrong)[:400], paid_until=until, **heard)
    return new, wrong


def _ask(row: PoolFeed, since: datetime) -> list[Any]:
    """Raises httpx.HTTPError or ValueError, in words that hold no secret."""
    bearer = secrets.unseal(row.secret).get("bearer", "")
    headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}
    with outbound.client(TIMEOUT_S) as http:
        answer = http.get(
            row.url, params={**httpx.URL(row.url).params, "since": f"{since:%Y-%m-%dT%H:%M:%SZ}"}, headers=headers
        )
    if answer.status_code != httpx.codes.OK:
        raise ValueError(f"HTTP {answer.status_code}")
    body = outbound.read_json(answer)
    said = body.get("payouts") if isinstance(body, dict) else None
    if not isinstance(said, list):
        raise ValueError("an answer without a list of payouts")  # noqa: TRY004 - it is about their answer
    if len(said) > MOST_PAYOUTS:
        raise ValueError(f"{len(said)} payouts; {MOST_PAYOUTS} at most, and none that ended before `since`")
    return said


def read(raw: Any) -> Payout:
    """One payout of the answer. Raises RefusedPayoutError: which, what is wrong with it."""
    name = str(raw.get("id", ""))[:80] if isinstance(raw, dict) else ""
    try:
        found = Payout(name, _time(raw["start"]), _time(raw["end"]), _sat(raw["sat"]), _microusd(raw.get("usd")))
    except (KeyError, TypeError, ValueError, InvalidOperation) as error:
        raise RefusedPayoutError(f"payout {name or '?'}: {error!s} cannot be read") from error
    if not name or name != str(raw["id"]):
        raise RefusedPayoutError("a payout without an id, or with one of more than 80 characters")
    if not 0 < found.sat <= MOST_SAT or found.microusd == 0:
        raise RefusedPayoutError(f"payout {name}: pays {found.sat} sat{', 0 USD' if found.microusd == 0 else ''}")
    return found


def _time(text: Any) -> datetime:
    found = datetime.fromisoformat(text)
    if found.tzinfo is None:
        raise ValueError(f"{text} (without an offset from UTC)")
    return found


def _sat(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"sat {value!r}")  # noqa: TRY004 - it is about their answer
    return value


def _microusd(value: Any) -> int | None:
    """Dollars as text or a whole number, never a float's rounding; parts of a millionth are cut."""
    if value is None:
        return None
    if isinstance(value, (bool, float)):
        raise ValueError(f"usd {value!r} (write it as text)")  # noqa: TRY004 - it is about their answer
    amount = Decimal(value) * MICRO
    if not amount.is_finite() or not 0 <= amount <= 10**15:
        raise ValueError(f"usd {value!r}")
    return int(amount)


def _take(row: PoolFeed, payout: Payout, now: datetime) -> bool:
    """Whether it is new. Raises MarketError where the receipt is refused, RefusedPayoutError where it is another than before."""
    known = Receipt.objects.filter(site=row.site_id, source=row.name, reference=payout.id).first()
    microusd = payout.microusd
    if microusd is None and known is not None:
        microusd = known.amount_microusd  # worked out once
    if microusd is None:
        microusd = payout.sat * _btc_microusd(payout) // SAT
    figures = {
        "kind": Receipt.Kind.HASHING, "start": payout.start, "end": payout.end, "amount_sat": payout.sat, "amount_microusd": microusd,
    }  # fmt: skip
    if known is not None:
        differs = [name for name, value in figures.items() if getattr(known, name) != value]
        if differs:
            raise RefusedPayoutError(
                f"payout {payout.id}: another {', '.join(differs)} than on record ({known.public_id})"
            )
        return False
    actor = Actor(kind="system", organization_id=row.site.organization_id, label=f"pool feed {row.public_id}")
    try:
        receipts.receive(row.site, actor=actor, now=now, source=row.name, reference=payout.id, **figures)
    except MarketError as error:
        raise RefusedPayoutError(f"payout {payout.id}: {error.detail}") from error
    return True


def _btc_microusd(payout: Payout) -> int:
    """Of one bitcoin at the payout's end. Raises RefusedPayoutError where no price of that hour is known."""
    age = feeds.MAX_AGE[FeedValue.Kind.BTC_USD]
    prices = FeedValue.objects.filter(
        kind=FeedValue.Kind.BTC_USD, observed_at__lte=payout.end, observed_at__gt=payout.end - age
    )
    price = prices.order_by("-observed_at").first()
    if price is None:
        raise RefusedPayoutError(f"payout {payout.id}: names no usd, and no price of bitcoin at its end is known")
    return int(price.value) * 10_000


# --- trouble
def overdue(row: PoolFeed, now: datetime) -> bool:
    """Nothing newer was paid for longer than it may take, whatever the reason."""
    return row.enabled and now - (row.paid_until or row.created_at) > timedelta(seconds=row.stale_after_s)


def _judge(pk: int, now: datetime, *, refused: bool) -> None:
    """One mail when trouble begins, none while it lasts. A poll that failed is none yet: the next may not."""
    with transaction.atomic():
        row = PoolFeed.objects.select_for_update(no_key=True).get(pk=pk)
        trouble = refused or overdue(row, now)
        if trouble and row.told_at is None:
            PoolFeed.objects.filter(pk=pk).update(told_at=now)
            outbox.emit(TROUBLE, key=f"{pk}-{int(now.timestamp())}", payload={"feed": pk})
        elif not trouble and not row.error and row.told_at is not None:
            PoolFeed.objects.filter(pk=pk).update(told_at=None)


def tell_operator(feed_id: int) -> None:
    """The mail. Twice is no harm; of a feed that is gone nobody wants to know."""
    row = PoolFeed.objects.select_related("site").filter(pk=feed_id).first()
    if row is not None:
        mails.send(mails.addresses(row.site.organization_id, TOLD), letter(row, timezone.now()))


def letter(row: PoolFeed, now: datetime) -> mails.Letter:
    late = overdue(row, now)
    said = []
    if late:
        last = (
            f"The newest payout is for the time until {row.paid_until:%-d %b %Y %H:%M} UTC."
            if row.paid_until
            else "None was ever seen."
        )
        said.append(f"{row.name} has told of no newer payout for {row.stale_after_s // 3600} hours. {last}")
    if row.error:
        said.append(f"What it says now: {row.error}.")
    said.append(
        "What was paid stands beside what was expected on the site's page of profit and loss; nothing is guessed in between."
    )
    return mails.Letter(
        subject=f"{row.name} at {row.site.name}: {'payouts are overdue' if late else 'a payout was refused'}",
        paragraphs=tuple(said),
        facts=(("Site", row.site.name), ("Feed", row.public_id)),
        path=f"/operator/marketplace/poolfeed/{row.pk}/change/",
        label="The feed",
        why="You get this because your organization runs the site.",
    )

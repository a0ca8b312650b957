"""Mails of the forward market: to holders about their offers, to bidders about their bids."""

from typing import Any

from billing.core import money
from marketplace.models import Quote, Resale, StandingBid
from marketplace.services import mails, quotes

TOLD = ("owner", "admin", "billing")
OF_RESALE = {
    "sold": "{gpus} GPUs of your offer {id} are sold",
    "undone": "{gpus} GPUs of your offer {id} were not paid by their buyer",
    "expired": "Your offer {id} has expired",
}
OF_BID = {
    "quoted": "Your bid {id} has a quote",
    "bought": "Your bid {id} has bought {gpus} GPUs",
    "expired": "Your bid {id} has expired",
}


def send(payload: dict[str, Any]) -> None:
    """What a message of the outbox says. Twice is no harm."""
    if "resale" in payload:
        of_resale(Resale.objects.get(pk=payload["resale"]), payload["what"], payload["gpus"])
    else:
        bid = StandingBid.objects.get(pk=payload["bid"])
        quote = Quote.objects.filter(pk=payload.get("quote") or 0).select_related("listing").first()
        of_bid(bid, payload["what"], payload["gpus"], quote)


def of_resale(resale: Resale, what: str, gpus: int) -> None:
    price = money.format_minor(
        quotes.total_minor(1, resale.starts_at, resale.ends_at, resale.price, resale.currency), resale.currency
    )
    text = {
        "sold": f"They are their buyer's from {resale.starts_at:%-d %b %Y %H:%M} to {resale.ends_at:%-d %b %H:%M} UTC. Each brings "
        f"{price} less the fee of {resale.fee_permille / 10:g} %, credited on your invoices as the window is billed. "
        "Jobs of yours that still stand there when it begins get their checkpoint signal and queue again.",
        "undone": "The sale is undone and nothing was credited. "
        + ("They are on offer again." if resale.state == Resale.State.OPEN else "They are yours again."),
        "expired": f"{resale.gpu_count - resale.sold_gpus} of {resale.gpu_count} GPUs found no buyer and are yours again.",
    }[what]
    _mail(
        resale.organization_id,
        OF_RESALE[what].format(id=resale.public_id, gpus=gpus),
        text,
        f"/resales/{resale.public_id}",
    )


def of_bid(bid: StandingBid, what: str, gpus: int, quote: Quote | None) -> None:
    where = f"/bids/{bid.public_id}"
    text = f"It looked for {bid.gpu_count} GPUs and has {bid.filled_gpus}. {bid.note}"
    if quote is not None:
        until = quote.ends_at or quote.starts_at
        text = (
            f"{gpus} GPUs from {quote.starts_at:%-d %b %Y %H:%M} to {until:%-d %b %Y %H:%M} UTC at "
            f"{quote.price / money.MILLIONTHS:g} {quote.currency} per GPU-hour. "
        )
        if what == "quoted":
            text += f"The price is firm until {quote.firm_until:%H:%M} UTC; accept it before somebody else does."
            where = f"/quotes/{quote.public_id}"
        else:
            text += "It was accepted as your bid says."
    _mail(bid.organization_id, OF_BID[what].format(id=bid.public_id, gpus=gpus), text, where)


def _mail(organization_id: int, subject: str, text: str, path: str) -> None:
    why = "You get this as one of the people of your organization who answer for its contracts."
    mails.send(mails.addresses(organization_id, TOLD), mails.Letter(subject, (text,), path=path, why=why))

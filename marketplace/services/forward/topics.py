"""Messages of the forward market: a book to be looked at again, and what its people are told."""

from marketplace import outbox
from marketplace.models import StandingBid

MATCH = "marketplace.match_bids"
TOLD = "marketplace.forward_notice"
UNDO = "marketplace.undo_sale"


def nudge_book(livemode: bool, gpu_model_id: int | None, region: str) -> None:
    """Something in this book has changed: where bids stand in it, they are matched after the commit, once however many say so."""
    bids = StandingBid.objects.filter(livemode=livemode, gpu_model=gpu_model_id, region=region, state="open")
    if gpu_model_id is not None and bids.exists():
        outbox.emit(
            MATCH, key=f"{int(livemode)}-{gpu_model_id}-{region}"[:120],
            payload={"livemode": livemode, "gpu_model": gpu_model_id, "region": region},
        )  # fmt: skip

"""What an organization is told of its screening: where each check stands, what is asked of it, and the mails about that."""

from dataclasses import dataclass
from datetime import datetime

from marketplace.models import Organization, Screening
from marketplace.services import mails
from marketplace.services.screening.records import facts_of, missing
from marketplace.services.screening.rule import PAGE

Kind, State = Screening.Kind, Screening.State
ROLES = ("owner", "admin")
CHECKS = {
    Kind.BUSINESS: "the business is what it says it is",
    Kind.SANCTIONS: "neither it nor its owners stand on a list of sanctions",
    Kind.EXPORT: "export-controlled GPUs may be used where and as it means to",
}
WORDS = {
    "legal_name": "legal name",
    "registration_number": "registration number",
    "address": "registered address",
    "beneficial_owners": "beneficial owners",
    "end_use": "what the GPUs are used for",
    "end_use_countries": "countries of use",
}


@dataclass(frozen=True)
class Standing:
    """One check in its organization's words. `asked`: fields of the profile that it lacks; `waits`: the provider does not answer."""

    kind: str
    what: str
    state: str
    summary: str
    asked: tuple[str, ...] = ()
    message: str = ""
    waits: bool = False
    changed_at: datetime | None = None
    valid_until: datetime | None = None


def standing(organization: Organization) -> list[Standing]:
    """All checks, also those that have not begun. A test tenant has none."""
    if not organization.livemode:
        return []
    rows = {row.kind: row for row in Screening.objects.owned_by(organization.pk)}
    facts = facts_of(organization)
    return [_standing(kind, rows.get(kind), tuple(missing(kind, facts))) for kind in Kind.values]


def _standing(kind: str, row: Screening | None, lacks: tuple[str, ...]) -> Standing:
    what = CHECKS[Kind(kind)]
    if row is None or (row.state in {State.PENDING, State.EXPIRED} and lacks):
        state = row.state if row else State.PENDING.value
        asked = (
            f"Tell us {_list([WORDS[name] for name in lacks])}."
            if lacks
            else "It begins when you tell of your business."
        )
        return Standing(kind, what, state, asked, lacks)
    waits = row.ask_at is not None and row.failures > 0
    said = {
        State.PENDING: "The screening service does not answer just now; we ask again by ourselves." if waits else "It is being checked.",
        State.CLEAR: f"Passed; counts until {row.valid_until:%-d %b %Y}." if row.valid_until else "Passed.",
        State.REVIEW: "One of our own people looks at it.",
        State.REJECTED: "It did not pass. Nothing new can be booked; what runs goes on until we have spoken with you.",
        State.EXPIRED: "It has expired and is asked again.",
    }[State(row.state)]  # fmt: skip
    return Standing(
        kind, what, row.state, said, lacks, row.message, waits, row.changed_at,
        row.valid_until if row.state == State.CLEAR else None,
    )  # fmt: skip


def _list(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


SUBJECTS = {
    "asked": "Tailrace asks {name} for a few facts",
    "clear": "{name} has passed its checks",
    "review": "{name}: one of our own people looks at a check",
    "rejected": "{name}: a check did not pass",
    "expired": "{name}: a check has expired",
}
FIRST = {
    "asked": "Before you sign reserved, flexible or large contracts, or are paid out, we check whom we deal with. It needs a few facts "
    "of you.",
    "clear": "Every check has passed: all kinds and sizes of contracts can be signed.",
    "review": "A check could not be answered by a machine. One of our own people looks at it, usually within two working days. What "
    "runs goes on, and small contracts can be signed meanwhile.",
    "rejected": "Nothing new can be booked, run or paid out for now. What runs goes on: nothing is ended without our having spoken "
    "with you.",
    "expired": "A check that had passed has expired before it could be answered again. What runs goes on; new reserved, flexible or "
    "large contracts wait for it.",
}


def send_notice(organization_id: int, what: str) -> None:
    """The mail, of how things stand by now. Nothing where it has changed back meanwhile."""
    organization = Organization.objects.get(pk=organization_id)
    found = standing(organization)
    states = {row.state for row in found}
    stale = {
        "clear": states != {State.CLEAR.value},
        "asked": not any(row.asked or row.message for row in found),
    }.get(what, what not in states)
    if stale:
        return
    asked = tuple(row.message for row in found if row.message)
    letter = mails.Letter(
        SUBJECTS[what].format(name=organization.name),
        (FIRST[what], *asked),
        tuple((row.kind.title(), f"{row.state}. {row.summary}") for row in found),
        PAGE,
        "See what is asked" if what in {"asked", "rejected"} else "See the checks",
        f"You get this as an owner or admin of {organization.name}.",
    )
    mails.send(mails.addresses(organization_id, ROLES), letter)

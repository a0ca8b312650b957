"""Who answers a screening's question: one narrow interface, `ask(question, ticket) -> Answer`.

    manual   everything goes to our own people
    list     a file of denied parties on this machine (see lists.py); the business itself goes to our own people
    http     a screening service over HTTP (see remote.py)

A provider never rejects anybody: what is not plainly clear goes to a person, with its evidence.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from django.conf import settings

Outcome = Literal["clear", "hit", "person", "waiting"]


@dataclass(frozen=True)
class Question:
    """`reference` is new for each round, so that a service may take it as the question's idempotency key."""

    reference: str
    kind: str  # of Screening.Kind
    facts: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """clear; hit: something was found; person: it cannot say; waiting: ask again with `ticket`."""

    outcome: Outcome
    reason: str = ""
    evidence: dict[str, Any] = field(default_factory=dict)
    ticket: str = ""


class Unavailable(Exception):  # noqa: N818 - names the state, as in HTTP 503
    """No answer, or none that can be understood: ask again later. The text says why, and holds no secret."""


class Provider(Protocol):
    name: str

    @property
    def version(self) -> str:
        """Of its lists, where it knows one: when it changes, everybody is asked about again."""

    def ask(self, question: Question, ticket: str) -> Answer:
        """`ticket`: what an earlier `waiting` of the same question named, else empty. Raises Unavailable."""


class Manual:
    name = "manual"
    version = ""

    def ask(self, question: Question, ticket: str) -> Answer:  # noqa: ARG002
        return Answer("person", "one of our own people looks at each")


def current() -> Provider:
    """The one that the setting SCREENING_PROVIDER names."""
    from marketplace.services.screening import lists, remote

    made: dict[str, Any] = {"manual": Manual, "list": lists.ListFile, "http": remote.Http}
    provider: Provider = made[settings.SCREENING_PROVIDER]()
    return provider

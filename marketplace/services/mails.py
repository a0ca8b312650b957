"""Mails: one letter, one pair of templates (text and HTML), whatever it is about.

Who wants to mail leaves an outbox message in the transaction of the cause; its handler builds a `Letter` from the rows as they are
then and calls `send`. A handler may run twice, so a mail may come twice: it says what is, and asks for nothing that could not be
done twice.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from django.conf import settings
from django.core.mail import EmailMultiAlternatives
from django.template.loader import render_to_string

from marketplace.models import Membership


@dataclass(frozen=True)
class Letter:
    """`facts`: (name, value) pairs; `path`: of the page that `label` leads to; `why`: why the reader gets it."""

    subject: str
    paragraphs: tuple[str, ...]
    facts: tuple[tuple[str, str], ...] = ()
    path: str = "/"
    label: str = "Open it"
    why: str = ""


def addresses(organization_id: int, roles: Iterable[str]) -> list[str]:
    """Of the people who have one of these roles in the organization, in order of the alphabet."""
    people = Membership.objects.filter(organization_id=organization_id, role__in=list(roles), user__is_active=True)
    return sorted(people.values_list("user__email", flat=True).distinct())


def render(letter: Letter) -> tuple[str, str]:
    """(text, HTML)."""
    link = letter.path if "://" in letter.path else settings.PUBLIC_URL + letter.path
    context = {"letter": letter, "link": link, "home": settings.PUBLIC_URL}
    text = render_to_string("mail/letter.txt", context)
    return text.strip() + "\n", render_to_string("mail/letter.html", context)


def send(to: Iterable[str], letter: Letter, *, headers: dict[str, str] | None = None) -> int:
    """One mail to each address (nobody sees the others'); how many were sent."""
    text, html = render(letter)
    sent = 0
    for address in to:
        subject = " ".join(letter.subject.split())
        mail = EmailMultiAlternatives(subject, text, settings.DEFAULT_FROM_EMAIL, [address], headers=headers)
        mail.attach_alternative(html, "text/html")
        sent += mail.send()
    return sent

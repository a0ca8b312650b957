"""Who: people, organizations, their members and keys, and clients that speak for them."""

from collections.abc import Iterable
from datetime import timedelta
from typing import Any

from rest_framework.test import APIClient

from marketplace.models import ApiKey, BillingStanding, Membership, Organization, Screening, TermsAcceptance, User
from marketplace.services import documents
from marketplace.services.tokens import digest
from marketplace.tenancy import SCOPES, Actor
from tests.factories.rows import NOW, number

YEARS = timedelta(days=3650)


def user(email: str | None = None, *, password: str | None = None, **fields: Any) -> User:
    """Without a password nobody can log in by form (hashing is slow on purpose); `client(user=...)` works all the same."""
    return User.objects.create_user(email or f"person{next(number)}@example.org", password, **fields)


def staff(**fields: Any) -> User:
    return user(is_staff=True, is_superuser=True, **fields)


def organization(
    name: str | None = None,
    *,
    standing: str = "good",
    available_minor: int = 10_000_000,
    terms: bool = True,
    screened: bool = True,
    **fields: Any,
) -> Organization:
    """A customer with a good card that accepted the terms and passed its checks, unless told otherwise. It has no members: see
    `member`.
    """
    if screened:
        fields = {"verification": Organization.Verification.VERIFIED, **fields}
    made = Organization.objects.create(name=name or f"Organization {next(number)}", **fields)
    if screened and made.livemode:
        Screening.objects.bulk_create(
            Screening(
                organization=made, kind=kind, state="clear", provider="factory", changed_at=NOW, valid_until=NOW + YEARS,
                renew_at=NOW + YEARS, facts={"name": made.name, "country": made.country},
            )
            for kind in Screening.Kind.values
        )  # fmt: skip
    BillingStanding.objects.create(organization=made, state=standing, available_minor=available_minor, updated_at=NOW)
    if terms:
        TermsAcceptance.objects.create(
            organization=made, version=documents.CURRENT, digest="", accepted_at=NOW, accepted_by="factory"
        )
    return made


def member(organization: Organization, role: str = "owner", person: User | None = None) -> Membership:
    return Membership.objects.create(user=person or user(), organization=organization, role=role)


def actor(organization: Organization, role: str = "owner") -> Actor:
    """An Actor for calls of services; makes no rows."""
    return Actor(
        kind="user",
        organization_id=organization.pk,
        role=role,
        livemode=organization.livemode,
        label=f"{role}@example.org",
    )


def key(organization: Organization, scopes: Iterable[str] = SCOPES, **fields: Any) -> tuple[ApiKey, str]:
    """(row, token)."""
    n = next(number)
    token = f"tr_{'live' if organization.livemode else 'test'}_factory{n:036d}"
    fields = {"name": f"key {n}", "prefix": f"tr_{n:013d}", **fields}
    return ApiKey.objects.create(organization=organization, digest=digest(token), scopes=list(scopes), **fields), token


def client(
    organization: Organization | None = None,
    role: str = "owner",
    *,
    key: str | None = None,
    user: User | None = None,
    agent: str | None = None,
) -> APIClient:
    """An API client: a new member of `organization`, or an API key's token, or a person, or an agent's key, or nobody."""
    made = APIClient()
    if key or agent:
        made.credentials(HTTP_AUTHORIZATION=f"Bearer {key or agent}")
    elif user is not None:
        made.force_login(user)
    elif organization is not None:
        made.force_login(member(organization, role).user)
    return made

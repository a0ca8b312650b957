"""Organizations, their people, their keys, and what billing lets them do. The only writer of these rows."""

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

from django.db import transaction
from django.db.models import QuerySet

from marketplace import actors
from marketplace.errors import MarketError
from marketplace.locks import Lock, acquire
from marketplace.models import ApiKey, BillingStanding, Invitation, Job, Membership, Organization, User
from marketplace.outbox import emit
from marketplace.services import audit, jobs, screening, tokens
from marketplace.tenancy import ROLES, SCOPES, SYSTEM, Actor

INVITATION_DAYS = 7
MOST_GPUS = 100_000  # of an organization
PREFIX_LENGTH = 16  # of a key: `tr_live_` and 8 characters, shown in lists and logs


def actor_for(user: User, organization: Organization, role: str = "owner") -> Actor:
    """The actor that `user` is in that organization."""
    return Actor(
        kind="user",
        organization_id=organization.pk,
        role=role,
        user_id=user.pk,
        livemode=organization.livemode,
        label=user.email,
    )


@transaction.atomic
def create_organization(
    user: User,
    *,
    name: str,
    country: str = "US",
    currency: str = "USD",
    is_customer: bool = True,
    is_operator: bool = False,
    livemode: bool = True,
    now: datetime,
) -> Organization:
    """A new tenant with `user` as its owner and no card yet; billing opens its account after the commit."""
    if not (is_customer or is_operator):
        raise MarketError(
            "invalid_request", "An organization is a customer, an operator or both.", {"/is_customer": "choose one"}
        )
    organization = Organization.objects.create(
        name=name,
        country=country.upper(),
        currency=currency.upper(),
        is_customer=is_customer,
        is_operator=is_operator,
        livemode=livemode,
    )
    Membership.objects.create(user=user, organization=organization, role="owner")
    BillingStanding.objects.create(organization=organization, state=BillingStanding.State.NO_CARD, updated_at=now)
    emit("billing.open_account", key=str(organization.pk), payload={"organization": organization.pk})
    audit.record(
        actor_for(user, organization),
        "organization.created",
        organization.public_id,
        now=now,
        after={"name": name, "is_customer": is_customer, "is_operator": is_operator, "livemode": livemode},
    )
    return organization


@transaction.atomic
def update_organization(organization: Organization, *, actor: Actor, now: datetime, **changes: Any) -> Organization:
    """Change name, country, is_customer or is_operator. An organization never becomes neither. Its screening hears of it."""
    acquire((Lock.ORG, organization.pk))
    organization.refresh_from_db()
    assert set(changes) <= {"name", "country", "is_customer", "is_operator"}, changes
    before = {field: getattr(organization, field) for field in changes}
    for field, value in changes.items():
        setattr(organization, field, value)
    if not (organization.is_customer or organization.is_operator):
        raise MarketError(
            "invalid_request", "An organization is a customer, an operator or both.", {"/is_customer": "choose one"}
        )
    organization.save(update_fields=list(changes))
    audit.record(
        actor,
        "organization.updated",
        organization.public_id,
        now=now,
        organization_id=organization.pk,
        before=before,
        after=changes,
    )
    screening.refresh(organization, actor=actor, now=now)
    return organization


@transaction.atomic
def set_gpu_limit(
    organization: Organization, limit: int, *, seen: int, actor: Actor, reason: str, now: datetime
) -> Organization:
    """Most GPUs that may run or be held at once, by our own people. `seen`: the limit that was looked at.

    A higher one counts from now on: what waits for it is planned anew. A lower one takes nothing away: what is held stays, nothing is
    added. MarketError: forbidden, conflict where somebody else has changed it, invalid_request.
    """
    if actor.kind != "staff":
        raise MarketError("forbidden", "Our own people change an organization's limit: write to us.")
    if not 0 <= limit <= MOST_GPUS:
        raise MarketError("invalid_request", f"gpu_limit is {limit}", {"/gpu_limit": f"0 to {MOST_GPUS:,}"})
    acquire((Lock.ORG, organization.pk))
    if not Organization.objects.filter(pk=organization.pk, gpu_limit=seen).update(gpu_limit=limit):
        organization.refresh_from_db()
        raise MarketError("conflict", f"The limit is {organization.gpu_limit} by now; look again.")
    organization.refresh_from_db()
    if limit != seen:
        audit.record(
            actor,
            "organization.limit_changed",
            organization.public_id,
            now=now,
            organization_id=organization.pk,
            before={"gpu_limit": seen},
            after={"gpu_limit": limit, "reason": reason},
        )
    if limit > seen:
        waiting = Job.objects.filter(organization=organization, state__in=Job.WAITING)
        for cell_id in sorted(set(waiting.order_by().values_list("cell_id", flat=True))):
            jobs.nudge_cell(cell_id)
    return organization


def organizations_of(user: User) -> QuerySet[Membership]:
    """The person's memberships with their organizations, oldest first."""
    return Membership.objects.filter(user=user).select_related("organization").order_by("id")


@transaction.atomic
def switch_organization(user: User, organization_id: int, *, session: Any, now: datetime) -> Membership:
    """Choose in which organization this session acts; `not_found` where the person is no member."""
    found = Membership.objects.filter(user=user, organization_id=organization_id).select_related("organization").first()
    if found is None:
        raise MarketError("not_found", "You are not a member of that organization.")
    session[actors.SESSION_KEY] = organization_id
    audit.record(
        actor_for(user, found.organization, found.role),
        "organization.switched",
        found.organization.public_id,
        now=now,
    )
    return found


# --- people
@transaction.atomic
def invite(organization: Organization, *, email: str, role: str, actor: Actor, now: datetime) -> tuple[Invitation, str]:
    """(row, token); the token is shown once and is good for 7 days, for that address only."""
    _check_role(actor, role)
    address = email.strip().lower()
    if Membership.objects.filter(organization=organization, user__email__iexact=address).exists():
        raise MarketError("already_member", f"{address} belongs to {organization.name} already.")
    token = tokens.new("inv_")
    row = Invitation.objects.create(
        organization=organization,
        email=address,
        role=role,
        digest=tokens.digest(token),
        expires_at=now + timedelta(days=INVITATION_DAYS),
    )
    audit.record(
        actor,
        "invitation.created",
        row.public_id,
        now=now,
        organization_id=organization.pk,
        after={"email": address, "role": role},
    )
    return row, token


@transaction.atomic
def withdraw_invitation(invitation: Invitation, *, actor: Actor, now: datetime) -> None:
    """Delete one that nobody has accepted yet."""
    gone, _ = Invitation.objects.filter(pk=invitation.pk, accepted_at=None).delete()
    if not gone:
        raise MarketError("invitation_invalid", "It has been accepted; remove the member instead.")
    audit.record(
        actor,
        "invitation.withdrawn",
        invitation.public_id,
        now=now,
        organization_id=invitation.organization_id,
        before={"email": invitation.email, "role": invitation.role},
    )


@transaction.atomic
def accept_invitation(user: User, token: str, *, now: datetime) -> Membership:
    """Join by a token that was sent to the person's own address; it works once."""
    row = Invitation.objects.filter(digest=tokens.digest(token)).select_related("organization").first()
    if row is None or row.email != user.email.lower():
        raise MarketError("invitation_invalid", "Log in with the address that was invited, or ask for a new one.")
    acquire((Lock.ORG, row.organization_id))
    taken = Invitation.objects.filter(pk=row.pk, accepted_at=None, expires_at__gt=now).update(accepted_at=now)
    if not taken:
        raise MarketError("invitation_invalid", "It was used or has expired; ask for a new one.")
    if Membership.objects.filter(user=user, organization_id=row.organization_id).exists():
        raise MarketError("already_member", f"You belong to {row.organization.name} already.")
    membership = Membership.objects.create(user=user, organization=row.organization, role=row.role)
    audit.record(
        actor_for(user, row.organization, row.role),
        "member.joined",
        membership.public_id,
        now=now,
        after={"email": user.email, "role": row.role},
    )
    screening.refresh(row.organization, actor=actor_for(user, row.organization, row.role), now=now)
    return membership


@transaction.atomic
def change_role(membership: Membership, role: str, *, actor: Actor, now: datetime) -> Membership:
    """Only owners make or unmake owners; the last owner stays one."""
    acquire((Lock.ORG, membership.organization_id))
    membership = _still_there(membership)
    before = membership.role
    _check_role(actor, role, before)
    if before == "owner" and role != "owner":
        _keep_an_owner(membership)
    membership.role = role
    membership.save(update_fields=["role"])
    audit.record(
        actor,
        "member.role_changed",
        membership.public_id,
        now=now,
        organization_id=membership.organization_id,
        before={"role": before},
        after={"role": role},
    )
    screening.refresh(membership.organization, actor=actor, now=now)
    return membership


@transaction.atomic
def remove_member(membership: Membership, *, actor: Actor, now: datetime) -> None:
    """End a membership. The keys the person issued belong to the organization and stay."""
    acquire((Lock.ORG, membership.organization_id))
    membership = _still_there(membership)
    _check_role(actor, membership.role)
    if membership.role == "owner":
        _keep_an_owner(membership)
    public_id, email = membership.public_id, membership.user.email
    membership.delete()
    audit.record(
        actor,
        "member.removed",
        public_id,
        now=now,
        organization_id=membership.organization_id,
        before={"email": email, "role": membership.role},
    )
    screening.refresh(membership.organization, actor=actor, now=now)


def _still_there(membership: Membership) -> Membership:
    """The row as it is under the lock; a rival may have removed it."""
    found = Membership.objects.filter(pk=membership.pk).select_related("user").first()
    if found is None:
        raise MarketError("not_found", "The membership has ended.")
    return found


def _keep_an_owner(leaving: Membership) -> None:
    others = Membership.objects.filter(organization_id=leaving.organization_id, role="owner").exclude(pk=leaving.pk)
    if not others.exists():
        raise MarketError("last_owner", "Make somebody else an owner first.")


def _check_role(actor: Actor, *roles: str) -> None:
    """Owners are made and unmade by owners alone, or an admin could take the house over."""
    for role in roles:
        if role not in ROLES:
            raise MarketError("invalid_request", f"role {role!r} is none of {', '.join(ROLES)}", {"/role": "unknown"})
    if "owner" in roles and actor.kind != "system" and actor.role != "owner":
        raise MarketError("forbidden", "Only an owner makes, changes or removes an owner.")


# --- keys
@transaction.atomic
def issue_key(
    organization: Organization,
    *,
    name: str,
    scopes: Iterable[str],
    actor: Actor,
    now: datetime,
    expires_at: datetime | None = None,
) -> tuple[ApiKey, str]:
    """(row, token). The token is shown once. Nobody issues a key that may do more than they may themselves."""
    wanted = sorted(set(scopes))
    unknown = [scope for scope in wanted if scope not in SCOPES]
    if unknown or not wanted:
        raise MarketError(
            "invalid_request",
            f"unknown scopes: {', '.join(unknown)}" if unknown else "a key needs at least one scope",
            {"/scopes": f"choose among {', '.join(SCOPES)}"},
        )
    beyond = [scope for scope in wanted if not actor.may(scope)]
    if beyond:
        raise MarketError("forbidden", f"You may not do {', '.join(beyond)} yourself, so no key of yours may.")
    if expires_at is not None and expires_at <= now:
        raise MarketError(
            "invalid_request", f"expires_at {expires_at:%F %T} has passed", {"/expires_at": "in the past"}
        )
    token = tokens.new("tr_live_" if organization.livemode else "tr_test_")
    row = ApiKey.objects.create(
        organization=organization,
        name=name,
        prefix=token[:PREFIX_LENGTH],
        digest=tokens.digest(token),
        scopes=wanted,
        created_by_id=actor.user_id,
        expires_at=expires_at,
    )
    audit.record(
        actor,
        "key.issued",
        row.public_id,
        now=now,
        organization_id=organization.pk,
        after={"name": name, "prefix": row.prefix, "scopes": wanted},
    )
    return row, token


@transaction.atomic
def revoke_key(key: ApiKey, *, actor: Actor, now: datetime) -> bool:
    """From now on the key is refused. False where it was revoked already: revoking twice is no error."""
    done = ApiKey.objects.filter(pk=key.pk, revoked_at=None).update(revoked_at=now)
    if done:
        key.revoked_at = now
        audit.record(
            actor,
            "key.revoked",
            key.public_id,
            now=now,
            organization_id=key.organization_id,
            before={"name": key.name, "prefix": key.prefix},
        )
    return bool(done)


# --- money's one row
@transaction.atomic
def set_billing_standing(
    organization_id: int, *, state: str, available_minor: int, now: datetime, actor: Actor = SYSTEM
) -> BillingStanding:
    """Written by billing: what accept, submit and commit read under the organization's lock, which this takes too.

    Only a change of state is audited; `available_minor` moves with every minute of use.
    """
    if state not in BillingStanding.State.values:
        raise MarketError("invalid_request", f"standing {state!r} is none of {', '.join(BillingStanding.State.values)}")
    acquire((Lock.ORG, organization_id))
    before = BillingStanding.objects.filter(organization_id=organization_id).first()
    if before is None and not Organization.objects.filter(pk=organization_id).exists():
        raise MarketError("not_found", f"There is no organization {organization_id}.")
    row, _ = BillingStanding.objects.update_or_create(
        organization_id=organization_id,
        defaults={"state": state, "available_minor": available_minor, "updated_at": now},
    )
    if before is None or before.state != state:
        audit.record(
            actor,
            "billing.standing_changed",
            row.organization.public_id,
            now=now,
            organization_id=organization_id,
            before={"state": before.state} if before else None,
            after={"state": state, "available_minor": available_minor},
        )
        if state == BillingStanding.State.GOOD:  # it can sign from now on
            screening.begin(row.organization, now=now)
    return row

"""The platform's freeze: no site raises power, anywhere, until it is lifted. Sites keep their own modes beneath it.

Who raises looks at it under the site's lock (`Ledger.frozen`, `grants.books`), so what a turn has begun when somebody freezes may
end; nothing begins after. Then every site is told, one after another, each under its lock.
"""

from datetime import datetime

from django.conf import settings
from django.contrib.auth.models import Permission
from django.db import IntegrityError, transaction
from django.db.models import Q, QuerySet

from marketplace.errors import MarketError
from marketplace.models import PowerFreeze, User
from marketplace.outbox import emit
from marketplace.services import audit
from marketplace.tenancy import Actor

TOLD = "marketplace.power_freeze"
PERMISSION = "marketplace.freeze_power"
FREEZE_STANDS = "EXISTS (SELECT FROM marketplace_powerfreeze WHERE ended_at IS NULL)"  # in SQL


def standing() -> PowerFreeze | None:
    """The freeze that stands by a person's word; POWER_FREEZE freezes besides."""
    return PowerFreeze.objects.filter(ended_at=None).first()


def frozen() -> bool:
    """Whether nothing may rise, anywhere."""
    return settings.POWER_FREEZE or standing() is not None


def may(actor: Actor) -> bool:
    """Our own people with the permission `marketplace.freeze_power`; superusers have it."""
    if actor.kind != "staff" or actor.user_id is None:
        return actor.kind == "system"
    person = User.objects.filter(pk=actor.user_id, is_active=True, is_staff=True).first()
    return person is not None and person.has_perm(PERMISSION)


def permit(actor: Actor, person: User, *, allowed: bool, now: datetime) -> bool:
    """Let one of our own people freeze and lift, or no longer. Only a superuser says so, and superusers always may themselves. False
    where it stood so already. Raises forbidden, invalid_request.
    """
    bosses = User.objects.filter(is_active=True, is_staff=True, is_superuser=True)
    if actor.kind != "staff" or actor.user_id is None or not bosses.filter(pk=actor.user_id).exists():
        raise MarketError("forbidden", "Who may freeze the platform's power is for a superuser to say.")
    if person.is_superuser or (allowed and not (person.is_staff and person.is_active)):
        why = "is a superuser, who always may" if person.is_superuser else "is none of our own people"
        raise MarketError("invalid_request", f"{person.email} {why}.")
    with transaction.atomic():
        held = User.objects.select_for_update(no_key=True).get(pk=person.pk).user_permissions  # a rival waits here
        known = held.filter(pk=_permission().pk).exists()
        if known == allowed:
            return False
        if allowed:
            held.add(_permission())
        else:
            held.remove(_permission())
        verb = "power.freeze_permitted" if allowed else "power.freeze_withdrawn"
        audit.record(actor, verb, person.email, now=now, before={"may": known}, after={"may": allowed})
    return True


def permitted() -> QuerySet[User]:
    """Our own people who may freeze by a permission of their own or of a group."""
    mine = Q(user_permissions=_permission()) | Q(groups__permissions=_permission()) | Q(is_superuser=True)
    return User.objects.filter(mine, is_active=True, is_staff=True).distinct()


def _permission() -> Permission:
    app, codename = PERMISSION.split(".")
    return Permission.objects.get(content_type__app_label=app, codename=codename)


def freeze(actor: Actor, *, reason: str = "", now: datetime) -> PowerFreeze:
    """Hold every site, from now on. Where it is frozen already, that freeze is answered. Raises forbidden."""
    _check(actor)
    with transaction.atomic():
        if found := standing():
            return found
        try:
            with transaction.atomic():
                made = PowerFreeze.objects.create(began_at=now, began_by=actor.label[:120], reason=reason.strip()[:200])
        except IntegrityError:  # a rival was first
            return PowerFreeze.objects.get(ended_at=None)
        audit.record(actor, "power.frozen", "platform", now=now, after={"reason": made.reason})
        emit(TOLD, key="all")
    return made


def lift(actor: Actor, *, now: datetime) -> bool:
    """Let the sites go on, each by its own mode. False where nothing was frozen. Raises forbidden."""
    _check(actor)
    with transaction.atomic():
        found = standing()
        if found is None:
            return False
        mine = PowerFreeze.objects.filter(pk=found.pk, ended_at=None)
        if not mine.update(ended_at=now, ended_by=actor.label[:120]):  # a rival was first
            return False
        before = {"since": found.began_at.isoformat(), "by": found.began_by, "reason": found.reason}
        audit.record(actor, "power.freeze_lifted", "platform", now=now, before=before)
        emit(TOLD, key="all")
    return True


def _check(actor: Actor) -> None:
    if not may(actor):
        raise MarketError("forbidden", f"Freezing the platform's power takes the permission {PERMISSION}.")

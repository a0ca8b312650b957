"""Who is acting, and what they may see. Every list a person or key reads starts at `visible_to(actor)`."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from django.db import models
from django.db.models import Q

ROLES = ("owner", "admin", "engineer", "billing", "viewer")

# role x action, both sides of the market. A key's scopes are checked besides (`scope` column of the same action).
ACTIONS: dict[str, frozenset[str]] = {
    "organization:read": frozenset(ROLES),
    "organization:write": frozenset({"owner", "admin"}),
    "members:read": frozenset(ROLES),
    "members:write": frozenset({"owner", "admin"}),
    "audit:read": frozenset({"owner", "admin"}),
    "screening:read": frozenset({"owner", "admin", "billing"}),
    "screening:write": frozenset({"owner", "admin"}),
    "keys:read": frozenset({"owner", "admin", "engineer"}),
    "keys:write": frozenset({"owner", "admin"}),
    "listings:read": frozenset(ROLES),
    "listings:write": frozenset({"owner", "admin", "engineer"}),
    "sites:read": frozenset(ROLES),
    "sites:write": frozenset({"owner", "admin", "engineer"}),
    "searches:read": frozenset(ROLES),
    "searches:write": frozenset({"owner", "admin", "engineer", "billing"}),
    "quotes:read": frozenset(ROLES),
    "quotes:write": frozenset({"owner", "admin", "engineer"}),
    "contracts:read": frozenset(ROLES),
    "contracts:write": frozenset({"owner", "admin"}),
    "jobs:read": frozenset(ROLES),
    "jobs:write": frozenset({"owner", "admin", "engineer"}),
    "billing:read": frozenset({"owner", "admin", "billing"}),
    "billing:write": frozenset({"owner", "billing"}),
    "usage:read": frozenset(ROLES),
    "payouts:read": frozenset({"owner", "admin", "billing"}),
    "payouts:write": frozenset({"owner", "billing"}),
    "maintenance:read": frozenset(ROLES),
    "maintenance:write": frozenset({"owner", "admin", "engineer"}),
    "power:read": frozenset(ROLES),
    "power:write": frozenset({"owner", "admin", "engineer"}),
}
SCOPES = tuple(ACTIONS)


@dataclass(frozen=True)
class Actor:
    """Who acts: a person in one organization, an API key, an agent, staff, or nobody.

    `label` is what audit rows and events record.
    """

    kind: str = "anonymous"  # anonymous | user | key | agent | staff | system
    organization_id: int | None = None
    role: str | None = None
    scopes: frozenset[str] = field(default_factory=frozenset)
    user_id: int | None = None
    key_id: int | None = None
    site_id: int | None = None
    livemode: bool = True
    label: str = "anonymous"

    @property
    def is_staff(self) -> bool:
        return self.kind in {"staff", "system"}

    def may(self, action: str) -> bool:
        """Does role or scope allow `action` (a key of ACTIONS)? Staff may read everything and write through staff routes only."""
        assert action in ACTIONS, action
        if self.kind == "system":
            return True
        if self.kind == "staff":
            return action.endswith(":read")
        if self.kind == "key":
            return action in self.scopes
        if self.kind == "user":
            return self.role in ACTIONS[action]
        return False


SYSTEM = Actor(kind="system", label="system")
ANONYMOUS = Actor()


class TenantQuerySet(models.QuerySet[Any]):
    """Querysets name the paths that lead to the organizations which own a row.

    `tenant_paths = ("organization", "operator")`: a row is visible to the actor whose organization stands at any of them.
    """

    tenant_paths: ClassVar[tuple[str, ...]] = ("organization",)

    def owned_by(self, organization: Any) -> Self:
        """Rows whose first tenant path is `organization` (a row or its id)."""
        return self.filter(**{self.tenant_paths[0]: organization})

    def public_to(self, actor: Actor) -> Q | None:  # noqa: ARG002
        """What strangers may see of this table too; None: nothing."""
        return None

    def visible_to(self, actor: Actor) -> Self:
        if actor.is_staff:
            return self.all()
        shown = self.public_to(actor)
        query = shown if shown is not None else Q(pk__in=())
        if actor.organization_id is not None:
            for path in self.tenant_paths:
                query |= Q(**{path: actor.organization_id})
        return self.filter(query)


class TenantModel(models.Model):
    """Gives a row its public id. Subclasses set `PREFIX` and `objects = SomeTenantQuerySet.as_manager()`."""

    PREFIX: ClassVar[str]

    class Meta:
        abstract = True

    @property
    def public_id(self) -> str:
        from marketplace import ids

        return ids.encode(self.PREFIX, self.pk)

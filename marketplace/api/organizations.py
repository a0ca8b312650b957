"""Organizations, and the record of who did what in them. Their people: marketplace.api.members."""

from typing import Any

from django.urls import path
from django.utils import timezone
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from marketplace import actors, ids
from marketplace.api import members, shapes
from marketplace.api.base import Resource, Shape
from marketplace.api.keys import PAGE
from marketplace.models import AuditEvent, Membership, Organization
from marketplace.services import accounts
from marketplace.tenancy import ROLES


class OrganizationShape(serializers.Serializer):
    id = serializers.CharField()
    object = serializers.ChoiceField(["organization"])
    created_at = serializers.DateTimeField()
    name = serializers.CharField()
    country = serializers.CharField()
    currency = serializers.CharField()
    is_customer = serializers.BooleanField()
    is_operator = serializers.BooleanField()
    livemode = serializers.BooleanField()
    verification = serializers.ChoiceField(Organization.Verification.choices)
    gpu_limit = serializers.IntegerField(help_text="most GPUs that may run or be held at once")
    role = serializers.ChoiceField(ROLES, allow_null=True, help_text="yours; null for a key")


class CreateOrganizationShape(Shape):
    name = serializers.CharField(max_length=120)
    country = serializers.RegexField("^[A-Za-z]{2}$", required=False, default="US", help_text="ISO 3166")
    currency = serializers.RegexField("^[A-Za-z]{3}$", required=False, default="USD", help_text="ISO 4217")
    is_customer = serializers.BooleanField(required=False, default=True)
    is_operator = serializers.BooleanField(required=False, default=False)
    livemode = serializers.BooleanField(required=False, default=True, help_text="false: a test tenant")


class UpdateOrganizationShape(Shape):
    name = serializers.CharField(max_length=120, required=False)
    country = serializers.RegexField("^[A-Za-z]{2}$", required=False)
    is_customer = serializers.BooleanField(required=False)
    is_operator = serializers.BooleanField(required=False)


class AuditShape(serializers.Serializer):
    object = serializers.ChoiceField(["audit_event"])
    at = serializers.DateTimeField()
    actor = serializers.CharField()
    verb = serializers.CharField()
    subject = serializers.CharField()
    before = serializers.JSONField()
    after = serializers.JSONField()


class OrganizationResource(Resource):
    model_queryset = Organization.objects.all()
    prefix = "org"

    def represent(self, row: Organization, role: str | None = None) -> dict[str, Any]:
        return {
            "id": row.public_id,
            "object": "organization",
            "created_at": row.created_at,
            "name": row.name,
            "country": row.country,
            "currency": row.currency,
            "is_customer": row.is_customer,
            "is_operator": row.is_operator,
            "livemode": row.livemode,
            "verification": row.verification,
            "gpu_limit": row.gpu_limit,
            "role": role or self.actor.role,
        }


class Organizations(OrganizationResource):
    actions = {"GET": "person", "POST": "person"}

    @extend_schema(
        tags=["organizations"], operation_id="organizations_list", parameters=PAGE,
        responses={200: shapes.page_of("Organization", OrganizationShape)},
    )  # fmt: skip
    def get(self, request: Request) -> Response:
        """Those that you are a member of, oldest membership first."""

        def show(row: Membership) -> dict[str, Any]:
            return self.represent(row.organization, row.role)

        query = shapes.query(request, shapes.PageQuery)
        return Response(shapes.page(show, accounts.organizations_of(self.person()), query, order="id"))

    @extend_schema(
        tags=["organizations"], operation_id="organizations_create", request=CreateOrganizationShape,
        responses={201: OrganizationShape},
    )  # fmt: skip
    def post(self, request: Request) -> Response:
        """A new one, of which you are the owner. Your session acts in it from now on."""
        body = self.read(CreateOrganizationShape)

        def effect() -> Response:
            made = accounts.create_organization(self.person(), now=timezone.now(), **body)
            request.session[actors.SESSION_KEY] = made.pk
            return Response(self.represent(made, "owner"), status=201)

        return self.write(effect)


class OrganizationDetail(OrganizationResource):
    actions = {"GET": "organization:read", "PATCH": "organization:write"}

    @extend_schema(tags=["organizations"], operation_id="organizations_show", responses={200: OrganizationShape})
    def get(self, request: Request, organization: str) -> Response:  # noqa: ARG002
        return Response(self.represent(self.row(organization)))

    @extend_schema(
        tags=["organizations"], operation_id="organizations_update", request=UpdateOrganizationShape,
        responses={200: OrganizationShape},
    )  # fmt: skip
    def patch(self, request: Request, organization: str) -> Response:  # noqa: ARG002
        row, body = self.row(organization), self.read(UpdateOrganizationShape)

        def effect() -> Response:
            changed = accounts.update_organization(row, actor=self.actor, now=timezone.now(), **body)
            return Response(self.represent(changed))

        return self.write(effect)


class OrganizationSwitch(OrganizationResource):
    actions = {"POST": "person"}

    @extend_schema(
        tags=["organizations"], operation_id="organizations_switch", request=None, responses={200: OrganizationShape}
    )
    def post(self, request: Request, organization: str) -> Response:
        """Act in this organization for the rest of the session."""
        pk = ids.decode("org", organization) or 0

        def effect() -> Response:
            found = accounts.switch_organization(self.person(), pk, session=request.session, now=timezone.now())
            return Response(self.represent(found.organization, found.role))

        return self.write(effect)


class AuditEvents(Resource):
    actions = {"GET": "audit:read"}
    model_queryset = AuditEvent.objects.all()
    filters = {"subject": "subject", "verb": "verb", "actor": "actor"}

    @extend_schema(
        tags=["organizations"], operation_id="audit_events_list",
        parameters=[*PAGE, *(OpenApiParameter(name, str) for name in filters)],
        responses={200: shapes.page_of("AuditEvent", AuditShape)},
    )  # fmt: skip
    def get(self, request: Request) -> Response:
        """Newest first. `subject` is a public id, compared as text."""
        return self.listing(request)

    def filter_value(self, name: str, text: str) -> Any:  # noqa: ARG002
        return text

    def represent(self, row: AuditEvent) -> dict[str, Any]:
        fields = ("at", "actor", "verb", "subject", "before", "after")
        return {"object": "audit_event", **{name: getattr(row, name) for name in fields}}


urlpatterns = [
    path("organizations", Organizations.as_view(), name="organizations"),
    path("organizations/<str:organization>", OrganizationDetail.as_view(), name="organization"),
    path("organizations/<str:organization>/switch", OrganizationSwitch.as_view(), name="organization-switch"),
    path("audit-events", AuditEvents.as_view(), name="audit-events"),
    *members.urlpatterns,
]

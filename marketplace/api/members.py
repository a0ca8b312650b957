"""Who belongs to the organization, in which role; invitations. The routes are listed by marketplace.api.organizations."""

from typing import Any

from django.urls import path
from django.utils import timezone
from drf_spectacular.utils import extend_schema
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from marketplace.api import shapes
from marketplace.api.base import Resource, Shape
from marketplace.api.keys import PAGE, show_once
from marketplace.models import Invitation, Membership
from marketplace.services import accounts
from marketplace.tenancy import ROLES


class MemberShape(serializers.Serializer):
    id = serializers.CharField()
    object = serializers.ChoiceField(["member"])
    created_at = serializers.DateTimeField()
    email = serializers.EmailField()
    name = serializers.CharField()
    role = serializers.ChoiceField(ROLES)


class RoleShape(Shape):
    role = serializers.ChoiceField(ROLES)


class InvitationShape(serializers.Serializer):
    id = serializers.CharField()
    object = serializers.ChoiceField(["invitation"])
    created_at = serializers.DateTimeField()
    email = serializers.EmailField()
    role = serializers.ChoiceField(ROLES)
    expires_at = serializers.DateTimeField()
    accepted_at = serializers.DateTimeField(allow_null=True)


class NewInvitationShape(InvitationShape):
    token = serializers.CharField(allow_null=True, help_text="shown once; null when the answer is replayed")


class InviteShape(Shape):
    email = serializers.EmailField()
    role = serializers.ChoiceField(ROLES)


class AcceptInvitationShape(Shape):
    token = serializers.CharField(max_length=80)


class MemberResource(Resource):
    model_queryset = Membership.objects.select_related("user")
    prefix = "mem"
    order = "id"
    filters = {"role": "role"}

    def represent(self, row: Membership) -> dict[str, Any]:
        return {
            "id": row.public_id,
            "object": "member",
            "created_at": row.created_at,
            "email": row.user.email,
            "name": row.user.name,
            "role": row.role,
        }


class Members(MemberResource):
    actions = {"GET": "members:read"}

    @extend_schema(
        tags=["members"], operation_id="members_list", parameters=PAGE,
        responses={200: shapes.page_of("Member", MemberShape)},
    )  # fmt: skip
    def get(self, request: Request) -> Response:
        return self.listing(request)


class MemberDetail(MemberResource):
    actions = {"GET": "members:read", "PATCH": "members:write", "DELETE": "members:write"}

    @extend_schema(tags=["members"], operation_id="members_show", responses={200: MemberShape})
    def get(self, request: Request, member: str) -> Response:  # noqa: ARG002
        return Response(self.represent(self.row(member)))

    @extend_schema(tags=["members"], operation_id="members_update", request=RoleShape, responses={200: MemberShape})
    def patch(self, request: Request, member: str) -> Response:  # noqa: ARG002
        """Only owners make or unmake owners; the last owner stays one."""
        row, body = self.row(member), self.read(RoleShape)

        def effect() -> Response:
            changed = accounts.change_role(row, body["role"], actor=self.actor, now=timezone.now())
            return Response(self.represent(changed))

        return self.write(effect)

    @extend_schema(tags=["members"], operation_id="members_remove", responses={204: None})
    def delete(self, request: Request, member: str) -> Response:  # noqa: ARG002
        row = self.row(member)

        def effect() -> Response:
            accounts.remove_member(row, actor=self.actor, now=timezone.now())
            return Response(status=204)

        return self.write(effect)


class InvitationResource(Resource):
    model_queryset = Invitation.objects.all()
    prefix = "inv"

    def represent(self, row: Invitation) -> dict[str, Any]:
        return {
            "id": row.public_id,
            "object": "invitation",
            "created_at": row.created_at,
            "email": row.email,
            "role": row.role,
            "expires_at": row.expires_at,
            "accepted_at": row.accepted_at,
        }


class Invitations(InvitationResource):
    actions = {"GET": "members:read", "POST": "members:write"}

    @extend_schema(
        tags=["members"], operation_id="invitations_list", parameters=PAGE,
        responses={200: shapes.page_of("Invitation", InvitationShape)},
    )  # fmt: skip
    def get(self, request: Request) -> Response:
        return self.listing(request)

    @extend_schema(
        tags=["members"], operation_id="invitations_create", request=InviteShape, responses={201: NewInvitationShape}
    )
    def post(self, request: Request) -> Response:  # noqa: ARG002
        """The token is good for 7 days, for that address only. Hand it over yourself."""
        body = self.read(InviteShape)

        def make() -> tuple[dict[str, Any], str]:
            row, token = accounts.invite(self.organization(), actor=self.actor, now=timezone.now(), **body)
            return self.represent(row), token

        return show_once(self, make)


class InvitationDetail(InvitationResource):
    actions = {"DELETE": "members:write"}

    @extend_schema(tags=["members"], operation_id="invitations_withdraw", responses={204: None})
    def delete(self, request: Request, invitation: str) -> Response:  # noqa: ARG002
        row = self.row(invitation)

        def effect() -> Response:
            accounts.withdraw_invitation(row, actor=self.actor, now=timezone.now())
            return Response(status=204)

        return self.write(effect)


class InvitationAccept(MemberResource):
    actions = {"POST": "person"}

    @extend_schema(
        tags=["members"], operation_id="invitations_accept", request=AcceptInvitationShape,
        responses={200: MemberShape},
    )  # fmt: skip
    def post(self, request: Request) -> Response:  # noqa: ARG002
        """Join the organization that invited your address."""
        body = self.read(AcceptInvitationShape)

        def effect() -> Response:
            row = accounts.accept_invitation(self.person(), body["token"], now=timezone.now())
            return Response(self.represent(row))

        return self.write(effect)


urlpatterns = [
    path("members", Members.as_view(), name="members"),
    path("members/<str:member>", MemberDetail.as_view(), name="member"),
    path("invitations", Invitations.as_view(), name="invitations"),
    path("invitations/accept", InvitationAccept.as_view(), name="invitation-accept"),
    path("invitations/<str:invitation>", InvitationDetail.as_view(), name="invitation"),
]

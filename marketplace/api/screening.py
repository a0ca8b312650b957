"""Verification: where an organization's checks stand, what is asked of it, and its answer. Decisions are our own people's alone."""

from typing import Any

from django.urls import path
from django.utils import timezone
from drf_spectacular.utils import extend_schema
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from marketplace.api.base import Resource, Shape
from marketplace.models import BusinessProfile, Organization, Screening
from marketplace.services import screening

COUNTRY = "^[A-Za-z]{2}$"


class ProfileShape(Shape):
    """The whole of it: what is left out is empty from then on."""

    legal_name = serializers.CharField(max_length=160, help_text="as registered")
    registration_number = serializers.CharField(max_length=60)
    address = serializers.CharField(max_length=300, help_text="registered address")
    website = serializers.URLField(max_length=200, required=False, default="", allow_blank=True)
    beneficial_owners = serializers.ListField(
        child=serializers.CharField(max_length=160),
        min_length=1,
        max_length=30,
        help_text="full names of the people who own or control a quarter of it or more",
    )
    end_use = serializers.CharField(max_length=500, help_text="what the GPUs are used for")
    end_use_countries = serializers.ListField(
        child=serializers.RegexField(COUNTRY), min_length=1, max_length=60, help_text="where results are used, ISO 3166"
    )


class CheckShape(serializers.Serializer):
    kind = serializers.ChoiceField(Screening.Kind.choices)
    state = serializers.ChoiceField(Screening.State.choices)
    summary = serializers.CharField(help_text="where it stands, for people")
    missing = serializers.ListField(child=serializers.CharField(), help_text="fields of the profile that it waits for")
    message = serializers.CharField(help_text="what one of our own people asks or says; empty: nothing")
    provider_waits = serializers.BooleanField(help_text="the screening service does not answer; we ask again")
    changed_at = serializers.DateTimeField(allow_null=True)
    valid_until = serializers.DateTimeField(allow_null=True)


class VerificationShape(serializers.Serializer):
    object = serializers.ChoiceField(["verification"])
    organization = serializers.CharField()
    verification = serializers.ChoiceField(
        Organization.Verification.choices, help_text="of the business and sanctions checks together"
    )
    needed = serializers.BooleanField(help_text="false for a test tenant, which is asked for nothing")
    checks = CheckShape(many=True)
    profile = ProfileShape(allow_null=True)


class Verification(Resource):
    actions = {"GET": "screening:read", "PUT": "screening:write"}
    model_queryset = Organization.objects.all()
    prefix = "org"

    def represent(self, row: Organization) -> dict[str, Any]:
        profile = BusinessProfile.objects.owned_by(row.pk).first()
        return {
            "object": "verification",
            "organization": row.public_id,
            "verification": row.verification,
            "needed": row.livemode,
            "checks": [
                {
                    "kind": check.kind,
                    "state": check.state,
                    "summary": check.summary,
                    "missing": list(check.asked),
                    "message": check.message,
                    "provider_waits": check.waits,
                    "changed_at": check.changed_at,
                    "valid_until": check.valid_until,
                }
                for check in screening.standing(row)
            ],
            "profile": {name: getattr(profile, name) for name in screening.TOLD} if profile else None,
        }

    @extend_schema(tags=["organizations"], operation_id="verification_show", responses={200: VerificationShape})
    def get(self, request: Request) -> Response:  # noqa: ARG002
        """What `screening_required` asks for: each check's state, and what is missing."""
        return Response(self.represent(self.organization()))

    @extend_schema(
        tags=["organizations"], operation_id="verification_tell", request=ProfileShape, responses={200: VerificationShape}
    )  # fmt: skip
    def put(self, request: Request) -> Response:  # noqa: ARG002
        """Tell of the business and of the end use. Checks of what changed are asked anew, at once."""
        body = self.read(ProfileShape)
        body["end_use_countries"] = sorted({country.upper() for country in body["end_use_countries"]})

        def effect() -> Response:
            organization = self.organization()
            screening.tell(self.actor, organization, dict(body), now=timezone.now())
            return Response(self.represent(self.organization()))

        return self.write(effect)


urlpatterns = [path("verification", Verification.as_view(), name="verification")]

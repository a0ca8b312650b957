"""Verification: where the organization's checks stand, the published rule, and what it tells of itself."""

from django.conf import settings
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.urls import path, reverse
from django.utils import timezone

from marketplace.models import BusinessProfile, Organization
from marketplace.services import screening
from marketplace.web.base import actor_of, done, page
from marketplace.web.forms import ProfileForm


@page(GET="screening:read", POST="screening:write")
def verification(request: HttpRequest) -> HttpResponse:
    organization: Organization = Organization.objects.owned_by(actor_of(request).organization_id).get()
    if request.method == "POST":
        form = ProfileForm(request.POST)
        if not form.is_valid():
            return _show(request, organization, form, 400)
        screening.tell(actor_of(request), organization, form.cleaned_data, now=timezone.now())
        return done(request, "Thank you. The checks go on by themselves; we write to you.", reverse("web:verification"))
    profile = BusinessProfile.objects.owned_by(organization.pk).first()
    initial = {name: getattr(profile, name) for name in screening.TOLD} if profile else {}
    if profile:
        initial["end_use_countries"] = ", ".join(profile.end_use_countries)
    return _show(request, organization, ProfileForm(initial=initial))


def _show(request: HttpRequest, organization: Organization, form: ProfileForm, status: int = 200) -> HttpResponse:
    context = {
        "organization": organization,
        "checks": screening.standing(organization),
        "form": form,
        "free_gpus": settings.SCREENING_FREE_GPUS,
        "free_models": settings.EXPORT_FREE_GPU_MODELS,
        "match": settings.SCREENING_MATCH,
    }
    return render(request, "verification.html", context, status=status)


urlpatterns = [path("verification", verification, name="verification")]

"""Every door of the house. Each room lists its own: `marketplace.api.urls`, `marketplace.web.urls`, `marketplace.admin`."""

from django.urls import URLPattern, URLResolver, include, path

from marketplace.admin.sites import operator_site, staff_site
from marketplace.metrics import metrics

urlpatterns: list[URLPattern | URLResolver] = [
    path("accounts/", include("allauth.urls")),
    path("metrics", metrics, name="prometheus-django-metrics"),
    path("api/v1/", include("marketplace.api.urls")),
    path("operator/", operator_site.urls),
    path("staff/", staff_site.urls),
    path("", include("marketplace.web.urls")),
]

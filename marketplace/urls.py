"""Every door of the house. Each room lists its own: `marketplace.api.urls`, `marketplace.web.urls`, `marketplace.admin`."""

from importlib.util import find_spec

from django.urls import URLPattern, URLResolver, include, path

urlpatterns: list[URLPattern | URLResolver] = [
    path("accounts/", include("allauth.urls")),
    path("", include("django_prometheus.urls")),
    path("api/v1/", include("marketplace.api.urls")),
]
if find_spec("marketplace.web.urls"):
    urlpatterns.append(path("", include("marketplace.web.urls")))
if find_spec("marketplace.admin.sites"):
    from marketplace.admin.sites import operator_site, staff_site

    urlpatterns += [path("operator/", operator_site.urls), path("staff/", staff_site.urls)]

"""Routes under /api/v1/. One line a resource module: each exports its own `urlpatterns`."""

from importlib import import_module
from importlib.util import find_spec

from django.urls import URLPattern, URLResolver

RESOURCES = (
    "health", "organizations", "keys", "sites", "hosts", "miners", "power", "curtailments", "listings", "quotes",
    "contracts", "jobs", "usage", "invoices", "payment_methods", "payouts", "agent", "staff", "webhooks", "schema",
)  # fmt: skip

urlpatterns: list[URLPattern | URLResolver] = []
for name in RESOURCES:
    if find_spec(f"marketplace.api.{name}"):
        urlpatterns += import_module(f"marketplace.api.{name}").urlpatterns

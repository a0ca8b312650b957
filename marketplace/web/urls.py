"""The customers' pages."""

from marketplace.web import (
    amendments,
    budget,
    cards,
    compare,
    contracts,
    forward,
    invoices,
    jobs,
    keys,
    maintenance,
    market,
    organizations,
    quotes,
    saved,
    team,
    trust,
    usage,
    verification,
)

app_name = "web"
urlpatterns = [
    *market.urlpatterns,
    *compare.urlpatterns,
    *trust.urlpatterns,
    *saved.urlpatterns,
    *quotes.urlpatterns,
    *contracts.urlpatterns,
    *amendments.urlpatterns,
    *forward.urlpatterns,
    *maintenance.urlpatterns,
    *jobs.urlpatterns,
    *usage.urlpatterns,
    *invoices.urlpatterns,
    *cards.urlpatterns,
    *budget.urlpatterns,
    *organizations.urlpatterns,
    *team.urlpatterns,
    *verification.urlpatterns,
    *keys.urlpatterns,
]

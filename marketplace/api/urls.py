"""Routes under /api/v1/: each resource module lists its own."""

from django.urls import URLPattern, URLResolver

from marketplace.api import (
    agent,
    amendments,
    budgets,
    calendar_feeds,
    calendars,
    contracts,
    conversions,
    curtailments,
    forward,
    grid,
    health,
    hosts,
    invoices,
    jobs,
    keys,
    listings,
    maintenance,
    miners,
    organizations,
    payment_methods,
    payouts,
    pool_feeds,
    power,
    probe,
    profit,
    quotes,
    reliability,
    saved,
    schema,
    screening,
    sites,
    spot,
    staff,
    usage,
    verifications,
    webhooks,
)

RESOURCES = (  # asked from the first to the last: what is called most stands first
    jobs, health, organizations, screening, keys, sites, conversions, hosts, reliability, verifications, probe, miners, power, profit,
    pool_feeds,
    curtailments, grid, maintenance, calendar_feeds, listings, calendars, saved, quotes, contracts, amendments, spot, forward,
    usage, budgets, invoices,
    payment_methods, payouts, agent, staff,
    webhooks, schema,
)  # fmt: skip

urlpatterns: list[URLPattern | URLResolver] = [route for module in RESOURCES for route in module.urlpatterns]

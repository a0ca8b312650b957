"""Both admin sites with all their pages; marketplace.urls mounts them at /operator/ and /staff/."""

from marketplace.admin import (  # noqa: F401 - each module registers its pages
    audit,
    contracts,
    conversions,
    facilities,
    forward,
    freeze,
    grid,
    hosts,
    listings,
    maintenance,
    miners,
    money,
    pools,
    power,
    profit,
    screening,
    spot,
    staff_hosts,
    staff_market,
    staff_money,
    staff_queues,
)
from marketplace.admin.doors import operator_site, staff_site

__all__ = ["operator_site", "staff_site"]

"""How long the spot market's record is kept. Beside `services.spot`, which writes it, the only one that takes rows of it away.

What was billed stands in billing's own price versions and usage records, for good. An interval, with its results and notices, can
go once it is older than `settings.SPOT_HISTORY_DAYS`, and:
  - a newer one of its listing stands: the last price is in force until the next one is made;
  - no placement under the listing's spot contracts is still to be metered through it.
"""

from datetime import datetime, timedelta

from django.conf import settings
from django.db import connection, transaction

from marketplace.models import SpotInterval, SpotNotice, SpotResult
from scheduler.core.auction import INTERVAL_S

FORGOTTEN = 5_000  # intervals at most each time: 5,000 listings make 1,000 a minute

_OLD = """
WITH owed AS (
  SELECT c.listing_id, min(coalesce(p.metered_through, p.running_at)) AS since
  FROM marketplace_placement p JOIN marketplace_contract c ON c.id = p.contract_id AND c.kind = 'spot'
  WHERE p.running_at IS NOT NULL
    AND (p.finished_at IS NULL OR p.metered_through IS NULL OR NOT p.metered_through = p.finished_at)
  GROUP BY 1
), upto AS (
  SELECT l.id, least(%(cut)s, owed.since, (SELECT max(i.start) FROM marketplace_spotinterval i WHERE i.listing_id = l.id)) AS at
  FROM marketplace_listing l LEFT JOIN owed ON owed.listing_id = l.id
  WHERE EXISTS (SELECT FROM marketplace_spotinterval i WHERE i.listing_id = l.id AND i.start < %(cut)s)
)
SELECT i.id FROM upto JOIN marketplace_spotinterval i ON i.listing_id = upto.id AND i.start <= upto.at - %(long)s * interval '1 s'
ORDER BY i.listing_id, i.start LIMIT %(most)s
"""


def forget(now: datetime) -> int:
    """Delete what is older than it is kept; how many intervals went. Any number may run beside each other: nobody reads what goes."""
    cut = now - timedelta(days=settings.SPOT_HISTORY_DAYS)
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute(_OLD, {"cut": cut, "long": INTERVAL_S, "most": FORGOTTEN})
            old = [pk for (pk,) in cursor.fetchall()]
        for model in (SpotNotice, SpotResult):
            model.objects.filter(interval_id__in=old).delete()
        gone, _ = SpotInterval.objects.filter(pk__in=old).delete()
    return gone

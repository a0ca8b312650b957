"""A site's profit and loss in the operator's admin: chart, numbers, CSV, receipts by file; and nobody else's."""

from datetime import timedelta

import pytest
from django.utils import timezone

from marketplace.admin import profit_chart
from marketplace.admin.profit_chart import Slice
from marketplace.models import ProfitHour, Receipt, Site
from marketplace.services import profit
from tests import factories as f
from tests.marketplace.admin.test_tenancy import url

pytestmark = pytest.mark.django_db
HOUR = timedelta(hours=1)


@pytest.fixture
def lived(mine):
    now = timezone.now()
    start = now.replace(minute=0, second=0, microsecond=0) - HOUR
    f.miner(mine.site, measured_at=start)
    Site.objects.filter(pk=mine.site.pk).update(sampled_at=start)
    f.accounted(Site.objects.get(pk=mine.site.pk), now=start + timedelta(seconds=60))
    profit.rebuild(mine.site, start, start + HOUR)
    return start


def test_the_page_its_chart_and_its_csv(client, mine, lived):
    assert url("site", "profit", mine.site.pk) in client.get(url("site", "change", mine.site.pk)).content.decode()
    for window in ("24h", "7d", "31d", "nonsense"):
        page = client.get(url("site", "profit", mine.site.pk), {"window": window})
        assert page.status_code == 200
        text = page.content.decode()
        for words in ("Energy of hashing", "pool has not said", "Demand response", "<svg", "tr-zero"):
            assert words in text
    file = client.get(url("site", "profit-csv", mine.site.pk))
    assert file["Content-Type"].startswith("text/csv")
    assert len(file.content.splitlines()) == 1 + 4


def test_without_an_hour_it_says_so(client, mine):
    assert "No hour of this time is on record" in client.get(url("site", "profit", mine.site.pk)).content.decode()


def test_receipts_by_file_and_by_form(client, mine, lived):
    line = f"hashing,a pool,7,{lived.isoformat()},{(lived + HOUR).isoformat()},12.5,"
    text = f"kind,source,reference,start,end,amount_usd,amount_sat\n{line}\n"
    refused = client.post(url("site", "profit", mine.site.pk), {"text": text.replace("12.5", "much")})
    assert refused.status_code == 200
    assert "Line 2" in refused.content.decode()
    assert client.post(url("site", "profit", mine.site.pk), {}).status_code == 200
    assert not Receipt.objects.exists()
    assert client.post(url("site", "profit", mine.site.pk), {"text": text}).status_code == 302
    shown = client.get(url("site", "profit", mine.site.pk)).content.decode()
    assert "12.50 USD" in shown
    profit.rebuild(mine.site, lived, lived + HOUR)
    assert ProfitHour.objects.get(kind="hashing").paid_microusd == 12_500_000
    row = Receipt.objects.get()
    assert "a pool" in client.get(url("receipt", "changelist")).content.decode()
    assert client.get(url("receipt", "change", row.pk)).status_code == 200


def test_another_operators_site_is_not_there(client, theirs):
    for page in ("profit", "profit-csv"):
        assert client.get(url("site", page, theirs.site.pk)).status_code == 404


def test_bars_stand_on_their_side_of_the_line():
    day = timezone.now().replace(hour=0, minute=0, second=0, microsecond=0)
    plain = Slice(day, (100, 50, 0), (30, 20, 10), True)
    paid_to_draw = Slice(day + HOUR, (0, 50, 0), (-30, 20, 0), True)
    assert [v for _, *v in profit_chart._stacked(plain)] == [[0, 100], [100, 150], [-30, 0], [-50, -30], [-60, -50]]
    assert [v for _, *v in profit_chart._stacked(paid_to_draw)] == [[0, 50], [50, 80], [-20, 0]]
    assert (plain.margin, paid_to_draw.margin) == (90, 60)
    drawn = profit_chart.bars([plain, paid_to_draw], 1)
    assert drawn.count("<path") == 6
    assert "nan" not in drawn

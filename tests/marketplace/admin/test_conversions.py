"""The conversion planner in the operator's admin: from the form to the page, its CSV, and nobody else's."""

import pytest

from marketplace.models import ConversionPlan
from tests.marketplace.admin.test_tenancy import url

pytestmark = pytest.mark.django_db


def test_from_the_form_to_the_page(client, mine):
    assert client.get(url("conversionplan", "add")).status_code == 200
    done = client.post(
        url("conversionplan", "add"),
        {
            "site": mine.site.pk, "name": "First", "kind": "lease", "price_usd": "160.50", "cooling": "air", "crews": "2",
            "capital_musd": "900",
        },
    )  # fmt: skip
    assert done.status_code == 302, done.context["errors"]
    row = ConversionPlan.objects.get()
    assert row.given["income"] == {"kind": "lease", "cents_per_kw_month": 16_050}
    assert row.given["capital_cents"] == 900 * 10**8
    page = client.get(url("conversionplan", "change", row.pk)).content.decode()
    for words in ("Which hall, when", "hashing bridge", "What would change it", "Given", "NEC, CEC"):
        assert words in page
    assert "nan" not in page.lower().split()
    months = client.post(url("conversionplan", "months", row.pk))
    assert months["Content-Type"].startswith("text/csv")
    assert len(months.content.splitlines()) == 1 + 180


def test_a_refusal_is_shown_beside_the_form(client, mine):
    mine.site.power_nodes.update(cap_w=1)
    shown = client.post(
        url("conversionplan", "add"), {"site": mine.site.pk, "name": "x", "kind": "lease", "cooling": "air"}
    )
    assert shown.status_code == 200
    assert "the hall has 1 W" in shown.content.decode()
    assert not ConversionPlan.objects.exists()


def test_another_operators_site_is_no_choice(client, mine, theirs):
    done = client.post(
        url("conversionplan", "add"), {"site": theirs.site.pk, "name": "x", "kind": "lease", "cooling": "air"}
    )
    assert done.status_code == 200
    assert not ConversionPlan.objects.exists()

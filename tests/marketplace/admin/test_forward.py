"""What operators and our own people see of the forward market: to read, and nobody else's."""

import pytest

from tests import factories
from tests.marketplace.admin.test_tenancy import url

pytestmark = pytest.mark.django_db


def test_an_operator_sees_what_is_sold_on_of_its_listings(client, mine, theirs):
    own = factories.resale(mine.listing, factories.organization("Aurora Models"))
    other = factories.resale(theirs.listing, factories.organization("Borealis"))
    page = client.get(url("resale", "changelist")).content.decode()
    assert "Aurora Models" in page
    assert "0 of 2 GPUs" in page
    assert "Borealis" not in page
    assert client.get(url("resale", "change", own.pk)).status_code == 200
    assert client.get(url("resale", "change", other.pk)).status_code != 200

"""A market of a few hours with everybody in it, over the end of a month; `full`: some days of several seeds."""

import pytest

from sandbox.market import environment, report
from sandbox.market.market import Market

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.mark.parametrize(
    ("seed", "days"), [(1, 0.5), *(pytest.param(seed, 3, marks=pytest.mark.full) for seed in (2, 3, 4))]
)
def test_every_promise_is_kept_and_the_books_balance(seed, days):
    environment.empty()
    outcome = Market(seed, days=days).run()
    assert not outcome.violations, "\n".join(report.lines(outcome))
    assert outcome.counts["closes"] == 1
    assert outcome.counts["jobs"] > 0
    assert outcome.promises["every running second billed once"]["kept"] > 0
    assert outcome.money["invoiced"] > 0

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from billing.core import budgets
from billing.core.money import EXPONENTS

pytestmark = pytest.mark.serverless
BOUNDED = settings(max_examples=60, deadline=None, derandomize=True)
KINDS = ("usage", "commitment", "overage", "upfront", "drawdown", "resale", "credit")
LINES = st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from((0, 2_678_400)), st.integers(-500, 10_000)))


@BOUNDED
@given(LINES, LINES)
def test_a_month_is_the_sum_of_its_lines_however_they_were_billed(billed, to_come):
    month = 2_678_400
    whole = budgets.spent([*billed, *to_come], month)
    assert whole == budgets.spent(billed, month) + budgets.spent(to_come, month)
    assert whole == sum(n for kind, m, n in billed + to_come if m == month and kind not in {"upfront", "drawdown"})


def test_paying_at_signing_is_not_spending_twice():
    lines = [("upfront", 0, 900), ("commitment", 0, 300), ("drawdown", 0, -300), ("credit", 0, -20), ("usage", 0, 50)]
    assert budgets.spent(lines, 0) == 330


@BOUNDED
@given(st.integers(-100, 10_000), st.integers(0, 10_000), st.integers(0, 500))
def test_a_step_is_reached_by_the_cent_and_never_left_by_spending_more(spent, budget, more):
    step = budgets.reached(spent, budget)
    assert step in {0, *budgets.STEPS}
    assert all((spent * 100 >= s * budget) == (s <= step) for s in budgets.STEPS) or (spent < 0 and step == 0)
    assert budgets.reached(spent + more, budget) >= step
    assert (step == 100) == (spent >= budget)


@pytest.mark.parametrize(
    ("spent", "step"), [(49_99, 0), (50_00, 50), (79_99, 50), (80_00, 80), (99_99, 80), (100_00, 100)]
)
def test_steps_of_a_hundred_dollars(spent, step):
    assert budgets.reached(spent, 100_00) == step


@BOUNDED
@given(st.integers(0, 10**12), st.sampled_from(sorted(EXPONENTS)), st.integers(1, 10**9))
def test_rates_and_minor_units(minor, currency, more):
    rate = budgets.billionths(minor, currency)
    assert budgets.minor(rate, currency) == minor
    assert budgets.minor(rate + more, currency) > minor  # what is over a limit is shown as over it
    # 8 GPUs at 2.5 an hour
    assert budgets.minor(8000 * 2_500_000, "USD") == 2000
    assert budgets.minor(8000 * 2_500_000, "JPY") == 20

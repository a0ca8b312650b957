import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.core.slices import refused, shared

pytestmark = pytest.mark.serverless
cells = st.dictionaries(st.integers(1, 5), st.integers(0, 40), max_size=5)


@given(limit=st.integers(0, 60), cell=st.integers(1, 5), need=st.integers(0, 60), slices=cells, held=cells)
def test_slices_keep_to_the_limit_and_under_nobody_who_holds_something(limit, cell, need, slices, held):
    new = shared(limit, cell, need, slices, held)
    assert sum(new.values()) <= max(limit, sum(held.values()))
    assert all(new[c] >= milli for c, milli in held.items())
    elsewhere = sum(milli for c, milli in held.items() if c != cell)
    assert new[cell] >= min(need, limit - elsewhere)
    assert all(new[c] <= max(slices.get(c, 0), held.get(c, 0)) for c in new if c != cell)


@given(limit=st.integers(0, 60), wishes=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 20)), max_size=12))
def test_cells_that_take_turns_fill_the_limit_and_no_more(limit, wishes):
    slices, held = {}, {}
    for cell, milli in wishes:
        room = sum(held.values()) + milli <= limit
        need = held.get(cell, 0) + milli
        if need > slices.get(cell, 0):
            slices = shared(limit, cell, need, slices, held)
        assert (need <= slices[cell]) == room  # what still fits is never refused for how it was shared out
        if room:
            held[cell] = need


def test_what_nobody_has_is_shared_by_halves_and_what_others_do_not_hold_comes_after_it():
    assert shared(100, 1, 8, {}, {}) == {1: 54}
    assert shared(100, 2, 8, {1: 54}, {1: 8}) == {1: 54, 2: 27}
    assert shared(100, 2, 60, {1: 54, 3: 20}, {1: 8, 2: 8}) == {1: 20, 2: 60, 3: 20}


def test_a_limit_that_was_lowered_is_taken_back_from_who_does_not_hold_it():
    assert shared(10, 1, 4, {1: 50, 2: 50}, {1: 2, 2: 7}) == {1: 3, 2: 7}
    assert shared(10, 1, 4, {1: 50, 2: 50}, {1: 5, 2: 7}) == {1: 5, 2: 7}


@given(st.lists(st.tuples(st.integers(1, 2), st.integers(0, 9)), max_size=12), st.integers(0, 20))
def test_jobs_are_refused_by_what_their_own_organization_has_left(wishes, free):
    jobs = [(n, organization, milli) for n, (organization, milli) in enumerate(wishes)]
    out = refused(jobs, {1: free})
    assert {organization for n, organization, _ in jobs if n in out} <= {1}
    taken = 0
    for n, organization, milli in jobs:
        if organization == 1:
            assert (n in out) == (taken + milli > free)
            taken += 0 if n in out else milli

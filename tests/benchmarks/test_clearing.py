"""The benchmark's held hosts: cleared by moves that land, and then there is room."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import clearing
from tests.scheduler.core.test_defrag import check, full_cell

pytestmark = pytest.mark.serverless


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_a_held_host_is_cleared_by_moves_that_land(seed, limit):
    packer, work, wanted = full_cell(seed)
    for one in wanted:
        for h in clearing.cheapest(packer.state, work, one, 8)[:2]:
            moves, left = clearing.drain(packer.state, packer.tables, work, one, h, limit)
            after = check(packer.state, work, moves, limit)
            assert all(m.row == h for m in moves)
            assert left >= 0
            if left == 0:
                assert clearing.room(after, one.vector, h) >= 0

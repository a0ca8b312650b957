"""The planner's copy of a fleet, and the groups of hosts in equal states."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from scheduler.core import fit_kernels as fit
from scheduler.core.pack import equal_states, equal_states_plain, make_state
from scheduler.core.types import Fleet

one = st.fixed_dictionaries(
    {
        "cpu_free": st.sampled_from([0, 1000, 2**40]),
        "gpu_model": st.integers(0, 1),
        "gpu_free": st.lists(st.sampled_from([0, 250, 1000]), max_size=3),
        "nvlink": st.lists(st.integers(-1, 1), max_size=3),
        "leaf": st.integers(0, 3),
    }
)
host = one.map(lambda h: {**h, "gpu_count": len(h["gpu_free"]), "nvlink": h["nvlink"][: len(h["gpu_free"])]})


def fleet(hosts):
    return Fleet.build([{"host_id": i + 1, **h} for i, h in enumerate(hosts)])


@given(st.lists(host, min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_groups_are_those_of_the_plain_twin(hosts, random):
    order = np.array(random.sample(range(len(hosts)), len(hosts)), np.int64)
    state = make_state(fleet(hosts), order)
    groups, count = equal_states(state)
    assert (groups.tolist(), count) == equal_states_plain(state)


@given(st.lists(host, min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_a_state_is_the_fleet_in_another_order(hosts, random):
    made = fleet(hosts)
    order = np.array(random.sample(range(len(hosts)), len(hosts)), np.int64)
    state = make_state(made, order)
    assert (state.gfree == made.gpu_free[order]).all()
    assert (state.vfree == made.vram_free[order]).all()
    assert (state.nvl == made.nvlink[order]).all()
    assert (state.rows[:, fit.CPU] == made.cpu_free[order]).all()
    assert (state.rows[:, fit.TOTAL] == made.gpu_free.sum(axis=1)[order]).all()
    state.gfree[:] = -1  # a copy: the fleet stays
    assert (make_state(made).gfree == made.gpu_free).all()

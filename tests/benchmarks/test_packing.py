import numpy as np
import pytest

from benchmarks import packing, packing_bound, protocol, traces
from benchmarks.__main__ import main
from benchmarks.harness import Options, WorkNotDoneError

pytestmark = pytest.mark.serverless
ROOM = traces.Nodes(cpu=[8000] * 3, ram=[1 << 20] * 3, gpus=[2, 2, 2], model=[0, 0, 0], models=["A"])


def pods(*rows):
    """Pods as (count, CPU, GPUs, milli)."""
    return np.array([(cpu, 1, gpus, milli, 0) for n, cpu, gpus, milli in rows for _ in range(n)], np.int64).reshape(
        -1, 5
    )


@pytest.mark.parametrize(
    ("arrived", "most"),
    [
        (pods((3, 1, 1, 1000)), 50.0),  # all there is
        (pods((9, 1, 1, 1000)), 100.0),  # all there is room for
        (pods((9, 1, 1, 600)), 60.0),  # two of them share no GPU
        (pods((6, 1, 1, 600), (6, 1, 1, 400)), 100.0),
        (pods((9, 4000, 1, 1000)), 100.0),
        (pods((9, 8000, 1, 1000)), 50.0),  # CPU for three
        (pods((2, 1, 4, 1000)), 0.0),  # no host has four
    ],
)
def test_the_bound_of_a_cell_that_can_be_counted_by_hand(arrived, most):
    assert packing_bound.allocated(ROOM, arrived, arrived[:0]) == pytest.approx(most, abs=1e-6)


def test_who_keeps_what_wastes_is_bound_by_it():
    arrived = pods((6, 1, 1, 600), (6, 1, 1, 1000))
    assert packing_bound.allocated(ROOM, arrived, arrived[:0]) == pytest.approx(100)
    assert packing_bound.allocated(ROOM, arrived, arrived[:3]) == pytest.approx((3 * 600 + 3 * 1000) / 60)


def test_no_policy_is_above_the_bound_and_any_seed_has_an_order(tmp_path):
    nodes, trace = traces.generate(60, (1, 2))
    for seed in (1, 2):
        ours = packing.play(nodes, trace, seed, "tailrace")
        for at, (free, keeping) in zip(ours.at, packing.bounds(nodes, trace, seed, ours), strict=True):
            assert at <= keeping + 1e-6
            assert keeping <= free + 1e-6
    rows = ["cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec"]
    rows += [f"{c},{r},{g},{m}," for c, r, g, m, _ in trace.pods[:300].tolist()]
    (tmp_path / "openb").mkdir()
    (tmp_path / "openb" / "openb_pod_list_mine.csv").write_text("\n".join(rows))
    drawn = packing._read(tmp_path, "mine", nodes, (7,))
    arrivals, permutation, _ = protocol.order(drawn.pods, nodes.gpu_total, 7, len(nodes))
    assert (drawn.orders[7][0] == arrivals).all()
    assert drawn.orders[7][1] == permutation
    assert packing.play(nodes, drawn, 7, "tailrace").placed > 0


def test_weights_change_the_policy_and_an_unknown_one_is_named(monkeypatch, capsys):
    nodes, trace = traces.generate(60, (1,))
    weights = packing.DEFAULT_WEIGHTS
    as_it_is = packing.play(nodes, trace, 1, "tailrace")
    assert packing.play(nodes, trace, 1, "tailrace", weights=weights).at == as_it_is.at
    assert packing.play(nodes, trace, 1, "tailrace", weights=weights._replace(hole=0.0)).at != as_it_is.at
    with pytest.raises(WorkNotDoneError, match="--weights whole: there are fragmentation, hole,"):
        packing.run(Options(weights=(("whole", 1.0),)))
    assert main(["packing", "--weights", "whole=1"]) == 1
    assert "whole" in capsys.readouterr().err


def test_the_ablation_leaves_out_each_weight_once():
    nodes, trace = traces.generate(60, (1,))
    found = packing.ablation(nodes, {"generated": lambda: trace}, (1,), {}, packing.DEFAULT_WEIGHTS)
    assert list(found) == ["none", *packing.TERMS]
    base = packing.play(nodes, trace, 1, "fgd").at
    ours = packing.play(nodes, trace, 1, "tailrace").at
    assert found["none"][:2] == [round(a - b, 3) for a, b in zip(ours, base, strict=True)]
    for name in ("fragmentation", "hole"):
        assert found[name] != found["none"], f"{name} is left out for nothing"

"""What figures verify a host, what they say when they do not, and the score."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.site.benchmarks import SUSTAINED
from scheduler.core.verification import CEILING, EXPECTED, FIGURES, WORDS, bounds, said, score, shortcomings

pytestmark = pytest.mark.serverless
GOOD = {"disk_write_mb_s": 2400, "disk_read_mb_s": 5000, "network_down_kb_s": 100_000, "network_up_kb_s": 100_000}


def figures(model, gpus=8):
    matmul, memory, link = SUSTAINED[model]
    return {"gpus": gpus, "matmul_gflops": matmul, "memory_mb_s": memory, "fabric_mb_s": link, **GOOD}


@pytest.mark.parametrize("model", EXPECTED)
def test_what_well_kept_devices_sustain_passes(model):
    assert shortcomings(figures(model), bounds(model, 8, linked=True)) == ()
    assert EXPECTED[model].source


@pytest.mark.parametrize("claimed", EXPECTED)
@pytest.mark.parametrize("real", EXPECTED)
def test_a_device_that_is_much_slower_or_faster_than_stated_is_found_out(claimed, real):
    ratio = SUSTAINED[real][0] / EXPECTED[claimed].matmul_gflops
    if ratio < 0.55 or ratio > CEILING / 1000:
        assert shortcomings(figures(real), bounds(claimed, 8, linked=False))


@given(st.sampled_from(FIGURES), st.integers(0, 10**7))
def test_nothing_but_the_figure_that_falls_short_is_named(name, value):
    wanted = bounds("H100-SXM", 8, linked=True)
    bound = next(b for b in wanted if b.figure == name)
    fine = bound.low <= value and (not bound.high or value <= bound.high)
    told = shortcomings({**figures("H100-SXM"), name: value}, wanted)
    assert len(told) == (not fine)
    if told and name != "gpus":
        assert told[0].startswith(WORDS[name][0])


def test_what_is_not_there_falls_short_and_an_unknown_model_is_not_verified():
    assert len(shortcomings({}, bounds("H100-SXM", 8, linked=True))) == 8
    assert "data sheet" in shortcomings(figures("H100-SXM"), bounds("G2", 8, linked=True))[0]
    assert [b.figure for b in bounds("L40S", 4, linked=True)].count("fabric_mb_s") == 0  # no NVLink
    assert said("memory_mb_s", 3_350_000) == "Device memory, slowest GPU: 3,350 GB/s"


@given(st.integers(0, 10**7), st.integers(0, 10**7))
def test_the_score_is_that_of_a_gpu_and_rises_with_both(matmul, memory):
    found = {"matmul_gflops": matmul, "memory_mb_s": memory}
    assert score(found) <= score({**found, "matmul_gflops": matmul + 10_000})
    assert score(found) <= score({**found, "memory_mb_s": memory + 10_000})


def test_the_reference_scores_a_thousand():
    sheet = EXPECTED["H100-SXM"]
    assert score({"matmul_gflops": sheet.matmul_gflops, "memory_mb_s": sheet.memory_mb_s}) in {999, 1000}
    assert score({}) == 0

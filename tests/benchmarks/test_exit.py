"""The exit status of `python -m benchmarks NAME`: what says that the work was wrong is never a success, a slow machine is no failure."""

import json

import pytest

from benchmarks import __main__ as command
from benchmarks import gang, harness

pytestmark = pytest.mark.serverless


@pytest.fixture
def ends(monkeypatch):
    """Exit status of a benchmark that comes to these figures."""

    def run(figures, *options):
        report = harness.Report("gang", figures, must={"ms": ("<=", 2.0), "violations": ("<=", 0.0)})
        monkeypatch.setattr(gang, "run", lambda _: report)
        return command.main(["gang", *options])

    return run


def test_a_bound_that_is_missed_fails_only_when_it_is_asked_for(ends, capsys):
    assert ends({"ms": 1.0, "violations": 0}, "--strict") == 0
    assert ends({"ms": 9.0}) == 0
    assert "missed: ms" in capsys.readouterr().out
    assert ends({"ms": 9.0}, "--strict") == 2


@pytest.mark.parametrize("count", sorted(harness.WRONGS))
def test_a_count_of_what_must_never_happen_fails_always(ends, capsys, count):
    for options in ((), ("--quick",), ("--strict",), ("--json",)):
        assert ends({"ms": 1.0, count: 1}, *options) == 1
        said = capsys.readouterr()
        assert said.err == f"gang: the work was not right: {count}\n"
        if "--json" in options:  # what was found is told all the same
            assert json.loads(said.out.splitlines()[-1])["figures"][count] == 1
    assert ends({"ms": 1.0, count: 0}) == 0
    assert ends({"ms": 1.0, count: float("nan")}) == 1


def test_all_together_fail_with_any(monkeypatch):
    statuses = iter([0, 1, *[0] * len(harness.names())])
    monkeypatch.setattr(
        command.subprocess, "run", lambda *_, **__: command.subprocess.CompletedProcess([], next(statuses))
    )
    assert command.main(["all"]) == 1

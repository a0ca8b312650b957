"""The sandbox's screening service, as a process of its own and by its own words."""

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.screener import running

pytestmark = pytest.mark.serverless
ROOT = Path(__file__).resolve().parents[2]


def ask(screener, name, key="k1", **more):
    body = {"reference": key, "kind": "sanctions", "subject": {"name": name}, **more}
    return httpx.post(f"{screener.url}/screenings", json=body, headers={"Idempotency-Key": key})


def test_names_decide_and_the_key_is_the_question():
    with running() as screener:
        assert ask(screener, "Lumen Labs").json()["status"] == "clear"
        again = ask(screener, "Lumen Labs")
        assert (again.json()["id"], again.status_code) == ("scn_1", 201)
        assert ask(screener, "Somebody Else").status_code == 422
        found = ask(screener, "x", "k2", subject={"owners": ["The DENIED one"]}).json()
        assert (found["status"], found["matches"][0]["name"]) == ("match", "The DENIED one")
        assert httpx.post(f"{screener.url}/screenings", json={}).status_code == 400
        assert httpx.get(f"{screener.url}/screenings/scn_9").status_code == 404


def test_answers_wait_and_slow_ones_longer():
    with running() as screener:
        screener.control(wait=10)
        ids = [ask(screener, name, name).json() for name in ("quick", "slow one")]
        assert {a["status"] for a in ids} == {"pending"}
        screener.at = 11
        states = [httpx.get(f"{screener.url}/screenings/{a['id']}").json()["status"] for a in ids]
        assert states == ["clear", "pending"]


def test_faults_and_keys():
    with running(key="secret") as screener:
        assert ask(screener, "x").status_code == 401
    with running() as screener:
        with pytest.raises(ValueError, match="unknown fault"):
            screener.control(fault="rain")
        screener.control(fault="error")
        assert ask(screener, "x").status_code == 503
        screener.control(fault="down")
        with pytest.raises(httpx.HTTPError):
            ask(screener, "x")


def test_as_a_process():
    command = [sys.executable, "-m", "sandbox.screening", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[-1]
            assert httpx.get(f"{url}/control").json() == {"questions": 0, "asked": 0}
        finally:
            process.terminate()
        assert process.wait(10) == 0

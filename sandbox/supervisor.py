"""Starts the rows of `sandbox.processes`, watches them, and leaves none behind.

Not honcho: it has no notion of ready, does not outlive-proof its children when it is killed, and puts a Python process of
its own beside each child. Output goes straight to log files, so that nothing blocks when nobody reads.
"""

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from sandbox.processes import ROOT, Process
from sandbox.servers import Problem, children, ports

# A process that ends is started again and that is said; one that keeps ending ends the run.
RESTARTS, WITHIN_S = 5, 60.0


def run_once(name: str, command: Sequence[str], env: dict[str, str], log: Path) -> str:
    """Runs a command to its end and returns what it wrote. Raises Problem with its last lines when it fails."""
    with log.open("wb") as out:
        child = children.start(command, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, output=out)
        try:
            code = child.wait()
        except BaseException:
            children.stop(child, sign=signal.SIGTERM, patience=5)
            raise
    if code:
        raise Problem(f"{name} failed (exit code {code}); its log is {log}, and ends:\n{tail(log)}")
    return log.read_text(errors="replace")


def tail(log: Path, lines: int = 12) -> str:
    text = log.read_text(errors="replace") if log.exists() else ""
    return "\n".join(f"  {line}" for line in text.splitlines()[-lines:])


def answers(process: Process) -> bool:
    """Whether the process takes connections on its port and, where it names a path, answers below 500 there."""
    if process.port is None:
        return True
    try:
        if process.path is None:
            socket.create_connection((ports.LOOPBACK, process.port), timeout=1).close()
            return True
        connection = http.client.HTTPConnection(ports.LOOPBACK, process.port, timeout=5)
        try:
            connection.request("GET", process.path)
            return connection.getresponse().status < 500
        finally:
            connection.close()
    except (OSError, http.client.HTTPException):
        return False


class Supervisor:
    """The running rows. Use it from the main thread; call `watch` a few times a second.

    say: receives the supervisor's own sentences. restart: whether `watch` starts again what has ended.
    """

    def __init__(
        self,
        rows: Sequence[Process],
        env: dict[str, str],
        logs: Path,
        *,
        say: Callable[[str], None],
        restart: bool = True,
    ) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.rows = {row.name: row for row in rows}
        self.env = env
        self.logs = logs
        self.say = say
        self.restart = restart
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self._ended_at: dict[str, list[float]] = {}
        self._read: dict[str, int] = {}

    def log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def check(self) -> None:
        """Raises Problem for a busy port or an absent module, before anything is started."""
        for row in self.rows.values():
            if row.port is not None:
                ports.require_free(row.port, row.name)
            if find_spec(row.module.partition(".")[0]) is None or find_spec(row.module) is None:
                raise Problem(
                    f"The process {row.name} needs the module {row.module}, which is not there. Run `make setup`."
                )

    def start_all(self) -> None:
        """Starts the rows, those with `after` when all above them are ready. Raises Problem about one that does not come up."""
        starting: list[str] = []
        for name, row in self.rows.items():
            if row.after:
                self._await_all(starting)
            self.log(name).write_bytes(b"")
            if row.prepare and not (row.prepared and row.prepared.exists()):
                log = self.logs / f"{name}.prepare.log"
                run_once(f"preparing {name}", row.prepare, self.env | row.environment, log)
            self.start(name)
            starting.append(name)
        self._await_all(starting)

    def _await_all(self, starting: list[str]) -> None:
        while starting:
            self.await_ready(starting.pop(0))

    def start(self, name: str) -> int:
        """Starts one row (again) without waiting. Returns the pid."""
        row = self.rows[name]
        with self.log(name).open("ab") as out:
            child = children.start(
                row.command, env=self.env | row.environment, cwd=ROOT, stdin=subprocess.DEVNULL, output=out
            )
        self.running[name] = child
        return child.pid

    def await_ready(self, name: str, patience: float = 60.0) -> None:
        """Waits until the row answers. Raises Problem with the log's last lines when it ends or stays silent."""
        row, child = self.rows[name], self.running[name]
        deadline = time.monotonic() + patience
        while True:
            if child.poll() is not None:
                code = child.returncode
                raise Problem(f"{name} ended while starting (exit code {code}):\n{tail(self.log(name))}")
            if answers(row):
                return
            if time.monotonic() > deadline:
                raise Problem(f"{name} did not answer within {patience:.0f} s; its log ends:\n{tail(self.log(name))}")
            time.sleep(0.05)

    def kill(self, name: str, sign: int = signal.SIGKILL) -> None:
        """Signals one row's process (not its children) and waits for its end: for runs that break things on purpose."""
        self.running[name].send_signal(sign)
        self.running[name].wait()

    def watch(self, spare: Sequence[int] = ()) -> None:
        """Passes on the shown rows' new lines; says what has ended and starts it again. Raises Problem on the last straw.

        Orphans that have ended are buried, but for the pids in `spare`, for which somebody else waits.
        """
        children.bury({*spare, *(child.pid for child in self.running.values())})
        for name, row in self.rows.items():
            if row.show:
                self._show(name)
        for name, child in list(self.running.items()):
            if child.poll() is None:
                continue
            if not self.restart:
                del self.running[name]
                continue
            now = time.monotonic()
            recent = [at for at in self._ended_at.get(name, []) if now - at < WITHIN_S] + [now]
            self._ended_at[name] = recent
            if len(recent) > RESTARTS:
                raise Problem(
                    f"{name} ended {len(recent)} times within a minute; its log is {self.log(name)}, and ends:\n"
                    f"{tail(self.log(name))}"
                )
            self.say(f"{name} ended (exit code {child.returncode}; log: {self.log(name)}); starting it again")
            self.start(name)

    def _show(self, name: str) -> None:
        with self.log(name).open("rb") as log:
            log.seek(self._read.get(name, 0))
            text = log.read()
        whole, newline, _ = text.rpartition(b"\n")
        self._read[name] = self._read.get(name, 0) + len(whole) + len(newline)
        for line in whole.decode(errors="replace").splitlines() if newline else []:
            print(line, flush=True)

    def stop_all(self, *, patience: float = 20.0, spare: Sequence[int] = ()) -> None:
        """Ends the rows in reverse, all at once where they allow it, then whatever any of them left behind."""
        alive = [child for child in reversed(self.running.values()) if child.poll() is None]
        for child in alive:
            child.terminate()
        deadline = time.monotonic() + patience
        for child in alive:
            try:
                child.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        self.running.clear()
        children.end_descendants(spare=spare)


def say_to_terminal(sentence: str) -> None:
    print(f"run: {sentence}", file=sys.stderr, flush=True)

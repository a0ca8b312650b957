"""The small process above each job: started with a JSON request on stdin, it outlives the agent.

    {"folder": ".../plc_1", "command": [...], "env": {...}, "max_seconds": null, "grace_s": 30,
     "log_limit": 5242880, "data_limit": null, "lease_file": "..."}

It detaches, claims the folder (a second supervisor for it gives up), starts the command in `folder/work` as its own
session, pumps its output into `stdout` and `stderr` up to the limit, and writes `exit.json` at the end:
{"exit_code", "reason", "started_at", "finished_at"}. A SIGTERM makes it read `stop.json` {"reason", "grace_s"}: it leaves
`checkpoint-requested` in the workspace, sends SIGTERM to the job's group, and SIGKILL after the grace. The same happens by itself
after `max_seconds` and when the lease in `lease_file` nears its end. Orphans of the job become its children and end with it.
Stdlib only, and no import of the agent: it starts in a few milliseconds. Answers one JSON line: {"ok": true} or {"error"}.
"""

# No pathlib here: it would double the start-up time of a process that stands above every job.
# ruff: noqa: PTH105, PTH118, PTH123, PTH208

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import time
from typing import Any

LEASE_SLACK_S = 60.0
PATROL_S = 5.0
PR_SET_CHILD_SUBREAPER = 36


def start_ticks(pid: int) -> str:
    """What names a process beyond its pid: the boot and its start in clock ticks. "" when there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", encoding="latin-1") as file:
            fields = file.read().rpartition(")")[2].split()
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else f"{boot}:{fields[19]}"


def write(path: str, value: dict[str, Any]) -> None:
    temporary = f"{path}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


class Log:
    """A capped file: beyond the limit one notice is written and the rest is dropped."""

    def __init__(self, path: str, limit: int) -> None:
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.notice = f"\n[tailrace: the log ends here, its limit of {limit} bytes is reached]\n".encode()
        self.room = max(0, limit - 1 - len(self.notice))  # the whole stays under control's own limit
        self.ended = False

    def add(self, data: bytes) -> None:
        if self.ended:
            return
        if len(data) > self.room:
            data, self.ended = data[: self.room] + self.notice, True
        else:
            self.room -= len(data)
        os.write(self.file, data)


class Supervisor:
    def __init__(self, request: dict[str, Any]) -> None:
        self.request = request
        self.folder: str = request["folder"]
        self.work = os.path.join(self.folder, "work")
        self.logs = {
            name: Log(os.path.join(self.folder, name), int(request["log_limit"])) for name in ("stdout", "stderr")
        }
        self.kill_at: float | None = None
        self.reason = ""
        self.status: int | None = None

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def start(self) -> str | None:
        """Starts the command; answers an error text when it cannot be executed."""
        self.started_at = time.time()
        limit = self.request.get("data_limit")

        def limits() -> None:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            if limit:
                resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

        try:
            self.job = subprocess.Popen(
                self.request["command"],
                env=self.request["env"],
                cwd=self.work,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                preexec_fn=limits,  # noqa: PLW1509 - this process has one thread
                umask=0o077,
            )
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            text = f"cannot execute {self.request['command'][:1]}: {error}"
            self.logs["stderr"].add(f"tailrace: {text}\n".encode())
            code = 127 if isinstance(error, FileNotFoundError) else 126
            self.finish(code, "start_failed")
            return text
        write(self.path("pid.json"), self.names() | {"job": self.job.pid, "job_start": start_ticks(self.job.pid)})
        return None

    def names(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "start": start_ticks(os.getpid()), "started_at": self.started_at}

    def finish(self, code: int, reason: str) -> None:
        record = {"exit_code": code, "reason": reason, "started_at": self.started_at, "finished_at": time.time()}
        write(self.path("exit.json"), record)

    # --- the watch

    def watch(self) -> None:
        selector = selectors.DefaultSelector()
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_write, False)
        os.set_blocking(wake_read, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        selector.register(wake_read, selectors.EVENT_READ, None)
        for name, stream in (("stdout", self.job.stdout), ("stderr", self.job.stderr)):
            assert stream is not None
            os.set_blocking(stream.fileno(), False)
            selector.register(stream.fileno(), selectors.EVENT_READ, name)
        self.check()
        while self.status is None:
            for key, _ in selector.select(self.patience()):
                if key.data is None:
                    os.read(wake_read, 4096)
                else:
                    self._pump(selector, key.fd, key.data)
            self._reap()
            if self.status is None:
                self.check()
        self._end_group()
        end = time.monotonic() + 2.0
        while len(selector.get_map()) > 1 and time.monotonic() < end:
            ready = [key for key, _ in selector.select(0.1) if key.data is not None]
            for key in ready:
                self._pump(selector, key.fd, key.data)
            self._reap()
        code = os.waitstatus_to_exitcode(self.status)
        self.finish(128 - code if code < 0 else code, self.reason)

    def nudge(self, *_: Any) -> None:
        """The wake-up descriptor does the work: the next `check` reads stop.json."""

    @staticmethod
    def _now() -> float:
        return time.time()

    def patience(self) -> float:
        ends = [PATROL_S]
        if self.kill_at is not None:
            ends.append(self.kill_at - time.monotonic())
        if self.request.get("max_seconds") and not self.reason:
            ends.append(self.started_at + self.request["max_seconds"] - self._now())
        return max(0.0, min(ends))

    def _pump(self, selector: selectors.BaseSelector, fd: int, name: str) -> None:
        try:
            data = os.read(fd, 65_536)
        except BlockingIOError:
            return
        if data:
            self.logs[name].add(data)
        else:
            selector.unregister(fd)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.job.pid:
                self.status = status
                self.job.returncode = os.waitstatus_to_exitcode(status)

    def check(self) -> None:
        """Stops the job when it was asked to, ran its time, or its lease ends."""
        grace = float(self.request.get("grace_s") or 0)
        asked = read(self.path("stop.json"))
        if asked:
            self._stop(str(asked.get("reason", "drained")), float(asked.get("grace_s", grace)))
        maximum = self.request.get("max_seconds")
        if maximum and self._now() >= self.started_at + maximum:
            self._stop("max_seconds", grace)
        until = read(self.request.get("lease_file") or "").get("until")
        if until and self._now() >= until - grace - LEASE_SLACK_S:
            self._stop("lease_expired", grace)
        if self.kill_at is not None and time.monotonic() >= self.kill_at:
            if self.reason == "drained":
                self.reason = "killed_after_grace"
            self._kill(signal.SIGKILL)

    def _stop(self, reason: str, grace_s: float) -> None:
        kill_at = time.monotonic() + grace_s
        if self.reason:
            # Already stopping: a later request may only shorten the grace.
            self.kill_at = (
                min(self.kill_at if self.kill_at is not None else kill_at, kill_at) if grace_s <= 0 else self.kill_at
            )
            return
        self.reason, self.kill_at = reason, kill_at
        if grace_s > 0:
            write(os.path.join(self.work, "checkpoint-requested"), {"reason": reason, "grace_s": grace_s})
            self._kill(signal.SIGTERM)

    def _kill(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.job.pid, number)
        if number == signal.SIGKILL:
            self._end_orphans()

    def _end_group(self) -> None:
        """The job's first process is gone: nothing of it may stay behind."""
        self._kill(signal.SIGKILL)
        for _ in range(50):
            if not self._end_orphans():
                return
            time.sleep(0.02)

    def _end_orphans(self) -> bool:
        """Kills all descendants (orphans become our children: we are their reaper). True when there were any."""
        children: dict[int, list[int]] = {}
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                try:
                    with open(f"/proc/{entry}/stat", encoding="latin-1") as file:
                        fields = file.read().rpartition(")")[2].split()
                except OSError:
                    continue
                if fields[0] != "Z":
                    children.setdefault(int(fields[1]), []).append(int(entry))
        todo, found = [os.getpid()], False
        while todo:
            for child in children.get(todo.pop(), []):
                found = True
                todo.append(child)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
        self._reap()
        return found


def run(request: dict[str, Any], tell: int) -> None:
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    folder = request["folder"]
    try:
        os.close(os.open(os.path.join(folder, "claim"), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        os.write(tell, json.dumps({"ok": True, "claimed": True}).encode())
        return
    supervisor = Supervisor(request)
    # From the moment that the pid is known a SIGTERM may come; `check` reads what it means. (A handler is not inherited, SIG_IGN would be.)
    signal.signal(signal.SIGTERM, supervisor.nudge)
    supervisor.started_at = time.time()
    write(supervisor.path("pid.json"), supervisor.names())
    error = supervisor.start()
    os.write(tell, json.dumps({"error": error} if error else {"ok": True}).encode())
    os.close(tell)
    if error is None:
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        supervisor.watch()


def main() -> int:
    request = json.load(sys.stdin)
    reading, writing = os.pipe()
    if os.fork():
        os.close(writing)
        with os.fdopen(reading) as answers:
            text = answers.read()
        print(text or json.dumps({"error": "the supervisor ended before it started the command"}))
        return 0
    os.close(reading)
    try:
        run(request, writing)
    except Exception as error:
        with contextlib.suppress(OSError):
            os.write(writing, json.dumps({"error": f"supervisor: {error}"}).encode())
        os._exit(1)
    os._exit(0)
    return 0


if __name__ == "__main__":
    sys.exit(main())

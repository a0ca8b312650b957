"""Data folders: where they are, whose they are, and whether one is whole.

A folder holds `lock` (held by flock as long as any server of it runs; inside stands the pid that took it),
`tailrace.json` (state `making` from the first moment, `ready` written last) and the servers' own folders. We never
change the mode or the owner of a folder that we did not make.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandbox.servers.problems import Problem

ROOT = Path(__file__).resolve().parents[2]
# PostgreSQL refuses to run as root. This number belongs to no range that useradd, systemd or containers hand out.
UNPRIVILEGED = 60897
MARK = "tailrace.json"
SOCKETS = "sockets"  # a file that names the servers' socket folder, so that one left by a killed run is found


def server_uid() -> int | None:
    """The user that servers run as: a fixed unprivileged number when we are root, else None (ourselves)."""
    return UNPRIVILEGED if os.geteuid() == 0 else None


def home() -> Path:
    """The folder that holds this checkout's named data folders: `.data/`, or for root one under /var/lib.

    Root's checkout may stand where another user cannot look (as in /root), therefore not inside it.
    """
    if chosen := os.environ.get("TAILRACE_DATA_HOME"):
        return Path(chosen)
    if server_uid() is None:
        return ROOT / ".data"
    return Path("/var/lib") / f"tailrace-{hashlib.sha256(str(ROOT).encode()).hexdigest()[:10]}"


def named(name: str) -> Path:
    """The folder that `--data NAME` means: a name stands under `home()`, anything with a slash is a path."""
    return Path(name).absolute() if "/" in name else home() / name


def make_private(path: Path, uid: int | None) -> None:
    """Makes one folder, mode 0700, owned by the servers' user. The folder must not be there."""
    path.mkdir(mode=0o700)
    if uid is not None:
        os.chown(path, uid, uid)


def _make_parents(path: Path) -> None:
    for parent in reversed(path.parents):
        if not parent.exists():
            parent.mkdir(mode=0o755, exist_ok=True)


@dataclass
class DataFolder:
    """An open, locked data folder. The servers inherit `fd`, the lock, so that it is held until the last one ends."""

    path: Path
    fd: int
    temporary: bool
    mark: dict[str, Any]

    @property
    def ready(self) -> bool:
        return self.mark.get("state") == "ready"

    def write_mark(self, **mark: Any) -> None:
        """Writes the mark so that a crash leaves the old one or the new one."""
        part = self.path / (MARK + ".part")
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "w") as out:
            json.dump(mark, out)
            out.flush()
            os.fsync(out.fileno())
        part.rename(self.path / MARK)
        self.mark = mark

    def empty(self) -> None:
        """Forgets all but the lock: only for a folder whose mark says that it never became ready."""
        for entry in self.path.iterdir():
            if entry.name != "lock":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        self.mark = {}

    def close(self) -> None:
        """Lets go of the lock; a temporary folder is removed first."""
        if self.temporary:
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self.fd)


def open_named(name: str) -> DataFolder:
    """Opens, or makes, the folder of `--data NAME`.

    Raises Problem when another run holds it, when it holds something that is not ours, or when it is damaged.
    """
    path = named(name)
    if not path.exists():
        _make_parents(path)
        make_private(path, server_uid())
    fd = _lock(path)
    try:
        return DataFolder(path, fd, temporary=False, mark=_read_mark(path))
    except Problem:
        os.close(fd)
        raise


def open_temporary() -> DataFolder:
    """Makes a folder of its own that `close` removes, and sweeps away those that killed runs left behind."""
    base = home() if server_uid() is not None else ROOT / ".data"
    base = Path(os.environ.get("TAILRACE_DATA_HOME", base))
    _make_parents(base / "x")
    _sweep(base)
    path = Path(tempfile.mkdtemp(prefix="tmp-", dir=base))  # mkdtemp makes it 0700
    if (uid := server_uid()) is not None:
        os.chown(path, uid, uid)
    return DataFolder(path, _lock(path), temporary=True, mark={})


def _lock(path: Path) -> int:
    try:
        fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except PermissionError:
        owner = path.stat().st_uid
        raise Problem(
            f"The data folder {path} belongs to user {owner}; run this as that user, "
            "or choose another folder with --data."
        ) from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(fd, 20, 0).decode().strip() or "unknown"
        os.close(fd)
        raise Problem(
            f"The data folder {path} is in use by process {holder} (or by a server of it that is still stopping). "
            "Stop that run, or choose another folder."
        ) from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, str(os.getpid()).encode(), 0)
    return fd


def _read_mark(path: Path) -> dict[str, Any]:
    try:
        mark = json.loads((path / MARK).read_text())
    except FileNotFoundError:
        strange = sorted(entry.name for entry in path.iterdir() if entry.name not in {"lock", MARK + ".part"})
        if strange:
            raise Problem(
                f"The folder {path} holds files that are not ours ({', '.join(strange[:3])}); "
                "choose another folder with --data, or empty it yourself."
            ) from None
        return {}
    except ValueError:
        raise Problem(
            f"The data folder {path} is damaged: {MARK} cannot be read. "
            "`make reset` forgets the data and starts afresh."
        ) from None
    if mark.get("state") == "ready" and not (path / "postgres" / "PG_VERSION").exists():
        raise Problem(
            f"The data folder {path} is damaged: its PostgreSQL files are gone. "
            "`make reset` forgets the data and starts afresh."
        )
    return dict(mark)


def _sweep(base: Path) -> None:
    for left in base.glob("tmp-*"):
        try:
            fd = os.open(left / "lock", os.O_RDWR)
        except OSError:  # just being made, or another user's
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            forget_sockets(left)
            shutil.rmtree(left, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(fd)


def forget_sockets(folder: Path) -> None:
    """Removes the socket folder that a data folder's last run made, if it is still there."""
    note = folder / SOCKETS
    if note.exists():
        left = Path(note.read_text().strip())
        if left.name.startswith("trpg-"):
            shutil.rmtree(left, ignore_errors=True)
        note.unlink()


def reset(name: str) -> bool:
    """Removes the named data folder; False when there is none. Raises Problem when a run holds it or it is not ours."""
    path = named(name)
    if not path.exists():
        return False
    fd = _lock(path)
    try:
        if not (path / MARK).exists():
            _read_mark(path)
        forget_sockets(path)
        shutil.rmtree(path)
    finally:
        os.close(fd)
    return True

"""Child processes that never outlive us.

Linux gives three tools and all of them are used: a session of its own (the terminal's Ctrl-C reaches us, not the
servers), PR_SET_PDEATHSIG (a child is signalled when we are killed outright), and PR_SET_CHILD_SUBREAPER (what a child
leaves behind becomes ours, so that it can be found and ended).
"""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)


def adopt_orphans() -> None:
    """Makes this process the parent of whatever its descendants leave behind."""
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _die_with_parent(sign: int, parent: int) -> Callable[[], None]:
    # Runs in the child between fork and exec, after the change of user (which would clear the setting).
    def before_exec() -> None:
        _libc.prctl(PR_SET_PDEATHSIG, int(sign), 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return before_exec


def start(
    command: Sequence[str | Path],
    *,
    env: Mapping[str, str],
    cwd: Path | None = None,
    uid: int | None = None,
    own_session: bool = True,
    death_signal: int = signal.SIGTERM,
    stdin: int | IO[bytes] | None = None,
    output: int | IO[bytes] | None = None,
    keep_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Starts `command`; it gets `death_signal` when this process dies. `uid` (root only) drops to that user and group.

    Call it from the main thread: the kernel ties the death signal to the thread that started the child.
    """
    dropped: dict[str, object] = {} if uid is None else {"user": uid, "group": uid, "extra_groups": []}
    return subprocess.Popen(  # type: ignore[call-overload]
        [str(part) for part in command],
        env=dict(env),
        cwd=cwd,
        stdin=stdin,
        stdout=output,
        stderr=subprocess.STDOUT if output is not None else None,
        start_new_session=own_session,
        pass_fds=tuple(keep_fds),
        preexec_fn=_die_with_parent(death_signal, os.getpid()),  # noqa: PLW1509 (no threads are running here)
        **dropped,
    )


def stop(child: subprocess.Popen[bytes], *, sign: int, patience: float) -> int:
    """Signals one child, waits `patience` seconds, then kills it. Returns its exit code."""
    if child.poll() is None:
        child.send_signal(sign)
        try:
            child.wait(patience)
        except subprocess.TimeoutExpired:
            child.kill()
    return child.wait()


def bury(spare: Collection[int]) -> int:
    """Reaps what was left to this process by its descendants and has ended. Returns how many.

    Whoever adopts orphans must: else each stays a zombie, which others take for alive. `spare`: children that somebody waits for.
    """
    buried = 0
    for pid in map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()):
        if pid in spare:
            continue
        try:
            buried += os.waitpid(pid, os.WNOHANG)[0] != 0
        except ChildProcessError:
            continue
    return buried


def end_descendants(*, patience: float = 5.0, spare: Sequence[int] = ()) -> int:
    """Ends every descendant of this process but the pids in `spare` and what these started. Returns how many it met.

    With `adopt_orphans` this includes those that detached themselves into sessions of their own.
    """
    met: set[int] = set()
    deadline = time.monotonic() + patience
    while True:
        left = _descendants(spare)
        if not left:
            return len(met)
        late = time.monotonic() > deadline
        for process in left:
            try:
                if process.status() == psutil.STATUS_ZOMBIE:
                    os.waitpid(process.pid, os.WNOHANG)
                elif late:
                    process.kill()
                elif process.pid not in met:
                    process.terminate()
            except (psutil.NoSuchProcess, ChildProcessError):
                continue
            met.add(process.pid)
        time.sleep(0.05)


def _descendants(spare: Sequence[int]) -> list[psutil.Process]:
    found: list[psutil.Process] = []
    try:
        for child in psutil.Process().children():
            if child.pid not in spare:
                found += [child, *child.children(recursive=True)]
    except psutil.NoSuchProcess:  # one of them ended while we looked; the next round sees the rest
        pass
    return found

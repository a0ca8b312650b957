"""Makes `.venv` with the pinned packages. Standard library only: it runs before anything is installed.

`python3.11 sandbox/bootstrap.py` does nothing when the pins have not changed since the last time (a stamp inside .venv).
Wheels only: a machine without a compiler is told which wheel is missing, not shown a compiler's error.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "tailrace.stamp"
PINS = ("requirements.txt", "constraints.txt")
WANTED = (3, 11)


def say(sentence: str) -> None:
    print(f"setup: {sentence}", file=sys.stderr, flush=True)


def wanted_stamp() -> str:
    """What the stamp holds when .venv is up to date: the pins and the interpreter."""
    digest = hashlib.sha256(sys.version.encode())
    for name in PINS:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def main() -> int:
    if sys.version_info[:2] != WANTED:
        found = ".".join(str(part) for part in sys.version_info[:3])
        say(f"Python 3.11 is needed, and this is {found}. Name another interpreter: make PYTHON=/path/to/python3.11")
        return 78
    stamp = wanted_stamp()
    if is_current(stamp):
        return 0
    with (ROOT / ".venv.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another setup is at work in this checkout; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        return 0 if is_current(stamp) else install(stamp)


def is_current(stamp: str) -> bool:
    return PYTHON.exists() and STAMP.exists() and STAMP.read_text() == stamp


def install(stamp: str) -> int:
    if VENV.exists() and not works():
        say("the .venv here was made by an interpreter that is gone; making it anew")
        shutil.rmtree(VENV)
    if not VENV.exists():
        say("making .venv")
        made = subprocess.run([sys.executable, "-m", "venv", str(VENV)], capture_output=True, text=True, check=False)
        if made.returncode:
            shutil.rmtree(VENV, ignore_errors=True)
            say(
                "this Python cannot make virtual environments (on Debian and Ubuntu: apt-get install python3.11-venv). "
                f"It said: {(made.stdout + made.stderr).strip()[-300:]}"
            )
            return 78
    say("installing the pinned packages (once; a few minutes on a cold cache)")
    command = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--only-binary=:all:", "-c", ROOT / "constraints.txt", "-r", ROOT / "requirements.txt"]
    environment = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "PYTHONHOME"}}
    done = subprocess.run([str(part) for part in command], env=environment, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        say(
            "the packages could not be installed; pip's reason stands above. 'No matching distribution' names a package "
            "without a wheel for this machine (Linux x86-64 or aarch64 with glibc is needed); "
            "'connection' errors mean that the package index cannot be reached."
        )
        return 78
    STAMP.write_text(stamp)
    return 0


def works() -> bool:
    """Whether .venv has a Python 3.11 that starts and has pip."""
    if not PYTHON.exists():
        return False
    probe = [str(PYTHON), "-c", "import sys, pip; sys.exit(sys.version_info[:2] != (3, 11))"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main())

"""The process runtime: each placement is a session of real processes on this machine under `agent/supervise.py`.

No wall between tenants: it runs the operator's own work only. Folder of a placement: <root>/<id>/{work/, stdout, stderr,
pid.json, exit.json}. Nothing here keeps state in memory, so an agent that was killed finds everything again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from agent import supervise, verify
from agent.runtime import STREAMS, StartError, Status, Work

START_TIMEOUT_S = 20.0
SAVED = "checkpoint-saved"  # in the workspace: the work touches it whenever a checkpoint is whole
SAFE_ID = re.compile(r"[A-Za-z0-9_.-]{1,120}")


def _program(command: tuple[str, ...]) -> list[str]:
    """Control's own benchmark is a program of ours; everything else is what it says."""
    if command[:1] == (verify.PREFIX,):
        return [sys.executable, "-I", "-S", str(Path(verify.__file__).resolve()), *command[1:]]
    return list(command)


class ProcessRuntime:
    name = "process"

    def __init__(self, root: Path, *, log_limit: int, lease_file: Path | None = None) -> None:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.root, self.log_limit, self.lease_file = root.resolve(), log_limit, lease_file

    def folder(self, key: str) -> Path:
        if not SAFE_ID.fullmatch(key) or key.startswith("."):
            raise StartError(f"not a placement id: {key!r}")
        return self.root / key

    async def prepare(self, work: Work) -> None:
        folder = self.folder(work.id)
        try:
            (folder / "work").mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise StartError(f"workspace {folder}: {error.strerror}") from error

    async def tell(self, key: str, gang: dict[str, Any]) -> None:
        space = self.folder(key) / "work"
        if not space.is_dir():
            return
        # Beside the workspace first: the work owns what is inside, and must never read half a table.
        draft = self.folder(key) / "gang.json"
        draft.write_text(json.dumps(gang))
        draft.replace(space / "gang.json")

    async def start(self, work: Work) -> None:
        folder = self.folder(work.id)
        if not (folder / "work").is_dir():
            raise StartError(f"{work.id} was not prepared")
        if not work.command:
            raise StartError("the command is empty")
        space = str(folder / "work")
        env = {"PATH": os.environ.get("PATH", os.defpath), "HOME": space, "TMPDIR": space, "LANG": "C.UTF-8"}
        request = {
            "folder": str(folder),
            "command": _program(work.command),
            "env": env
            | {"TAILRACE_WORKSPACE": space, "TAILRACE_CHECKPOINT_FILE": f"{space}/checkpoint-requested"}
            | {"TAILRACE_GANG_FILE": f"{space}/gang.json", "TAILRACE_SAVED_FILE": f"{space}/{SAVED}"}
            | work.env,
            "grace_s": work.grace_s,
            "max_seconds": work.max_seconds,
            "log_limit": self.log_limit,
            # With GPUs the driver maps far more than the job uses: a data limit would kill honest work.
            "data_limit": work.ram_mib * 1024 * 1024 if work.ram_mib and not work.gpus else None,
            "lease_file": str(self.lease_file) if self.lease_file else "",
        }
        answer = await self._launch(json.dumps(request).encode())
        if "error" in answer and not (folder / "exit.json").exists():
            raise StartError(str(answer["error"]))

    async def _launch(self, request: bytes) -> dict[str, Any]:
        # -I and -S: the supervisor needs the standard library only, and starts in half the time.
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            "-S",
            supervise.__file__,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
            cwd=self.root,
        )
        try:
            out, _ = await asyncio.wait_for(process.communicate(request), START_TIMEOUT_S)
            answer = json.loads(out)
        except TimeoutError as error:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            raise StartError("the supervisor did not answer") from error
        except ValueError as error:
            raise StartError("the supervisor failed") from error
        return answer if isinstance(answer, dict) else {}

    async def status(self, key: str) -> Status:
        folder = self.folder(key)
        if done := supervise.read(str(folder / "exit.json")):
            return self._exited(folder, done)
        names = supervise.read(str(folder / "pid.json"))
        if not names:
            return Status("lost" if (folder / "claim").exists() else "missing")
        if supervise.start_ticks(int(names["pid"])) == names["start"]:
            return Status("running", started_at=names["started_at"], checkpoint_at=self._saved(folder))
        # It may have written its record between the two looks.
        if done := supervise.read(str(folder / "exit.json")):
            return self._exited(folder, done)
        self._kill_job(names, signal.SIGKILL)
        return Status("lost", started_at=names["started_at"])

    def _exited(self, folder: Path, done: dict[str, Any]) -> Status:
        code, reason = int(done["exit_code"]), str(done["reason"])
        return Status("exited", done["started_at"], done["finished_at"], code, reason, self._saved(folder))

    @staticmethod
    def _saved(folder: Path) -> float | None:
        """When the work last touched its mark, unless it says a time to come. A link is not followed: it is the work's own."""
        try:
            at = (folder / "work" / SAVED).lstat().st_mtime
        except OSError:
            return None
        return at if 0 <= at <= time.time() + 1 else None

    def _kill_job(self, names: dict[str, Any], number: int) -> None:
        job = int(names.get("job", 0))
        if job > 1 and supervise.start_ticks(job) == names.get("job_start"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(job, number)

    async def signal(self, key: str, number: int) -> None:
        folder = self.folder(key)
        if not (folder / "exit.json").exists():
            self._kill_job(supervise.read(str(folder / "pid.json")), number)

    async def stop(self, key: str, grace_s: float, reason: str) -> None:
        folder = self.folder(key)
        if not folder.is_dir() or (folder / "exit.json").exists():
            return
        supervise.write(str(folder / "stop.json"), {"reason": reason, "grace_s": grace_s})
        names = supervise.read(str(folder / "pid.json"))
        pid = int(names.get("pid", 0))
        if pid > 1 and supervise.start_ticks(pid) == names["start"]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    async def logs(self, key: str, stream: str, offset: int, limit: int) -> bytes:
        if stream not in STREAMS:
            raise ValueError(f"no such stream: {stream!r}")
        try:
            with (self.folder(key) / stream).open("rb") as file:
                file.seek(offset)
                return file.read(limit)
        except FileNotFoundError:
            return b""

    async def forget(self, key: str) -> None:
        await self.stop(key, 0, "stopped")
        for _ in range(100):
            if (await self.status(key)).state != "running":
                break
            await asyncio.sleep(0.05)
        shutil.rmtree(self.folder(key), ignore_errors=True)

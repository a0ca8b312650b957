"""PostgreSQL and Redis on a machine that has neither: private, on loopback, gone with the process that started them.

`python -m sandbox.servers run -- CMD` for a command; `Cluster` for a test that wants to stop and restart them.
"""

from types import TracebackType
from typing import Self

from sandbox.servers import folders
from sandbox.servers.postgres import APP, OWNER, PostgreSQL
from sandbox.servers.problems import Problem
from sandbox.servers.redis import Redis

__all__ = ["Cluster", "Problem"]


class Cluster:
    """A PostgreSQL and a Redis on one data folder; a context manager.

    data: the name of a folder that stays (see `folders.named`), or None for one that is removed at the end.
    ports: fixed ones, or None for free ones. unsafe_fast: no fsync; refused on a folder that stays.
    Raises Problem (a sentence for a person) when the machine does not allow it.
    """

    def __init__(
        self,
        data: str | None = None,
        *,
        postgres_port: int | None = None,
        redis_port: int | None = None,
        unsafe_fast: bool = False,
    ) -> None:
        if data and unsafe_fast:
            raise Problem("--unsafe-fast turns off fsync: it is for throw-away data only, not with --data.")
        self.note = ""
        self._folder = folders.open_named(data) if data else folders.open_temporary()
        try:
            self.postgres = PostgreSQL(self._folder, port=postgres_port, unsafe_fast=unsafe_fast)
            self.redis = Redis(self._folder, port=redis_port)
        except BaseException:
            self._folder.close()
            raise

    def __enter__(self) -> Self:
        try:
            if not self._folder.ready:
                if self._folder.mark:
                    self.note = (
                        f"The data folder {self._folder.path} was left half-written by an interrupted first start; "
                        "nothing had been stored in it yet, so it is made afresh."
                    )
                    self._folder.empty()
                self.postgres.create()
            self.postgres.start()
            self.redis.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stops both servers and lets go of the folder."""
        self.redis.stop()
        self.postgres.close()
        self._folder.close()

    def environment(self, *, as_owner: bool = False) -> dict[str, str]:
        """The variables for a client process. DATABASE_URL is the app's role, or the owner's with `as_owner`."""
        owner, app = self.postgres.url(OWNER), self.postgres.url(APP)
        return {
            "DATABASE_URL": owner if as_owner else app,
            "DATABASE_OWNER_URL": owner,
            "DATABASE_APP_URL": app,
            "REDIS_URL": self.redis.url,
        }

    def stopped(self) -> str | None:
        """A sentence about a server that ended by itself, or None while both run."""
        for name, server in (("PostgreSQL", self.postgres), ("Redis", self.redis)):
            if server.process is not None and (code := server.process.poll()) is not None:
                return f"{name} stopped by itself (exit code {code}); its log: {server.log}"
        return None

    def pids(self) -> list[int]:
        """The servers' own pids."""
        return [server.process.pid for server in (self.postgres, self.redis) if server.process is not None]

"""Which processes are the company on one machine: one table, for `make run` and for the smoke run on other ports.

Add a process by adding a row. Rows start together, but for those that say `after`: these start when all rows above them
are ready.
"""

import base64
import json
import os
import secrets
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Self

from sandbox.servers import ports

ROOT = Path(__file__).resolve().parents[1]
STRIPE_WEBHOOK_PATH = "/api/v1/webhooks/stripe"


@dataclass(frozen=True)
class Ports:
    """The ports of the house, on loopback. Simulated site number i listens on `site + i`."""

    web: int = 8000
    stream: int = 8001
    stripe: int = 8003
    feeds: int = 8005
    screening: int = 8007
    site: int = 8010

    @classmethod
    def based_on(cls, base: int) -> Self:
        """The usual layout, shifted so that the web stands on `base`."""
        return cls(**{each.name: int(str(each.default)) - 8000 + base for each in fields(cls)})

    @classmethod
    def free(cls) -> Self:
        """Ports that were free a moment ago, for a run beside others."""
        return cls(**{each.name: ports.free_port() for each in fields(cls)})

    def url(self, name: str, offset: int = 0) -> str:
        return f"http://{ports.LOOPBACK}:{getattr(self, name) + offset}"


@dataclass(frozen=True)
class Process:
    """A row: what to start, what shows that it is ready, and what must be run once before.

    port: ready when something accepts there (None: nothing to ask). path: and answers below 500 there.
    after: starts when all rows above it are ready.
    prepare: run to its end before the first start; `prepared` names the file that shows it has been done before.
    show: its lines are the show of `make run`; the others' go to their log files alone.
    """

    name: str
    command: tuple[str, ...]
    port: int | None = None
    path: str | None = None
    after: bool = False
    prepare: tuple[str, ...] = ()
    prepared: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)
    show: bool = False

    @property
    def module(self) -> str:
        """The Python module that the row runs."""
        return self.command[self.command.index("-m") + 1]


@dataclass(frozen=True)
class SiteFiles:
    """What the demo seed leaves for a site: `spec` for its physics, `config` and `token` for its agent, `state` is the agent's."""

    name: str
    folder: Path

    @property
    def spec(self) -> Path:
        return self.folder / "spec.json"

    @property
    def config(self) -> Path:
        return self.folder / "agent.json"

    @property
    def token(self) -> Path:
        return self.folder / "token"

    @property
    def state(self) -> Path:
        return self.folder / "agent"


def sites(house: Path) -> list[SiteFiles]:
    """The sites that the seed has written below `house`/sites, by name."""
    return [SiteFiles(folder.name, folder) for folder in sorted((house / "sites").glob("*")) if folder.is_dir()]


def environment(at: Ports, house: Path, servers: dict[str, str]) -> dict[str, str]:
    """The variables of every process: ours above the caller's, but for servers and Stripe, where the caller's stand."""
    given = {key: value for key, value in os.environ.items() if key not in {"DJANGO_SETTINGS_MODULE", "PYTHONPATH"}}
    own = {
        "DEVELOPMENT": "1",
        "PUBLIC_URL": at.url("web"),
        "STREAM_URL": at.url("stream"),
        "MEMPOOL_URL": at.url("feeds"),
        "ENERGY_PRICE_URL": at.url("feeds") + "/energy",
        "SCREENING_PROVIDER": "http",
        "SCREENING_URL": at.url("screening"),
        "NUMBA_CACHE_DIR": given.get("NUMBA_CACHE_DIR", str(ROOT / ".numba")),
        "PYTHONUNBUFFERED": "1",
    }
    defaults = {**servers, **_secrets(house)}
    if not given.get("STRIPE_SECRET_KEY"):
        defaults["STRIPE_BASE_URL"] = at.url("stripe")
    return {**defaults, **given, **own}


def _secrets(house: Path) -> dict[str, str]:
    """Secrets of this house, made once and kept in a file that only its owner reads."""
    file = house / "secrets.json"
    if not file.exists():
        made = {
            "SECRET_KEY": secrets.token_urlsafe(50),
            "SECRETS_KEY": base64.urlsafe_b64encode(secrets.token_bytes(32)).decode(),
            "STRIPE_SECRET_KEY": "sk_test_" + secrets.token_hex(16),
            "STRIPE_WEBHOOK_SECRETS": "whsec_" + secrets.token_hex(16),
        }
        part = file.with_suffix(".part")
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
            json.dump(made, out)
        part.rename(file)
    return dict(json.loads(file.read_text()))


def migrate() -> tuple[str, ...]:
    """The command that brings the schema up to date; run it with the owner's DATABASE_URL."""
    return (sys.executable, "manage.py", "migrate", "--no-input", "-v", "0")


def seed(at: Ports, house: Path) -> tuple[str, ...]:
    """The command that makes the demo market where it is not there yet, and writes `house`/sites (see SiteFiles)."""
    return _python("sandbox.demo", "seed", "--house", house, "--site-port", at.site)


def table(at: Ports, house: Path, env: dict[str, str], *, workers: int = 2, traffic: bool = True) -> list[Process]:
    """The rows. `env` is that of `environment`; call it after the seed, which decides which sites there are."""
    rows = []
    if env.get("STRIPE_BASE_URL") == at.url("stripe"):
        hook = ["--webhook", at.url("web") + STRIPE_WEBHOOK_PATH]
        for secret in env["STRIPE_WEBHOOK_SECRETS"].split(","):
            hook += ["--webhook-secret", secret]
        state = house / "stripe.sqlite3"
        rows.append(
            Process("stripe", _python("sandbox.stripe", "--port", at.stripe, "--state", state, *hook), at.stripe)
        )
    rows += [
        Process("feeds", _python("sandbox.feeds", "--port", at.feeds), at.feeds),
        Process("screening", _python("sandbox.screening", "--port", at.screening), at.screening),
        Process(
            "web",
            _python(
                "gunicorn",
                "marketplace.wsgi",
                "--bind",
                f"{ports.LOOPBACK}:{at.web}",
                "--worker-class=gthread",
                "--workers=2",
                "--threads=4",
                "--keep-alive=65",  # longer than a client waits between two calls: it never meets a closing door
                "--log-level=warning",
            ),
            at.web,
            "/api/v1/health",
        ),
        Process(
            "stream",
            _python(
                "uvicorn",
                "marketplace.stream:application",
                "--host",
                ports.LOOPBACK,
                "--port",
                at.stream,
                "--log-level=warning",
            ),
            at.stream,
        ),
    ]
    rows += [
        Process(
            f"worker-{number}",
            _python(
                "celery",
                "-A",
                "marketplace",
                "worker",
                "-n",
                f"worker-{number}@%h",
                "--concurrency=1",
                "--loglevel=WARNING",
                "--without-gossip",
                "--without-mingle",
            ),
        )
        for number in range(1, workers + 1)
    ]
    schedule = house / "beat.schedule"
    rows.append(
        Process(
            "beat",
            _python("celery", "-A", "marketplace", "beat", "--schedule", schedule, "--pidfile=", "--loglevel=WARNING"),
        )
    )
    for number, site in enumerate(sites(house)):
        rows += site_rows(at, site, number)
    if traffic:
        rows.append(Process("demo", _python("sandbox.demo", "traffic", "--house", house), after=True, show=True))
    return rows


def site_rows(at: Ports, site: SiteFiles, number: int) -> list[Process]:
    """A simulated site and the agent that runs it."""
    port = at.site + number
    token = site.token.read_text().strip() if site.token.exists() else ""
    record = site.folder / "truth.json"
    return [
        Process(
            f"site-{site.name}",
            _python("sandbox.site", "--spec", site.spec, "--port", port, "--record", record),
            port,
        ),
        Process(
            f"agent-{site.name}",
            _python("agent", "run", "--state", site.state),
            after=True,
            prepare=_python("agent", "enrol", "--url", at.url("web"), "--state", site.state, "--config", site.config),
            prepared=site.state / "identity.json",
            environment={"TAILRACE_ENROLMENT_TOKEN": token},  # not on a command line, where others could read it
        ),
    ]


def _python(module: str, *arguments: object) -> tuple[str, ...]:
    return (sys.executable, "-m", module, *(str(argument) for argument in arguments))

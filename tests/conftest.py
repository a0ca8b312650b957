"""The suite runs against real servers: `make test`, or `python -m sandbox.servers run --owner -- pytest ...` for a part of it.

Tests marked `serverless` need no database and run under bare pytest, too.
"""

import os

import pytest
from hypothesis import HealthCheck, settings

from tests import emptied, migrated
from tests.environment import HAS_SERVERS

# On two shared cores a deadline would test the machine. `ci` is the same run every time; `full` looks for new examples.
settings.register_profile(
    "ci", max_examples=60, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("full", max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_configure(config: pytest.Config) -> None:
    # Static files are found where they lie in the tree; nobody runs collectstatic for a test.
    config.addinivalue_line("filterwarnings", "ignore:No directory at:UserWarning")


@pytest.hookimpl(trylast=True)  # after -m and -k have chosen
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_SERVERS:
        return
    needing = [item for item in items if item.get_closest_marker("serverless") is None]
    if needing:
        raise pytest.UsageError(
            f"{len(needing)} of the tests chosen need PostgreSQL and Redis, and DATABASE_URL is not set. Run `make test`, "
            "or `.venv/bin/python -m sandbox.servers run --unsafe-fast --owner -- .venv/bin/python -m pytest ...`; "
            "`pytest -m serverless` runs those that need neither."
        )


@pytest.fixture(scope="session")
def django_db_modify_db_settings(
    django_db_modify_db_settings_parallel_suffix: None, pytestconfig: pytest.Config
) -> None:
    """Each test database is a copy of the migrated one."""
    from django.db import connection

    cache = pytestconfig.cache
    kept = cache.mkdir("migrated") if cache is not None else pytestconfig.rootpath / ".data"
    connection.settings_dict["TEST"]["TEMPLATE"] = migrated.template(os.environ["DATABASE_URL"], kept)


@pytest.fixture(scope="session")
def django_db_setup(django_db_setup: None) -> None:
    """Between two tests with real transactions rows are deleted: a TRUNCATE takes many times as long."""
    from django.test import TransactionTestCase

    TransactionTestCase._fixture_teardown = emptied.teardown  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def no_stray_web(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reaches a proxy or a paid service through the environment of whoever runs it."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)

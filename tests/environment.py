"""The suite's environment. Loaded by `-p` in pyproject.toml: pytest-django reads the settings before any conftest runs."""

import os

WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
HAS_SERVERS = "DATABASE_URL" in os.environ

os.environ.setdefault("DEVELOPMENT", "1")
if owner := os.environ.get("DATABASE_OWNER_URL"):
    os.environ["DATABASE_URL"] = owner  # the owner makes the test databases
if WORKER and "REDIS_URL" in os.environ:
    # A Redis database for each xdist worker, as pytest-django gives each a PostgreSQL database; 0 is nobody's.
    base = os.environ["REDIS_URL"].rpartition("/")[0]
    os.environ["REDIS_URL"] = f"{base}/{int(WORKER.removeprefix('gw')) + 1}"

"""One migrated database that every test database is copied from: migrations run once for each change of them, not once a worker
and run. What they made is kept as SQL under pytest's cache, by the contents of all migrations; Django's own `migrate` still runs on
each copy, and finds nothing to do.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import django
import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.sql import SQL, Identifier

from sandbox.servers.postgres import binaries

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = "tailrace_migrated"
# Rows are deleted between tests (tests.emptied). Where a vacuum came in between, new ones would be written into the gaps, now and then,
# and a list without an order would be in another one.
_IN_ORDER = """
DO $$ DECLARE name regclass; BEGIN
  FOR name IN SELECT c.oid FROM pg_class c WHERE c.relkind = 'r' AND c.relnamespace = 'public'::regnamespace LOOP
    EXECUTE format('ALTER TABLE %s SET (autovacuum_enabled = false)', name);
  END LOOP;
END $$
"""
_LOCK = 7_243_019  # one worker makes it, the others wait


def template(server: str, cache: Path) -> str:
    """The name of the migrated database on `server` (its owner's URL), made if it is not there yet."""
    with psycopg.connect(server, autocommit=True) as owner:
        owner.execute("SELECT pg_advisory_lock(%s)", [_LOCK])
        if owner.execute("SELECT FROM pg_database WHERE datname = %s", [TEMPLATE]).fetchone() is None:
            kept = cache / f"{_key()}.sql"
            making = f"{TEMPLATE}_{os.getpid()}"
            owner.execute(SQL("CREATE DATABASE {}").format(Identifier(making)))
            target = server.rpartition("/")[0] + f"/{making}"
            if kept.exists():
                _tool("psql", target, "--quiet", "--set=ON_ERROR_STOP=1", "--single-transaction", f"--file={kept}")
            else:
                command = [sys.executable, "manage.py", "migrate", "--verbosity=0", "--skip-checks"]
                subprocess.run(command, cwd=ROOT, env=os.environ | {"DATABASE_URL": target}, check=True)
                for old in cache.glob("*.sql"):
                    old.unlink(missing_ok=True)
                part = kept.with_suffix(f".{os.getpid()}")
                _tool("pg_dump", target, "--no-sync", f"--file={part}")
                part.rename(kept)
            with psycopg.connect(target, autocommit=True) as made:
                made.execute(_IN_ORDER)
            owner.execute(SQL("ALTER DATABASE {} RENAME TO {}").format(Identifier(making), Identifier(TEMPLATE)))
    return TEMPLATE


def _key() -> str:
    """Of everything that migrations are made of: ours, and the packages that bring some."""
    digest = hashlib.sha256(f"{sys.version} {django.__version__}".encode())
    for path in sorted([*ROOT.glob("*/migrations/*.py"), *ROOT.glob("requirements*.txt")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:20]


def _tool(name: str, url: str, *arguments: str) -> None:
    parts = conninfo_to_dict(url)
    env = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "PGPASSWORD": str(parts["password"])}
    where = [f"--host={parts['host']}", f"--port={parts['port']}", f"--username={parts['user']}"]
    command = [binaries() / name, *where, f"--dbname={parts['dbname']}", *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")

"""A private PostgreSQL and Redis for the benchmarks that need them, started once a process, durable as in production."""

from __future__ import annotations

import atexit
import os

_ready = False


def ready() -> None:
    """Start the servers, set Django up against them and migrate. Again is no work. The servers end with the process."""
    global _ready
    if _ready:
        return
    from sandbox.servers import Cluster

    cluster = Cluster()
    cluster.__enter__()
    atexit.register(cluster.close)
    os.environ.update(cluster.environment(as_owner=True))
    os.environ.setdefault("DEVELOPMENT", "1")
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "marketplace.settings")
    import django
    from django.core.management import call_command

    django.setup()
    call_command("migrate", verbosity=0)
    _ready = True

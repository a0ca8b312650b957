"""The Celery application. Tasks are thin; marketplace.outbox says what must happen."""

import os

from celery import Celery
from celery.signals import worker_init

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "marketplace.settings")
app = Celery("tailrace")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks(["marketplace", "scheduler", "billing"])


@worker_init.connect
def _kernels(**_: object) -> None:
    """Load the planner's compiled kernels before the pool forks: the first cycle of each process finds them there."""
    from scheduler.core.warm import warm

    warm()

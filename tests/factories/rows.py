"""What all builders share: the instant at which their world stands, a number for names, the event of a row that is new."""

from datetime import UTC, datetime
from itertools import count
from typing import Any

from django.db import transaction

from marketplace.services import transitions

NOW = datetime(2026, 11, 2, 12, tzinfo=UTC)
number = count(1)


def created(model: Any, row: Any) -> None:
    with transaction.atomic():
        transitions.record_created(model, [row.pk], state=row.state, now=row.created_at, actor="factory")

from typing import Any

from django.db import migrations
from django.utils import timezone


def close_without_batch(apps: Any, _editor: Any) -> None:
    """A lowering from before there were batches has no look at the meters to be judged by: it would fail, and its machine be
    called unresponsive. Closed, the machine is believed like one that slept before anybody told it to; its watts stay booked
    until then.
    """
    claims = apps.get_model("marketplace", "ShedClaim").objects.filter(state="commanded", batch=None)
    claims.update(state="failed", reason="superseded", settled_at=timezone.now())


class Migration(migrations.Migration):
    dependencies = [
        ("marketplace", "0016_contract_life"),
    ]

    operations = [
        migrations.RunPython(close_without_batch, migrations.RunPython.noop, elidable=True),
    ]

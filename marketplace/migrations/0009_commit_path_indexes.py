"""Indexes that cost every placement and serve no query alone are gone; taints and leaving hours are watched like the rest of a host."""

import django.db.models.deletion
from django.db import migrations, models


WATCHED = [
    "site_id", "cell_id", "power_node_id", "listing_id", "gpu_model_id", "name", "state", "leaf", "spine", "gpu_count", "vcpu_milli",
    "ram_mib", "nvme_gib", "vram_mib", "nvlink_domains", "gpu_free", "vram_free", "vcpu_free", "ram_free", "nvme_free",
    "cpu_only_active", "standby_w", "parked_w", "base_w", "gpu_min_w", "gpu_max_w", "cap_control", "power_state", "reserved_w",
    "taints", "leaves_at", "changed_in",
]  # fmt: skip


def watching(names: list[str]) -> str:
    """The trigger that marks changes of these columns, in place of the one that stands."""
    old, new = (", ".join(f"{row}.{name}" for name in names) for row in ("OLD", "NEW"))
    return (
        "DROP TRIGGER host_changed_update ON marketplace_host;"
        f"CREATE TRIGGER host_changed_update BEFORE UPDATE ON marketplace_host FOR EACH ROW WHEN (({old}) IS DISTINCT FROM ({new}))"
        " EXECUTE FUNCTION marketplace_host_changed();"
    )


class Migration(migrations.Migration):
    dependencies = [
        ("marketplace", "0008_job_rules_and_replica_loss"),
    ]

    operations = [
        migrations.RunSQL(watching(WATCHED), watching([n for n in WATCHED if n not in {"taints", "leaves_at"}])),
        migrations.AlterField(
            model_name="job",
            name="contract",
            field=models.ForeignKey(
                db_index=False,
                on_delete=django.db.models.deletion.PROTECT,
                related_name="jobs",
                to="marketplace.contract",
            ),
        ),
        migrations.AlterField(
            model_name="job",
            name="organization",
            field=models.ForeignKey(
                db_index=False,
                on_delete=django.db.models.deletion.PROTECT,
                related_name="jobs",
                to="marketplace.organization",
            ),
        ),
        migrations.AlterField(
            model_name="placement",
            name="cell",
            field=models.ForeignKey(
                db_index=False,
                on_delete=django.db.models.deletion.PROTECT,
                related_name="placements",
                to="marketplace.cell",
            ),
        ),
        migrations.AlterField(
            model_name="placement",
            name="contract",
            field=models.ForeignKey(
                db_index=False,
                on_delete=django.db.models.deletion.PROTECT,
                related_name="placements",
                to="marketplace.contract",
            ),
        ),
        migrations.AlterField(
            model_name="placement",
            name="job",
            field=models.ForeignKey(
                db_index=False,
                on_delete=django.db.models.deletion.PROTECT,
                related_name="placements",
                to="marketplace.job",
            ),
        ),
        migrations.AlterField(
            model_name="powergrant",
            name="site",
            field=models.ForeignKey(
                db_index=False,
                on_delete=django.db.models.deletion.CASCADE,
                related_name="grants",
                to="marketplace.site",
            ),
        ),
        migrations.AddIndex(
            model_name="job",
            index=models.Index(condition=models.Q(("state", "preempting")), fields=["cell"], name="job_preempting"),
        ),
        migrations.AddIndex(
            model_name="placement",
            index=models.Index(
                condition=models.Q(("state__in", ("released", "failed", "lost")), _negated=True),
                fields=["cell"],
                name="placement_live_by_cell",
            ),
        ),
    ]

"""How low a call of the grid holds a host's GPUs is watched like the rest of a host: the cycle counts whoever comes at that."""

from django.db import migrations

WATCHED = [
    "site_id", "cell_id", "power_node_id", "listing_id", "gpu_model_id", "name", "state", "leaf", "spine", "gpu_count", "vcpu_milli",
    "ram_mib", "nvme_gib", "vram_mib", "nvlink_domains", "gpu_free", "vram_free", "vcpu_free", "ram_free", "nvme_free",
    "cpu_only_active", "standby_w", "parked_w", "base_w", "gpu_min_w", "gpu_max_w", "call_gpu_w", "cap_control", "power_state",
    "reserved_w", "taints", "leaves_at", "changed_in",
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
    dependencies = [("marketplace", "0043_drained_why")]
    operations = [migrations.RunSQL(watching(WATCHED), watching([n for n in WATCHED if n != "call_gpu_w"]))]

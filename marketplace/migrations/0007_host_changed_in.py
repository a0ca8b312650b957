"""Host.changed_in and Cell.layout: by these a kept reading of a cell's hosts is brought up to date (scheduler.fleet).

A number from a sequence (`updated_seq`, as before) is drawn at the change, so a lower one may become visible after a higher
one has been read. The transaction's own id can be asked of the earlier reading's snapshot: could it see that transaction?
"""

from django.db import migrations, models

COLUMNS = [
    "site_id", "cell_id", "power_node_id", "listing_id", "gpu_model_id", "name", "state", "leaf", "spine", "gpu_count", "vcpu_milli",
    "ram_mib", "nvme_gib", "vram_mib", "nvlink_domains", "gpu_free", "vram_free", "vcpu_free", "ram_free", "nvme_free",
    "cpu_only_active", "standby_w", "parked_w", "base_w", "gpu_min_w", "gpu_max_w", "cap_control", "power_state", "reserved_w",
]  # fmt: skip
WATCHED = [*COLUMNS, "changed_in"]  # nobody else writes it: a whole row saved from an old reading would set it back

OLD_TRIGGERS_GONE = """
DROP TRIGGER host_bump_update ON marketplace_host;
DROP TRIGGER host_bump_insert ON marketplace_host;
DROP FUNCTION marketplace_host_bump();
DROP SEQUENCE marketplace_host_updated_seq;
"""
OLD_TRIGGERS_BACK = f"""
CREATE SEQUENCE marketplace_host_updated_seq OWNED BY marketplace_host.updated_seq;
CREATE FUNCTION marketplace_host_bump() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  NEW.updated_seq := nextval('marketplace_host_updated_seq');
  RETURN NEW;
END $$;
CREATE TRIGGER host_bump_insert BEFORE INSERT ON marketplace_host FOR EACH ROW EXECUTE FUNCTION marketplace_host_bump();
CREATE TRIGGER host_bump_update BEFORE UPDATE ON marketplace_host FOR EACH ROW
  WHEN (({", ".join("OLD." + c for c in COLUMNS)}) IS DISTINCT FROM ({", ".join("NEW." + c for c in COLUMNS)}))
  EXECUTE FUNCTION marketplace_host_bump();
"""
FORWARD = f"""
CREATE FUNCTION marketplace_host_changed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  NEW.changed_in := pg_current_xact_id()::text::bigint;
  RETURN NEW;
END $$;
CREATE TRIGGER host_changed_insert BEFORE INSERT ON marketplace_host FOR EACH ROW EXECUTE FUNCTION marketplace_host_changed();
CREATE TRIGGER host_changed_update BEFORE UPDATE ON marketplace_host FOR EACH ROW
  WHEN (({", ".join("OLD." + c for c in WATCHED)}) IS DISTINCT FROM ({", ".join("NEW." + c for c in WATCHED)}))
  EXECUTE FUNCTION marketplace_host_changed();

CREATE FUNCTION marketplace_host_moved() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  UPDATE marketplace_cell SET layout = layout + 1 WHERE id = OLD.cell_id;
  RETURN NULL;
END $$;
CREATE TRIGGER host_moved AFTER UPDATE ON marketplace_host FOR EACH ROW
  WHEN (OLD.cell_id <> NEW.cell_id OR OLD.id <> NEW.id) EXECUTE FUNCTION marketplace_host_moved();
CREATE FUNCTION marketplace_hosts_deleted() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  UPDATE marketplace_cell SET layout = layout + 1 WHERE id IN (SELECT cell_id FROM gone);
  RETURN NULL;
END $$;
CREATE TRIGGER hosts_deleted AFTER DELETE ON marketplace_host REFERENCING OLD TABLE AS gone
  FOR EACH STATEMENT EXECUTE FUNCTION marketplace_hosts_deleted();
"""  # noqa: S608
BACKWARD = """
DROP TRIGGER hosts_deleted ON marketplace_host;
DROP FUNCTION marketplace_hosts_deleted();
DROP TRIGGER host_moved ON marketplace_host;
DROP FUNCTION marketplace_host_moved();
DROP TRIGGER host_changed_update ON marketplace_host;
DROP TRIGGER host_changed_insert ON marketplace_host;
DROP FUNCTION marketplace_host_changed();
"""


class Migration(migrations.Migration):
    dependencies = [("marketplace", "0006_pulse_resumed")]
    operations = [
        migrations.RunSQL(OLD_TRIGGERS_GONE, OLD_TRIGGERS_BACK),
        migrations.RemoveField(model_name="host", name="updated_seq"),
        migrations.AddField(
            model_name="host",
            name="changed_in",
            field=models.BigIntegerField(
                default=0, editable=False,
                help_text="transaction that last changed what the scheduler reads (set by a trigger)",
            ),
        ),
        migrations.AddField(
            model_name="cell",
            name="layout",
            field=models.BigIntegerField(
                default=0, editable=False, help_text="Grows when a host leaves the cell (set by a trigger)"
            ),
        ),
        migrations.AddIndex(
            model_name="host", index=models.Index(fields=["cell", "changed_in"], name="host_changed")
        ),
        migrations.RunSQL(FORWARD, BACKWARD),
    ]

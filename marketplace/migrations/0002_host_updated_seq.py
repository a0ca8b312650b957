"""Host.updated_seq is set by the database, so that no writer can forget it.

Every insert, and every update of a column that the scheduler reads, draws the next number of one sequence. Readings,
commands to the agent and beats do not count. A reader of increments must look back over numbers of transactions that were
still open when it last read: numbers are drawn at the change, not at the commit.
"""

from django.db import migrations

COLUMNS = (
    "site_id, cell_id, power_node_id, listing_id, gpu_model_id, name, state, leaf, spine, gpu_count, vcpu_milli, ram_mib, nvme_gib, "
    "vram_mib, nvlink_domains, gpu_free, vram_free, vcpu_free, ram_free, nvme_free, cpu_only_active, standby_w, parked_w, base_w, "
    "gpu_min_w, gpu_max_w, cap_control, power_state, reserved_w"
).split(", ")

FORWARD = f"""
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
BACKWARD = """
DROP TRIGGER host_bump_update ON marketplace_host;
DROP TRIGGER host_bump_insert ON marketplace_host;
DROP FUNCTION marketplace_host_bump();
DROP SEQUENCE marketplace_host_updated_seq;
"""


class Migration(migrations.Migration):
    dependencies = [("marketplace", "0001_initial")]
    operations = [migrations.RunSQL(FORWARD, BACKWARD)]

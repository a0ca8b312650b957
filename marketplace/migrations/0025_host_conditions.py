"""The condition of hosts as intervals that the database keeps whole: no overlap, no gap, no change but an end. Scores of listings
are columns of the catalogue (services.catalogue).
"""

import django.db.models.deletion
from django.db import migrations, models


LISTING = 1  # services.catalogue
FORWARD = """
ALTER TABLE marketplace_hostcondition ADD CONSTRAINT condition_no_overlap EXCLUDE USING gist (
  int8range(host_id, host_id, '[]') WITH &&, tstzrange(starts_at, ends_at) WITH &&
) DEFERRABLE INITIALLY IMMEDIATE;

CREATE FUNCTION marketplace_condition_kept() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF OLD.ends_at IS NOT NULL OR (OLD.id, OLD.host_id, OLD.kind, OLD.starts_at, OLD.reason, OLD.recorded_at)
      IS DISTINCT FROM (NEW.id, NEW.host_id, NEW.kind, NEW.starts_at, NEW.reason, NEW.recorded_at) THEN
    RAISE EXCEPTION 'condition % of host % is history: it can only end, once', OLD.id, OLD.host_id
      USING ERRCODE = 'integrity_constraint_violation';
  END IF;
  RETURN NEW;
END $$;
CREATE TRIGGER condition_kept BEFORE UPDATE ON marketplace_hostcondition FOR EACH ROW
  EXECUTE FUNCTION marketplace_condition_kept();

CREATE FUNCTION marketplace_condition_follows() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF EXISTS (SELECT FROM marketplace_hostcondition WHERE host_id = NEW.host_id AND id < NEW.id)
      AND NOT EXISTS (SELECT FROM marketplace_hostcondition WHERE host_id = NEW.host_id AND ends_at = NEW.starts_at) THEN
    RAISE EXCEPTION 'condition % of host % leaves a gap before %', NEW.id, NEW.host_id, NEW.starts_at
      USING ERRCODE = 'integrity_constraint_violation';
  END IF;
  RETURN NULL;
END $$;
CREATE TRIGGER condition_follows AFTER INSERT ON marketplace_hostcondition FOR EACH ROW
  EXECUTE FUNCTION marketplace_condition_follows();
""" + f"""
CREATE FUNCTION marketplace_reliability_offered() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  PERFORM marketplace_offer_changed({LISTING}::smallint, NEW.listing_id);
  RETURN NULL;
END $$;
CREATE TRIGGER offered_insert AFTER INSERT ON marketplace_reliability FOR EACH ROW
  WHEN (NEW.listing_id IS NOT NULL) EXECUTE FUNCTION marketplace_reliability_offered();
CREATE TRIGGER offered_update AFTER UPDATE ON marketplace_reliability FOR EACH ROW
  WHEN (NEW.listing_id IS NOT NULL AND OLD.score_permille <> NEW.score_permille)
  EXECUTE FUNCTION marketplace_reliability_offered();
"""
BACKWARD = """
DROP FUNCTION marketplace_reliability_offered() CASCADE;
DROP FUNCTION marketplace_condition_follows() CASCADE;
DROP FUNCTION marketplace_condition_kept() CASCADE;
ALTER TABLE marketplace_hostcondition DROP CONSTRAINT condition_no_overlap;
"""


class Migration(migrations.Migration):

    dependencies = [
        ('marketplace', '0024_placement_unmetered'),
    ]

    operations = [
        migrations.CreateModel(
            name='GpuError',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('event_id', models.UUIDField(unique=True)),
                ('at', models.DateTimeField()),
                ('received_at', models.DateTimeField()),
                ('gpu', models.PositiveSmallIntegerField(help_text='index on the host')),
                ('kind', models.CharField(help_text='xid, ecc, lost, retired', max_length=12)),
                ('code', models.PositiveIntegerField(default=0, help_text='the XID, or how many')),
                ('text', models.CharField(blank=True, max_length=120)),
                ('host', models.ForeignKey(on_delete=django.db.models.deletion.CASCADE, related_name='gpu_errors', to='marketplace.host')),
            ],
            options={
                'indexes': [models.Index(fields=['host', '-at'], name='gpu_error_of_host'), models.Index(fields=['received_at'], name='marketplace_receive_c0297d_idx')],
            },
        ),
        migrations.CreateModel(
            name='HostCondition',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('kind', models.CharField(choices=[('able', 'Able'), ('draining', 'Draining'), ('maintenance', 'Maintenance'), ('lost', 'Lost'), ('silent', 'Silent'), ('off', 'Off'), ('not_offered', 'Not Offered')], max_length=12)),
                ('starts_at', models.DateTimeField()),
                ('ends_at', models.DateTimeField(blank=True, null=True)),
                ('reason', models.CharField(blank=True, help_text="as it stood on the host then; its operator's words", max_length=200)),
                ('recorded_at', models.DateTimeField(help_text='when we knew; a silence begins with the last word heard')),
                ('host', models.ForeignKey(on_delete=django.db.models.deletion.CASCADE, related_name='conditions', to='marketplace.host')),
            ],
            options={
                'indexes': [models.Index(condition=models.Q(('ends_at__isnull', True)), fields=['host'], name='condition_open'), models.Index(fields=['ends_at'], name='condition_ended')],
                'constraints': [models.CheckConstraint(condition=models.Q(('ends_at__isnull', True), ('ends_at__gte', models.F('starts_at')), _connector='OR'), name='condition_window')],
            },
        ),
        migrations.CreateModel(
            name='HostDay',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('offered_s', models.BigIntegerField(default=0)),
                ('able_s', models.BigIntegerField(default=0)),
                ('silent_s', models.BigIntegerField(default=0)),
                ('excused_s', models.BigIntegerField(default=0)),
                ('starts', models.BigIntegerField(default=0)),
                ('failed_starts', models.BigIntegerField(default=0)),
                ('gpu_days', models.BigIntegerField(default=0)),
                ('sick_gpu_days', models.BigIntegerField(default=0)),
                ('drains', models.BigIntegerField(default=0)),
                ('late_drains', models.BigIntegerField(default=0)),
                ('day', models.DateField()),
                ('host', models.ForeignKey(db_index=False, on_delete=django.db.models.deletion.CASCADE, related_name='days', to='marketplace.host')),
            ],
            options={
                'indexes': [models.Index(fields=['day'], name='marketplace_day_1cbe05_idx')],
                'constraints': [models.UniqueConstraint(fields=('host', 'day'), name='host_day_once')],
            },
        ),
        migrations.CreateModel(
            name='Reliability',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('offered_s', models.BigIntegerField(default=0)),
                ('able_s', models.BigIntegerField(default=0)),
                ('silent_s', models.BigIntegerField(default=0)),
                ('excused_s', models.BigIntegerField(default=0)),
                ('starts', models.BigIntegerField(default=0)),
                ('failed_starts', models.BigIntegerField(default=0)),
                ('gpu_days', models.BigIntegerField(default=0)),
                ('sick_gpu_days', models.BigIntegerField(default=0)),
                ('drains', models.BigIntegerField(default=0)),
                ('late_drains', models.BigIntegerField(default=0)),
                ('score_permille', models.PositiveSmallIntegerField()),
                ('as_of', models.DateTimeField()),
                ('host', models.OneToOneField(null=True, on_delete=django.db.models.deletion.CASCADE, related_name='reliability', to='marketplace.host')),
                ('listing', models.OneToOneField(null=True, on_delete=django.db.models.deletion.CASCADE, related_name='reliability', to='marketplace.listing')),
                ('organization', models.OneToOneField(null=True, on_delete=django.db.models.deletion.CASCADE, related_name='reliability', to='marketplace.organization')),
            ],
            options={
                'constraints': [models.CheckConstraint(condition=models.Q(models.Q(('host__isnull', False), ('listing__isnull', True), ('organization__isnull', True)), models.Q(('host__isnull', True), ('listing__isnull', False), ('organization__isnull', True)), models.Q(('host__isnull', True), ('listing__isnull', True), ('organization__isnull', False)), _connector='OR'), name='reliability_of_one')],
            },
        ),
        migrations.RunSQL(FORWARD, BACKWARD),
    ]

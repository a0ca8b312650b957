"""Benchmarks of hosts, and what each host is taken for: a column of the catalogue (services.catalogue)."""

import django.db.models.deletion
from django.db import migrations, models


HOST = 2  # services.catalogue
FORWARD = f"""
CREATE FUNCTION marketplace_verification_offered() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  PERFORM marketplace_offer_changed({HOST}::smallint, NEW.host_id);
  RETURN NULL;
END $$;
CREATE TRIGGER offered_insert AFTER INSERT ON marketplace_hostverification FOR EACH ROW
  WHEN (NEW.state = 'verified') EXECUTE FUNCTION marketplace_verification_offered();
CREATE TRIGGER offered_update AFTER UPDATE ON marketplace_hostverification FOR EACH ROW
  WHEN ((OLD.state, OLD.score) IS DISTINCT FROM (NEW.state, NEW.score)) EXECUTE FUNCTION marketplace_verification_offered();
"""
BACKWARD = "DROP FUNCTION marketplace_verification_offered() CASCADE;"


class Migration(migrations.Migration):

    dependencies = [
        ('marketplace', '0025_host_conditions'),
    ]

    operations = [
        migrations.CreateModel(
            name='HostVerification',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('state', models.CharField(choices=[('unverified', 'Unverified'), ('verified', 'Verified'), ('stale', 'Stale'), ('failed', 'Failed')], default='unverified', max_length=10)),
                ('score', models.PositiveIntegerField(default=0, help_text='of the run that verified it; 1000: an H100-SXM')),
                ('verified_at', models.DateTimeField(blank=True, null=True)),
                ('failures', models.PositiveSmallIntegerField(default=0, help_text='runs in a row that failed')),
                ('next_at', models.DateTimeField(help_text='not before then by itself')),
                ('waits_for', models.CharField(blank=True, help_text='why a run that is due has not begun', max_length=200)),
                ('fingerprint', models.CharField(blank=True, help_text='of the devices that were verified', max_length=32)),
            ],
        ),
        migrations.CreateModel(
            name='Verification',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('state', models.CharField(choices=[('running', 'Running'), ('passed', 'Passed'), ('failed', 'Failed'), ('aborted', 'Aborted')], default='running', max_length=8)),
                ('reason', models.CharField(blank=True, help_text='what fell short, and what to look at', max_length=1000)),
                ('asked_by', models.CharField(max_length=120)),
                ('started_at', models.DateTimeField()),
                ('finished_at', models.DateTimeField(blank=True, null=True)),
                ('gpu_model', models.CharField(max_length=40)),
                ('fingerprint', models.CharField(help_text='of the devices that were stated', max_length=32)),
                ('gpus', models.PositiveSmallIntegerField(default=0, help_text='that answered')),
                ('matmul_gflops', models.BigIntegerField(default=0, help_text='slowest GPU')),
                ('memory_mb_s', models.BigIntegerField(default=0, help_text='slowest GPU')),
                ('fabric_mb_s', models.BigIntegerField(default=0, help_text='slowest link between GPUs, one direction; 0: none')),
                ('disk_write_mb_s', models.BigIntegerField(default=0)),
                ('disk_read_mb_s', models.BigIntegerField(default=0)),
                ('network_down_kb_s', models.BigIntegerField(default=0)),
                ('network_up_kb_s', models.BigIntegerField(default=0)),
                ('score', models.PositiveIntegerField(default=0)),
            ],
        ),
        migrations.AddField(
            model_name='organization',
            name='is_house',
            field=models.BooleanField(default=False, editable=False, help_text='our own: its jobs verify hosts, for nothing'),
        ),
        migrations.AddConstraint(
            model_name='organization',
            constraint=models.UniqueConstraint(condition=models.Q(('is_house', True)), fields=('livemode',), name='organization_one_house'),
        ),
        migrations.AddField(
            model_name='hostverification',
            name='host',
            field=models.OneToOneField(on_delete=django.db.models.deletion.CASCADE, related_name='verification', to='marketplace.host'),
        ),
        migrations.AddField(
            model_name='verification',
            name='host',
            field=models.ForeignKey(on_delete=django.db.models.deletion.CASCADE, related_name='verifications', to='marketplace.host'),
        ),
        migrations.AddField(
            model_name='verification',
            name='job',
            field=models.OneToOneField(on_delete=django.db.models.deletion.PROTECT, related_name='verification', to='marketplace.job'),
        ),
        migrations.AddField(
            model_name='hostverification',
            name='run',
            field=models.ForeignKey(help_text='that verified it', null=True, on_delete=django.db.models.deletion.SET_NULL, related_name='+', to='marketplace.verification'),
        ),
        migrations.AddIndex(
            model_name='verification',
            index=models.Index(fields=['host', '-id'], name='verification_of_host'),
        ),
        migrations.AddIndex(
            model_name='verification',
            index=models.Index(condition=models.Q(('state', 'running')), fields=['id'], name='verification_running'),
        ),
        migrations.AddConstraint(
            model_name='verification',
            constraint=models.UniqueConstraint(condition=models.Q(('state', 'running')), fields=('host',), name='verification_one_at_a_time'),
        ),
        migrations.AddConstraint(
            model_name='verification',
            constraint=models.CheckConstraint(condition=models.Q(models.Q(('finished_at__isnull', True), ('state', 'running')), models.Q(models.Q(('state', 'running'), _negated=True), ('finished_at__isnull', False)), _connector='OR'), name='verification_finished'),
        ),
        migrations.AddIndex(
            model_name='hostverification',
            index=models.Index(fields=['next_at'], name='verification_due'),
        ),
        migrations.RunSQL(FORWARD, BACKWARD),
    ]

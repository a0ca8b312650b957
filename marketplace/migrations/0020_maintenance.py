"""Maintenance: what is announced, which hosts it takes, who was told, and what it cost whom. A reservation may stand in for others,
so that a contract may have several; when a host comes back is watched like its leaving hour.
"""

from importlib import import_module

import django.db.models.deletion
from django.db import migrations, models

_hosts = import_module("marketplace.migrations.0009_commit_path_indexes")

class Migration(migrations.Migration):

    dependencies = [
        ('marketplace', '0019_spot'),
    ]

    operations = [
        migrations.CreateModel(
            name='MaintenanceHost',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('taken_at', models.DateTimeField(blank=True, null=True)),
                ('given_back_at', models.DateTimeField(blank=True, null=True)),
                ('comes_back', models.BooleanField(default=False, help_text='it worked when it was taken, and nobody else keeps it out')),
            ],
        ),
        migrations.CreateModel(
            name='MaintenanceNotice',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('version', models.PositiveIntegerField()),
                ('what', models.CharField(choices=[('announced', 'Announced'), ('changed', 'Changed'), ('cancelled', 'Cancelled'), ('finished', 'Finished')], max_length=10)),
                ('gpus', models.PositiveIntegerField(help_text='that stand there')),
                ('short_gpus', models.PositiveIntegerField(help_text='for which no others were found, at most at once')),
                ('at', models.DateTimeField()),
            ],
        ),
        migrations.CreateModel(
            name='MaintenanceShortfall',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('gpus', models.PositiveIntegerField()),
                ('starts_at', models.DateTimeField()),
                ('ends_at', models.DateTimeField(help_text='as planned, until its hosts are back')),
            ],
        ),
        migrations.AddField(
            model_name='host',
            name='back_at',
            field=models.DateTimeField(blank=True, help_text='when maintenance that took it gives it back; empty: nothing does by itself', null=True),
        ),
        migrations.AddField(
            model_name='listing',
            name='maintenance_hours_per_month',
            field=models.PositiveIntegerField(default=4, help_text='of announced maintenance that a firm contract bears; beyond it reserved time is not charged'),
        ),
        migrations.AlterField(
            model_name='reservation',
            name='contract',
            field=models.ForeignKey(db_index=False, null=True, on_delete=django.db.models.deletion.CASCADE, related_name='reservations', to='marketplace.contract'),
        ),
        migrations.CreateModel(
            name='CalendarFeed',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('name', models.CharField(help_text='who reads it', max_length=60)),
                ('digest', models.CharField(help_text='SHA-256 of the token, which is shown once', max_length=64, unique=True)),
                ('created_by', models.CharField(max_length=120)),
                ('created_at', models.DateTimeField()),
                ('last_used_at', models.DateTimeField(blank=True, null=True)),
                ('revoked_at', models.DateTimeField(blank=True, null=True)),
                ('organization', models.ForeignKey(on_delete=django.db.models.deletion.CASCADE, related_name='calendar_feeds', to='marketplace.organization')),
            ],
            options={
                'abstract': False,
            },
        ),
        migrations.CreateModel(
            name='Maintenance',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('scope', models.CharField(choices=[('site', 'Site'), ('node', 'Node'), ('domain', 'Domain'), ('hosts', 'Hosts')], max_length=8)),
                ('domain', models.CharField(blank=True, help_text='scope domain: all hosts of this leaf (rack)', max_length=40)),
                ('category', models.CharField(choices=[('other', 'Other'), ('hardware', 'Hardware'), ('network', 'Network'), ('power', 'Power'), ('cooling', 'Cooling'), ('software', 'Software')], default='other', max_length=12)),
                ('starts_at', models.DateTimeField()),
                ('ends_at', models.DateTimeField()),
                ('text', models.CharField(help_text='what is done; customers read it', max_length=500)),
                ('impact', models.CharField(blank=True, help_text='what customers will likely notice', max_length=500)),
                ('emergency', models.BooleanField(default=False, help_text='announced without due notice: owes credit, and counts')),
                ('emergency_reason', models.CharField(blank=True, help_text='customers read it', max_length=500)),
                ('cap_w', models.BigIntegerField(blank=True, help_text='work on power: what the node (or site) may draw in the window, W', null=True)),
                ('state', models.CharField(choices=[('draft', 'Draft'), ('announced', 'Announced'), ('in_progress', 'In Progress'), ('completed', 'Completed'), ('cancelled', 'Cancelled')], default='draft', max_length=12)),
                ('version', models.PositiveIntegerField(default=1, help_text='grows with every change')),
                ('noticed_until', models.DateTimeField(blank=True, help_text='the window had due notice up to here; empty: none of it', null=True)),
                ('created_by', models.CharField(max_length=120)),
                ('created_at', models.DateTimeField()),
                ('announced_at', models.DateTimeField(blank=True, null=True)),
                ('started_at', models.DateTimeField(blank=True, null=True)),
                ('settled_at', models.DateTimeField(blank=True, help_text='completed or cancelled', null=True)),
                ('node', models.ForeignKey(blank=True, help_text='scope node: all hosts under it', null=True, on_delete=django.db.models.deletion.PROTECT, to='marketplace.powernode')),
                ('site', models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, related_name='maintenances', to='marketplace.site')),
            ],
        ),
        migrations.AddField(
            model_name='reservation',
            name='maintenance',
            field=models.ForeignKey(help_text='what it takes (no contract), or GPUs that stand in meanwhile for those of a contract', null=True, on_delete=django.db.models.deletion.CASCADE, related_name='reservations', to='marketplace.maintenance'),
        ),
        migrations.AddIndex(
            model_name='reservation',
            index=models.Index(fields=['contract'], name='reservation_of_contract'),
        ),
        migrations.AddConstraint(
            model_name='reservation',
            constraint=models.UniqueConstraint(condition=models.Q(('maintenance__isnull', True)), fields=('contract',), name='reservation_once_for_a_contract'),
        ),
        migrations.AddField(
            model_name='maintenancehost',
            name='host',
            field=models.ForeignKey(on_delete=django.db.models.deletion.CASCADE, related_name='maintenance_rows', to='marketplace.host'),
        ),
        migrations.AddField(
            model_name='maintenancehost',
            name='maintenance',
            field=models.ForeignKey(on_delete=django.db.models.deletion.CASCADE, related_name='hosts', to='marketplace.maintenance'),
        ),
        migrations.AddField(
            model_name='maintenancenotice',
            name='contract',
            field=models.ForeignKey(on_delete=django.db.models.deletion.CASCADE, related_name='maintenance_notices', to='marketplace.contract'),
        ),
        migrations.AddField(
            model_name='maintenancenotice',
            name='maintenance',
            field=models.ForeignKey(on_delete=django.db.models.deletion.CASCADE, related_name='notices', to='marketplace.maintenance'),
        ),
        migrations.AddField(
            model_name='maintenancenotice',
            name='organization',
            field=models.ForeignKey(on_delete=django.db.models.deletion.CASCADE, related_name='+', to='marketplace.organization'),
        ),
        migrations.AddField(
            model_name='maintenanceshortfall',
            name='contract',
            field=models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, related_name='shortfalls', to='marketplace.contract'),
        ),
        migrations.AddField(
            model_name='maintenanceshortfall',
            name='maintenance',
            field=models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, related_name='shortfalls', to='marketplace.maintenance'),
        ),
        migrations.AddIndex(
            model_name='maintenance',
            index=models.Index(fields=['site', '-starts_at', '-id'], name='marketplace_site_id_08c09c_idx'),
        ),
        migrations.AddIndex(
            model_name='maintenance',
            index=models.Index(condition=models.Q(('state__in', ('announced', 'in_progress'))), fields=['starts_at'], name='maintenance_live'),
        ),
        migrations.AddConstraint(
            model_name='maintenance',
            constraint=models.CheckConstraint(condition=models.Q(('state__in', ('draft', 'announced', 'in_progress', 'completed', 'cancelled'))), name='maintenance_state'),
        ),
        migrations.AddConstraint(
            model_name='maintenance',
            constraint=models.CheckConstraint(condition=models.Q(('ends_at__gt', models.F('starts_at'))), name='maintenance_window'),
        ),
        migrations.AddConstraint(
            model_name='maintenance',
            constraint=models.CheckConstraint(condition=models.Q(models.Q(('node__isnull', False), ('scope', 'node')), models.Q(models.Q(('scope', 'node'), _negated=True), ('node__isnull', True)), _connector='OR'), name='maintenance_names_its_node'),
        ),
        migrations.AddConstraint(
            model_name='maintenance',
            constraint=models.CheckConstraint(condition=models.Q(('emergency', False), models.Q(('emergency_reason', ''), _negated=True), _connector='OR'), name='maintenance_emergency_has_a_reason'),
        ),
        migrations.AddIndex(
            model_name='maintenancehost',
            index=models.Index(condition=models.Q(('given_back_at__isnull', True)), fields=['host'], name='maintenance_host_open'),
        ),
        migrations.AddConstraint(
            model_name='maintenancehost',
            constraint=models.UniqueConstraint(fields=('maintenance', 'host'), name='maintenance_host_once'),
        ),
        migrations.AddConstraint(
            model_name='maintenancehost',
            constraint=models.CheckConstraint(condition=models.Q(('given_back_at__isnull', True), ('taken_at__isnull', False), _connector='OR'), name='maintenance_taken_first'),
        ),
        migrations.AddConstraint(
            model_name='maintenancenotice',
            constraint=models.UniqueConstraint(fields=('maintenance', 'contract', 'version'), name='maintenance_told_once'),
        ),
        migrations.AddIndex(
            model_name='maintenanceshortfall',
            index=models.Index(fields=['contract', 'starts_at'], name='marketplace_contrac_147247_idx'),
        ),
        migrations.AddConstraint(
            model_name='maintenanceshortfall',
            constraint=models.CheckConstraint(condition=models.Q(('ends_at__gt', models.F('starts_at'))), name='shortfall_window'),
        ),
        migrations.AddConstraint(
            model_name='maintenanceshortfall',
            constraint=models.CheckConstraint(condition=models.Q(('gpus__gt', 0)), name='shortfall_of_some'),
        ),
        migrations.RunSQL(_hosts.watching([*_hosts.WATCHED, "back_at"]), _hosts.watching(_hosts.WATCHED)),
    ]

"""Pools' payouts are asked for by feeds. Receipts are append-only, as the papers of contracts are."""

import django.db.models.deletion
from django.db import migrations, models

KEPT = (
    "CREATE TRIGGER marketplace_receipt_append_only BEFORE UPDATE OR DELETE ON marketplace_receipt"
    " FOR EACH ROW EXECUTE FUNCTION marketplace_refuse_change();"
)
UNKEPT = "DROP TRIGGER marketplace_receipt_append_only ON marketplace_receipt;"


class Migration(migrations.Migration):

    dependencies = [
        ('marketplace', '0033_emergency_clause'),
    ]

    operations = [
        migrations.AlterField(
            model_name='receipt',
            name='site',
            field=models.ForeignKey(db_index=False, on_delete=django.db.models.deletion.PROTECT, related_name='receipts', to='marketplace.site'),
        ),
        migrations.RunSQL(KEPT, UNKEPT),
        migrations.CreateModel(
            name='PoolFeed',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('name', models.CharField(help_text='The pool: the source of its receipts. It cannot be changed', max_length=40)),
                ('url', models.CharField(max_length=300)),
                ('secret', models.BinaryField(blank=True, null=True)),
                ('enabled', models.BooleanField(default=True)),
                ('poll_s', models.PositiveIntegerField(default=3600)),
                ('stale_after_s', models.PositiveIntegerField(default=172800, help_text='Nothing newer paid for so long, s: overdue')),
                ('asked_at', models.DateTimeField(blank=True, null=True)),
                ('heard_at', models.DateTimeField(blank=True, help_text='The newest answer that was understood whole', null=True)),
                ('paid_until', models.DateTimeField(blank=True, help_text='The end of the newest time that was paid for', null=True)),
                ('error', models.CharField(blank=True, max_length=400)),
                ('told_at', models.DateTimeField(blank=True, help_text='Its operator has a mail of the trouble that it is in', null=True)),
                ('created_by', models.CharField(max_length=120)),
                ('created_at', models.DateTimeField()),
                ('site', models.ForeignKey(db_index=False, on_delete=django.db.models.deletion.CASCADE, related_name='pool_feeds', to='marketplace.site')),
            ],
            options={
                'constraints': [models.UniqueConstraint(fields=('site', 'name'), name='pool_feed_name_once')],
            },
        ),
    ]

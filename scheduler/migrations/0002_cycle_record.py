import django.db.models.deletion
from django.db import migrations, models


class Migration(migrations.Migration):

    dependencies = [
        ("marketplace", "0006_pulse_resumed"),
        ("scheduler", "0001_initial"),
    ]

    operations = [
        migrations.CreateModel(
            name='CycleRecord',
            fields=[
                ('cycle', models.OneToOneField(on_delete=django.db.models.deletion.CASCADE, primary_key=True, related_name='record', serialize=False, to='scheduler.cycle')),
                ('at', models.DateTimeField()),
                ('code', models.CharField(help_text='of the core that planned it', max_length=80)),
                ('body', models.BinaryField()),
                ('size', models.PositiveIntegerField(help_text='bytes')),
                ('pack_us', models.PositiveIntegerField(default=0)),
                ('base', models.ForeignKey(help_text='the record that this one differs from', null=True, on_delete=django.db.models.deletion.PROTECT, related_name='deltas', to='scheduler.cyclerecord')),
                ('cell', models.ForeignKey(on_delete=django.db.models.deletion.CASCADE, related_name='+', to='marketplace.cell')),
            ],
            options={
                'indexes': [models.Index(condition=models.Q(('base', None)), fields=['cell', '-cycle'], name='record_alone')],
            },
        ),
        # It is deflated already: PostgreSQL need not try again.
        migrations.RunSQL('ALTER TABLE scheduler_cyclerecord ALTER COLUMN body SET STORAGE EXTERNAL', migrations.RunSQL.noop),
    ]

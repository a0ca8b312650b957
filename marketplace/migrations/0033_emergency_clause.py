"""Listings and contracts name the emergencies in which firm jobs leave. What a search shows of it is named to the catalogue."""

from django.db import migrations, models

FORWARD = """
CREATE TRIGGER offered_emergency AFTER UPDATE ON marketplace_listing FOR EACH ROW
  WHEN (OLD.emergency_notice_s IS DISTINCT FROM NEW.emergency_notice_s) EXECUTE FUNCTION marketplace_listing_offered();
"""
BACKWARD = "DROP TRIGGER offered_emergency ON marketplace_listing;"


class Migration(migrations.Migration):

    dependencies = [
        ('marketplace', '0032_grid'),
    ]

    operations = [
        migrations.AddField(
            model_name='contract',
            name='emergency_notice_s',
            field=models.PositiveIntegerField(blank=True, help_text='as its listing said when it was signed; empty: it never leaves for a call', null=True),
        ),
        migrations.AddField(
            model_name='listing',
            name='emergency_notice_s',
            field=models.PositiveIntegerField(blank=True, help_text='in a grid emergency firm jobs may be asked to leave, last of all, so long after it was announced; empty: never', null=True),
        ),
        migrations.RunSQL(FORWARD, BACKWARD),
    ]

"""Prices of listings by term, share due at signing and curtailment; quotes keep what was asked. A search hears of changed ones."""

from django.db import migrations, models

FORWARD = """
CREATE TRIGGER offered_tiers AFTER UPDATE ON marketplace_listing FOR EACH ROW
  WHEN ((OLD.price_tiers, OLD.upfront_permille) IS DISTINCT FROM (NEW.price_tiers, NEW.upfront_permille))
  EXECUTE FUNCTION marketplace_listing_offered();
"""
BACKWARD = "DROP TRIGGER offered_tiers ON marketplace_listing;"


class Migration(migrations.Migration):

    dependencies = [
        ('marketplace', '0038_budget'),
    ]

    operations = [
        migrations.AddField(
            model_name='listing',
            name='price_tiers',
            field=models.JSONField(blank=True, default=list, help_text='other prices of what holds capacity, as services.price_tiers reads them'),
        ),
        migrations.AddField(
            model_name='quote',
            name='flexible_hours_max',
            field=models.PositiveIntegerField(blank=True, help_text='as asked: at most so many hours a month; empty: as the plain price', null=True),
        ),
        migrations.AddField(
            model_name='quote',
            name='upfront_max_permille',
            field=models.PositiveIntegerField(blank=True, help_text='as asked: at most so much due at signing; empty: as the plain price', null=True),
        ),
        migrations.RunSQL(FORWARD, BACKWARD),
    ]

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("marketplace", "0023_forward_market"),
    ]

    operations = [
        migrations.AddIndex(
            model_name="placement",
            index=models.Index(
                condition=models.Q(
                    ("running_at__isnull", False),
                    models.Q(
                        ("finished_at__isnull", True),
                        ("metered_through__isnull", True),
                        models.Q(("metered_through", models.F("finished_at")), _negated=True),
                        _connector="OR",
                    ),
                ),
                fields=["organization"],
                name="placement_unmetered",
            ),
        ),
    ]

"""A placement costs less: indexes that nobody asks are gone, a changed job stays on its page, and references look once.

The reference triggers of 0011 read the new rows once for all columns, and lock nothing that this transaction wrote itself: nobody
else can delete it before we are done. Building the indexes locks the tables for writing.
"""

import importlib
from typing import Any

import django.db.models.deletion
from django.db import migrations, models

before: Any = importlib.import_module("marketplace.migrations.0011_references_by_statement")
OFTEN_OURS = {"marketplace_job", "marketplace_placement"}  # written by the same transaction, as a rule


def inserted(child: str, columns: dict[str, str]) -> str:
    """All new rows of a statement against each table that they refer to."""
    names = ", ".join(f"{column}s bigint[]" for column in columns).replace(", ", "; ")
    keys = ", ".join(f"array_agg(DISTINCT {column})" for column in columns)
    checks = "".join(_check(child, column, parent) for column, parent in columns.items())
    return (
        f"CREATE OR REPLACE FUNCTION {child}_refers() RETURNS trigger LANGUAGE plpgsql AS $$"
        f" DECLARE {names}; found bigint; ours xid := pg_current_xact_id()::xid; BEGIN\n"
        f"SELECT {keys} INTO {', '.join(f'{column}s' for column in columns)} FROM fresh;\n"  # noqa: S608
        f"{checks} RETURN NULL; END $$;"
    )


def _check(child: str, column: str, parent: str) -> str:
    rows = f"PERFORM 1 FROM unnest({column}s) u(id) JOIN {parent} p ON p.id = u.id"
    count = "GET DIAGNOSTICS found = ROW_COUNT;"
    locked = (
        f"{rows} FOR KEY SHARE OF p; {count}"
        f" IF found < cardinality({column}s) THEN {before._missing(child, column, parent)} END IF;"  # noqa: SLF001
    )
    if parent not in OFTEN_OURS:
        return f"{locked}\n"
    return f"{rows} WHERE p.xmin = ours; {count} IF found < cardinality({column}s) THEN {locked} END IF;\n"


def replaced(child: str, columns: dict[str, str]) -> str:
    """The function of 0011 again."""
    function, _, _ = before._inserted(child, columns).partition("CREATE TRIGGER")  # noqa: SLF001
    return function.replace("CREATE FUNCTION", "CREATE OR REPLACE FUNCTION")


FORWARD = "".join(inserted(child, columns) for child, columns in before.REFERENCES.items())
BACKWARD = "".join(replaced(child, columns) for child, columns in before.REFERENCES.items())


class Migration(migrations.Migration):

    dependencies = [
        ("marketplace", "0014_movable_jobs"),
    ]

    operations = [
        migrations.RunSQL(FORWARD, BACKWARD),
        # A job is written again where it stands, as long as its page has room: half of the bytes in the log.
        migrations.RunSQL(
            "ALTER TABLE marketplace_job SET (fillfactor = 50)", "ALTER TABLE marketplace_job RESET (fillfactor)"
        ),
        migrations.RemoveIndex(
            model_name="job",
            name="job_of_organization",
        ),
        migrations.RemoveIndex(
            model_name="powergrant",
            name="marketplace_site_id_0f7994_idx",
        ),
        migrations.AlterField(
            model_name="job",
            name="cell",
            field=models.ForeignKey(db_index=False, on_delete=django.db.models.deletion.PROTECT, related_name="jobs", to="marketplace.cell"),
        ),
        migrations.AlterField(
            model_name="job",
            name="site",
            field=models.ForeignKey(blank=True, db_index=False, null=True, on_delete=django.db.models.deletion.PROTECT, related_name="+", to="marketplace.site"),
        ),
        migrations.AlterField(
            model_name="placement",
            name="host",
            field=models.ForeignKey(db_constraint=False, db_index=False, on_delete=django.db.models.deletion.PROTECT, related_name="placements", to="marketplace.host"),
        ),
        migrations.AlterField(
            model_name="powergrant",
            name="host",
            field=models.ForeignKey(db_constraint=False, db_index=False, on_delete=django.db.models.deletion.CASCADE, related_name="grants", to="marketplace.host"),
        ),
        migrations.AddIndex(
            model_name="job",
            index=models.Index(fields=["cell", "-id"], name="job_of_cell"),
        ),
        migrations.AddIndex(
            model_name="job",
            index=models.Index(fields=["organization", "-id"], name="job_of_organization"),
        ),
        migrations.AddIndex(
            model_name="powergrant",
            index=models.Index(condition=models.Q(("state", "shedding")), fields=["site"], name="grant_pending_by_site"),
        ),
        migrations.AddIndex(
            model_name="powergrant",
            index=models.Index(condition=models.Q(("state", "granted")), fields=["host"], name="grant_live_by_host"),
        ),
    ]

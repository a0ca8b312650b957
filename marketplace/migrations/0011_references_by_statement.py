"""References of placements, their events and grants are checked by statement, not by row and column.

A foreign key runs one query for each row and column at the commit: half of what a batch of placements costs. These triggers
give the same guarantee for a whole statement at once: what is inserted refers to rows that are there, which stay locked (KEY
SHARE) until the transaction ends; what is referred to is not deleted, and no key changes. See docs/adr/0009-commit-path.md.
"""

# ruff: noqa: S608 (the names are our own tables', from the table below)
import django.db.models.deletion
from django.db import migrations, models

REFERENCES = {
    "marketplace_placement": {
        "job_id": "marketplace_job", "contract_id": "marketplace_contract", "organization_id": "marketplace_organization",
        "host_id": "marketplace_host", "site_id": "marketplace_site", "cell_id": "marketplace_cell",
    },
    "marketplace_placementevent": {"placement_id": "marketplace_placement"},
    "marketplace_jobevent": {"job_id": "marketplace_job"},
    "marketplace_powergrant": {
        "placement_id": "marketplace_placement", "host_id": "marketplace_host", "site_id": "marketplace_site",
    },
}  # fmt: skip


def _missing(child: str, column: str, parent: str) -> str:
    return (
        f"RAISE EXCEPTION '{child}.{column} refers to a row of {parent} that is not there'"
        f" USING ERRCODE = 'foreign_key_violation', TABLE = '{child}', COLUMN = '{column}';"
    )


def _inserted(child: str, columns: dict[str, str]) -> str:
    """All new rows of a statement against each table that they refer to."""
    checks = "".join(
        f"SELECT count(DISTINCT {column}) INTO wanted FROM fresh;"
        f" PERFORM 1 FROM {parent} p WHERE p.id IN (SELECT {column} FROM fresh) FOR KEY SHARE OF p;"
        f" GET DIAGNOSTICS found = ROW_COUNT; IF found < wanted THEN {_missing(child, column, parent)} END IF;\n"
        for column, parent in columns.items()
    )
    return (
        f"CREATE FUNCTION {child}_refers() RETURNS trigger LANGUAGE plpgsql AS $$ DECLARE wanted bigint; found bigint; BEGIN\n"
        f"{checks} RETURN NULL; END $$;"
        f"CREATE TRIGGER refers_insert AFTER INSERT ON {child} REFERENCING NEW TABLE AS fresh FOR EACH STATEMENT"
        f" EXECUTE FUNCTION {child}_refers();"
    )


def _changed(child: str, columns: dict[str, str]) -> str:
    """A row whose references change: rare, and checked alone."""
    checks = "".join(
        f"PERFORM 1 FROM {parent} p WHERE p.id = NEW.{column} FOR KEY SHARE OF p;"
        f" IF NOT FOUND THEN {_missing(child, column, parent)} END IF;\n"
        for column, parent in columns.items()
    )
    moved = " OR ".join(f"OLD.{column} IS DISTINCT FROM NEW.{column}" for column in columns)
    return (
        f"CREATE FUNCTION {child}_refers_anew() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN\n{checks} RETURN NULL; END $$;"
        f"CREATE TRIGGER refers_update AFTER UPDATE ON {child} FOR EACH ROW WHEN ({moved})"
        f" EXECUTE FUNCTION {child}_refers_anew();"
    )


def _deleted(parent: str, children: list[tuple[str, str]]) -> str:
    """What is referred to is not deleted, and its key does not change."""
    checks = "".join(
        f"PERFORM 1 FROM {child} c WHERE c.{column} IN (SELECT id FROM gone) LIMIT 1; IF FOUND THEN RAISE EXCEPTION"
        f" '{parent}: {child}.{column} refers to a row that is deleted' USING ERRCODE = 'foreign_key_violation',"
        f" TABLE = '{child}', COLUMN = '{column}'; END IF;\n"
        for child, column in children
    )
    return (
        f"CREATE FUNCTION {parent}_referred() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN\n{checks} RETURN NULL; END $$;"
        f"CREATE TRIGGER referred_delete AFTER DELETE ON {parent} REFERENCING OLD TABLE AS gone FOR EACH STATEMENT"
        f" EXECUTE FUNCTION {parent}_referred();"
        f"CREATE FUNCTION {parent}_key_stays() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION"
        f" '{parent}: a key that others refer to does not change' USING ERRCODE = 'foreign_key_violation'; END $$;"
        f"CREATE TRIGGER key_stays BEFORE UPDATE ON {parent} FOR EACH ROW WHEN (OLD.id <> NEW.id)"
        f" EXECUTE FUNCTION {parent}_key_stays();"
    )


PARENTS: dict[str, list[tuple[str, str]]] = {}
for _child, _columns in REFERENCES.items():
    for _column, _parent in _columns.items():
        PARENTS.setdefault(_parent, []).append((_child, _column))

FORWARD = "".join(
    (
        *(_inserted(child, columns) + _changed(child, columns) for child, columns in REFERENCES.items()),
        *(_deleted(parent, children) for parent, children in PARENTS.items()),
    )
)
BACKWARD = "".join(
    (
        *(
            f"DROP TRIGGER refers_insert ON {child}; DROP FUNCTION {child}_refers();"
            f"DROP TRIGGER refers_update ON {child}; DROP FUNCTION {child}_refers_anew();"
            for child in REFERENCES
        ),
        *(
            f"DROP TRIGGER referred_delete ON {parent}; DROP FUNCTION {parent}_referred();"
            f"DROP TRIGGER key_stays ON {parent}; DROP FUNCTION {parent}_key_stays();"
            for parent in PARENTS
        ),
    )
)


class Migration(migrations.Migration):
    dependencies = [
        ("marketplace", "0010_catalogue_changes"),
    ]

    operations = [
        migrations.AlterField(
            model_name="jobevent",
            name="job",
            field=models.ForeignKey(
                db_constraint=False,
                on_delete=django.db.models.deletion.CASCADE,
                related_name="events",
                to="marketplace.job",
            ),
        ),
        migrations.AlterField(
            model_name="placement",
            name="cell",
            field=models.ForeignKey(
                db_constraint=False,
                db_index=False,
                on_delete=django.db.models.deletion.PROTECT,
                related_name="placements",
                to="marketplace.cell",
            ),
        ),
        migrations.AlterField(
            model_name="placement",
            name="contract",
            field=models.ForeignKey(
                db_constraint=False,
                db_index=False,
                on_delete=django.db.models.deletion.PROTECT,
                related_name="placements",
                to="marketplace.contract",
            ),
        ),
        migrations.AlterField(
            model_name="placement",
            name="host",
            field=models.ForeignKey(
                db_constraint=False,
                on_delete=django.db.models.deletion.PROTECT,
                related_name="placements",
                to="marketplace.host",
            ),
        ),
        migrations.AlterField(
            model_name="placement",
            name="job",
            field=models.ForeignKey(
                db_constraint=False,
                db_index=False,
                on_delete=django.db.models.deletion.PROTECT,
                related_name="placements",
                to="marketplace.job",
            ),
        ),
        migrations.AlterField(
            model_name="placement",
            name="organization",
            field=models.ForeignKey(
                db_constraint=False,
                on_delete=django.db.models.deletion.PROTECT,
                related_name="placements",
                to="marketplace.organization",
            ),
        ),
        migrations.AlterField(
            model_name="placement",
            name="site",
            field=models.ForeignKey(
                db_constraint=False,
                on_delete=django.db.models.deletion.PROTECT,
                related_name="placements",
                to="marketplace.site",
            ),
        ),
        migrations.AlterField(
            model_name="placementevent",
            name="placement",
            field=models.ForeignKey(
                db_constraint=False,
                on_delete=django.db.models.deletion.CASCADE,
                related_name="events",
                to="marketplace.placement",
            ),
        ),
        migrations.AlterField(
            model_name="powergrant",
            name="host",
            field=models.ForeignKey(
                db_constraint=False,
                on_delete=django.db.models.deletion.CASCADE,
                related_name="grants",
                to="marketplace.host",
            ),
        ),
        migrations.AlterField(
            model_name="powergrant",
            name="placement",
            field=models.OneToOneField(
                db_constraint=False,
                on_delete=django.db.models.deletion.CASCADE,
                related_name="grant",
                to="marketplace.placement",
            ),
        ),
        migrations.AlterField(
            model_name="powergrant",
            name="site",
            field=models.ForeignKey(
                db_constraint=False,
                db_index=False,
                on_delete=django.db.models.deletion.CASCADE,
                related_name="grants",
                to="marketplace.site",
            ),
        ),
        migrations.RunSQL(FORWARD, BACKWARD),
    ]

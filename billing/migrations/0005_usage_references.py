"""References of usage records are checked by statement, as those of placements are (marketplace 0011): a query for each row and
column was a third of what a batch costs.

A record names the organization and the contract of its placement, so that one look at the placements, which stay locked (KEY
SHARE) until the transaction ends, answers for all three; where it names others they are looked at one by one. Price versions
are never deleted or changed (0002): they need no lock. Nor is a record ever changed.
"""

import importlib
from typing import Any

import django.db.models.deletion
from django.db import migrations, models

marketplace: Any = importlib.import_module("marketplace.migrations.0015_lighter_commits")
USAGE = "billing_usagerecord"
PARENTS = {
    "placement_id": "marketplace_placement", "contract_id": "marketplace_contract", "organization_id": "marketplace_organization",
}  # fmt: skip
_BEGIN, _EACH = marketplace.inserted(USAGE, PARENTS).split(" BEGIN\n")
_KEYS, _, _CHECKS = _EACH.partition(";\n")
FORWARD = (
    f"{_BEGIN} BEGIN\n"
    "SELECT count(DISTINCT price_version_id) INTO found FROM fresh;"
    " IF found > (SELECT count(*) FROM billing_priceversion WHERE id IN (SELECT price_version_id FROM fresh)) THEN"
    f" {marketplace.before._missing(USAGE, 'price_version_id', 'billing_priceversion')} END IF;\n"  # noqa: SLF001
    "PERFORM 1 FROM fresh f JOIN marketplace_placement p ON p.id = f.placement_id AND p.contract_id = f.contract_id"
    " AND p.organization_id = f.organization_id FOR KEY SHARE OF p; GET DIAGNOSTICS found = ROW_COUNT;"
    " IF found = (SELECT count(*) FROM fresh) THEN RETURN NULL; END IF;\n"
    f"{_KEYS};\n{_CHECKS}"
    f"CREATE TRIGGER refers_insert AFTER INSERT ON {USAGE} REFERENCING NEW TABLE AS fresh FOR EACH STATEMENT"
    f" EXECUTE FUNCTION {USAGE}_refers();"
) + "".join(
    f"CREATE FUNCTION {parent}_used() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
    f" PERFORM 1 FROM {USAGE} u WHERE u.{column} IN (SELECT id FROM gone) LIMIT 1; IF FOUND THEN RAISE EXCEPTION"
    f" '{parent}: {USAGE}.{column} refers to a row that is deleted' USING ERRCODE = 'foreign_key_violation',"
    f" TABLE = '{USAGE}', COLUMN = '{column}'; END IF; RETURN NULL; END $$;"
    f"CREATE TRIGGER used_delete AFTER DELETE ON {parent} REFERENCING OLD TABLE AS gone FOR EACH STATEMENT"
    f" EXECUTE FUNCTION {parent}_used();"
    for column, parent in PARENTS.items()
)
BACKWARD = f"DROP TRIGGER refers_insert ON {USAGE}; DROP FUNCTION {USAGE}_refers();" + "".join(
    f"DROP TRIGGER used_delete ON {parent}; DROP FUNCTION {parent}_used();" for parent in PARENTS.values()
)


class Migration(migrations.Migration):

    dependencies = [
        ("marketplace", "0015_lighter_commits"),
        ("billing", "0004_contract_life"),
        ("marketplace", "0017_open_sheds"),
    ]

    operations = [
        migrations.AlterField(
            model_name="usagerecord",
            name="contract",
            field=models.ForeignKey(db_constraint=False, db_index=False, on_delete=django.db.models.deletion.PROTECT, related_name="usage", to="marketplace.contract"),
        ),
        migrations.AlterField(
            model_name="usagerecord",
            name="organization",
            field=models.ForeignKey(db_constraint=False, db_index=False, on_delete=django.db.models.deletion.PROTECT, related_name="+", to="marketplace.organization"),
        ),
        migrations.AlterField(
            model_name="usagerecord",
            name="placement",
            field=models.ForeignKey(db_constraint=False, db_index=False, on_delete=django.db.models.deletion.PROTECT, related_name="usage", to="marketplace.placement"),
        ),
        migrations.AlterField(
            model_name="usagerecord",
            name="price_version",
            field=models.ForeignKey(db_constraint=False, db_index=False, on_delete=django.db.models.deletion.PROTECT, related_name="+", to="billing.priceversion"),
        ),
        migrations.RunSQL(FORWARD, BACKWARD),
    ]

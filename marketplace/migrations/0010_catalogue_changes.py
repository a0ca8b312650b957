"""OfferChange: what a search shows and has changed (services.catalogue). A quote carries the listing's terms as quoted."""

from django.db import migrations, models

ALL, LISTING, HOST, SITE, MODEL = range(5)


def changes(
    table: str, what: int, row: str, *, insert: str | None = "", update: str = "", delete: str | None = ""
) -> str:
    """A function and triggers of `table` that name the row in `row` (an expression of OLD and NEW, here `ROW`).

    insert, delete: a condition, "" for always, None for never; update: columns whose change counts.
    """
    name = f"marketplace_{table.removeprefix('marketplace_')}_offered"
    call = "PERFORM marketplace_offer_changed({what}::smallint, {row});"
    old, new = (call.format(what=what, row=row.replace("ROW", side)) for side in ("OLD", "NEW"))
    sql = f"""
CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF TG_OP <> 'INSERT' THEN {old} END IF;
  IF TG_OP <> 'DELETE' THEN {new} END IF;
  RETURN NULL;
END $$;
"""
    for event, when in (("INSERT", insert), ("UPDATE", _differs(update)), ("DELETE", delete)):
        if when is not None:
            condition = f"WHEN ({when})" if when else ""
            sql += (
                f"CREATE TRIGGER offered_{event.lower()} AFTER {event} ON {table} FOR EACH ROW {condition} "
                f"EXECUTE FUNCTION {name}();\n"
            )
    return sql


def _differs(columns: str) -> str | None:
    names = columns.split()
    if not names:
        return None
    old, new = (", ".join(f"{side}.{n}" for n in names) for side in ("OLD", "NEW"))
    return f"({old}) IS DISTINCT FROM ({new})"


FORWARD = """
CREATE FUNCTION marketplace_offer_changed(what smallint, row_id bigint) RETURNS void LANGUAGE sql AS $$
  INSERT INTO marketplace_offerchange (changed_in, what, row_id) VALUES (pg_current_xact_id()::text::bigint, $1, $2)
  ON CONFLICT DO NOTHING
$$;
""" + "".join(  # noqa: S608
    (
        changes(
            "marketplace_listing", LISTING, "ROW.id",
            update="state site_id organization_id gpu_model_id visibility currency on_demand_price reserved_price flexible_price "
            "spot_floor min_gpus min_term_hours max_term_days eviction_notice_s flexible_hours_per_month flexible_notice_s "
            "available_from available_until interconnect fabric_gbps runtime",
        ),
        changes("marketplace_listing_partners", LISTING, "ROW.listing_id", update="listing_id organization_id"),
        # A host's other changes carry Host.changed_in.
        changes("marketplace_host", HOST, "ROW.id", insert=None),
        changes(
            "marketplace_gpu", HOST, "ROW.host_id", insert="NOT NEW.healthy", update="host_id healthy",
            delete="NOT OLD.healthy",
        ),
        changes("marketplace_reservationblock", HOST, "ROW.host_id", update="host_id reservation_id gpu_indices"),
        changes(
            "marketplace_site", SITE, "ROW.id", insert=None, delete=None,
            update="region country carbon_g_per_kwh renewable_permille mode cell_id",
        ),
        changes("marketplace_gpumodel", MODEL, "ROW.id", insert=None, delete=None, update="name vram_mib"),
        changes("marketplace_cell", ALL, "0::bigint", insert=None, delete=None, update="livemode"),
    )
) + f"""
CREATE FUNCTION marketplace_reservation_offered() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  PERFORM marketplace_offer_changed({HOST}::smallint, host_id) FROM marketplace_reservationblock
  WHERE reservation_id = NEW.id ORDER BY host_id;
  RETURN NULL;
END $$;
CREATE TRIGGER offered_update AFTER UPDATE ON marketplace_reservation FOR EACH ROW
  WHEN ({_differs("state claims_at ends_at held_until contract_id")}) EXECUTE FUNCTION marketplace_reservation_offered();

CREATE FUNCTION marketplace_contract_offered() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  PERFORM marketplace_offer_changed({HOST}::smallint, host_id) FROM marketplace_placement
  WHERE contract_id = NEW.id AND state NOT IN ('released', 'failed', 'lost');
  RETURN NULL;
END $$;
CREATE TRIGGER offered_update AFTER UPDATE ON marketplace_contract FOR EACH ROW
  WHEN ({_differs("kind ends_at")}) EXECUTE FUNCTION marketplace_contract_offered();

CREATE FUNCTION marketplace_offers_truncated() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  PERFORM marketplace_offer_changed({ALL}::smallint, 0::bigint);
  RETURN NULL;
END $$;
""" + "".join(
    f"CREATE TRIGGER offered_truncate AFTER TRUNCATE ON marketplace_{table} FOR EACH STATEMENT "
    "EXECUTE FUNCTION marketplace_offers_truncated();\n"
    for table in ("listing", "host", "reservation", "placement")
)  # fmt: skip
OFFERED = (
    "listing", "listing_partners", "host", "gpu", "reservationblock", "site", "gpumodel", "cell", "reservation", "contract"
)  # fmt: skip
BACKWARD = (
    "".join(f"DROP FUNCTION marketplace_{table}_offered() CASCADE;\n" for table in OFFERED)
    + "DROP FUNCTION marketplace_offers_truncated() CASCADE;\nDROP FUNCTION marketplace_offer_changed(smallint, bigint);\n"
)


class Migration(migrations.Migration):
    dependencies = [("marketplace", "0009_commit_path_indexes")]
    operations = [
        migrations.CreateModel(
            name="OfferChange",
            fields=[
                (
                    "pk",
                    models.CompositePrimaryKey(
                        "changed_in", "what", "row_id", blank=True, editable=False, primary_key=True, serialize=False
                    ),
                ),
                ("changed_in", models.BigIntegerField(help_text="the transaction")),
                (
                    "what",
                    models.PositiveSmallIntegerField(
                        help_text="as in services.catalogue: everything, listing, host, site, model"
                    ),
                ),
                ("row_id", models.BigIntegerField()),
            ],
        ),
        migrations.CreateModel(
            name="OfferFloor",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("floor", models.BigIntegerField(default=0)),
                ("next_floor", models.BigIntegerField(default=0)),
                ("at", models.DateTimeField()),
            ],
        ),
        migrations.AddField(
            model_name="quote",
            name="listing_version",
            field=models.PositiveIntegerField(default=0, help_text="of the listing, when it was quoted"),
        ),
        migrations.AddField(
            model_name="quote",
            name="terms",
            field=models.JSONField(
                default=dict, help_text="the listing's terms as quoted: a contract is made of these"
            ),
        ),
        migrations.RunSQL(FORWARD, BACKWARD),
    ]

"""What must hold whatever code runs: append-only tables, no overlapping usage, immutable invoices, balanced books."""

from django.db import migrations

APPEND_ONLY = (
    "billing_usagerecord",
    "billing_priceversion",
    "billing_ledgertransaction",
    "billing_posting",
    "billing_payoutline",
    "billing_dunningstep",
)

APPEND = """
CREATE FUNCTION billing_refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  RAISE EXCEPTION '% is append-only: correct it with a new row', TG_TABLE_NAME
    USING ERRCODE = 'integrity_constraint_violation';
END $$;
""" + "".join(
    f"CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE ON {table}"
    f" FOR EACH ROW EXECUTE FUNCTION billing_refuse_change();\n"
    for table in APPEND_ONLY
)
UNAPPEND = "".join(f"DROP TRIGGER {table}_append_only ON {table};\n" for table in APPEND_ONLY) + (
    "DROP FUNCTION billing_refuse_change();"
)

# PostgreSQL without btree_gist has no scalar operator class for gist; a one-number range stands in. The key packs
# placement, meter and revision into one number.
OVERLAP = """
ALTER TABLE billing_usagerecord ADD CONSTRAINT usage_no_overlap EXCLUDE USING gist (
  int8range((placement_id << 16) | (meter << 8) | revision, (placement_id << 16) | (meter << 8) | revision, '[]') WITH &&,
  int8range(start_s, end_s) WITH &&
);
ALTER TABLE billing_usagerecord ADD CONSTRAINT usage_key_fits CHECK (meter < 256 AND revision < 256);
"""
UNOVERLAP = """
ALTER TABLE billing_usagerecord DROP CONSTRAINT usage_no_overlap;
ALTER TABLE billing_usagerecord DROP CONSTRAINT usage_key_fits;
"""

INVOICE = """
CREATE FUNCTION billing_guard_invoice() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF TG_OP = 'DELETE' THEN
    IF OLD.state <> 'draft' THEN
      RAISE EXCEPTION 'invoice % is final: issue a credit instead of deleting it', OLD.id
        USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN OLD;
  END IF;
  IF NOT (NEW.state = OLD.state
          OR (OLD.state = 'draft' AND NEW.state IN ('open', 'paid'))
          OR (OLD.state = 'open' AND NEW.state IN ('paid', 'void', 'uncollectible'))
          OR (OLD.state = 'uncollectible' AND NEW.state IN ('paid', 'void'))) THEN
    RAISE EXCEPTION 'invoice % cannot go from % to %', OLD.id, OLD.state, NEW.state
      USING ERRCODE = 'integrity_constraint_violation';
  END IF;
  IF OLD.state = 'draft' AND NEW.state <> 'draft' THEN
    IF NEW.total_minor <> (SELECT COALESCE(SUM(amount_minor), 0) FROM billing_invoiceline WHERE invoice_id = NEW.id)
       OR NEW.due_minor <> GREATEST(0, NEW.total_minor - NEW.credit_minor) THEN
      RAISE EXCEPTION 'invoice %: lines, total and amount due do not agree', NEW.id
        USING ERRCODE = 'integrity_constraint_violation';
    END IF;
  END IF;
  IF OLD.state <> 'draft' AND (
       NEW.account_id, NEW.organization_id, NEW.kind, NEW.legal_entity, NEW.number, NEW.period_start, NEW.period_end,
       NEW.currency, NEW.total_minor, NEW.credit_minor, NEW.due_minor, NEW.buyer, NEW.created_at, NEW.finalized_at)
     IS DISTINCT FROM (
       OLD.account_id, OLD.organization_id, OLD.kind, OLD.legal_entity, OLD.number, OLD.period_start, OLD.period_end,
       OLD.currency, OLD.total_minor, OLD.credit_minor, OLD.due_minor, OLD.buyer, OLD.created_at, OLD.finalized_at)
  THEN
    RAISE EXCEPTION 'invoice % is final: issue a credit instead of changing it', OLD.id
      USING ERRCODE = 'integrity_constraint_violation';
  END IF;
  RETURN NEW;
END $$;
CREATE TRIGGER billing_invoice_guard BEFORE UPDATE OR DELETE ON billing_invoice
  FOR EACH ROW EXECUTE FUNCTION billing_guard_invoice();

CREATE FUNCTION billing_guard_invoice_line() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE held text;
BEGIN
  SELECT state INTO held FROM billing_invoice
   WHERE id = CASE WHEN TG_OP = 'DELETE' THEN OLD.invoice_id ELSE NEW.invoice_id END;
  IF held <> 'draft' OR TG_OP = 'UPDATE' THEN
    RAISE EXCEPTION 'the lines of a final invoice do not change'
      USING ERRCODE = 'integrity_constraint_violation';
  END IF;
  RETURN CASE WHEN TG_OP = 'DELETE' THEN OLD ELSE NEW END;
END $$;
CREATE TRIGGER billing_invoiceline_guard BEFORE INSERT OR UPDATE OR DELETE ON billing_invoiceline
  FOR EACH ROW EXECUTE FUNCTION billing_guard_invoice_line();
"""
UNINVOICE = """
DROP TRIGGER billing_invoiceline_guard ON billing_invoiceline;
DROP TRIGGER billing_invoice_guard ON billing_invoice;
DROP FUNCTION billing_guard_invoice_line();
DROP FUNCTION billing_guard_invoice();
"""

# Set-based, so linear in the postings: the statement trigger looks at the transactions that a statement completes (they
# must sum to zero per currency) or overfills (never); the deferred one, once per header, refuses at commit what was never
# completed. What is complete stays so: one posting more is too many.
LEDGER = """
CREATE FUNCTION billing_check_postings() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE crowded text; unbalanced text; in_currency text;
BEGIN
  SELECT t.key INTO crowded FROM billing_ledgertransaction t
    JOIN (SELECT transaction_id, COUNT(*) AS found FROM billing_posting
           WHERE transaction_id IN (SELECT transaction_id FROM fresh) GROUP BY transaction_id) p
      ON p.transaction_id = t.id WHERE p.found > t.posting_count LIMIT 1;
  IF crowded IS NOT NULL THEN
    RAISE EXCEPTION 'ledger transaction % is complete: book another one', crowded
      USING ERRCODE = 'integrity_constraint_violation';
  END IF;
  SELECT t.key, p.currency INTO unbalanced, in_currency FROM billing_ledgertransaction t
    JOIN (SELECT transaction_id, currency, SUM(amount) AS amount, SUM(SUM(n)) OVER (PARTITION BY transaction_id) AS found
            FROM (SELECT b.transaction_id, a.currency, SUM(b.amount_minor) AS amount, COUNT(*) AS n
                    FROM billing_posting b JOIN billing_ledgeraccount a ON a.id = b.account_id
                   WHERE b.transaction_id IN (SELECT transaction_id FROM fresh) GROUP BY 1, 2) x GROUP BY 1, 2) p
      ON p.transaction_id = t.id WHERE p.found = t.posting_count AND p.amount <> 0 LIMIT 1;
  IF unbalanced IS NOT NULL THEN
    RAISE EXCEPTION 'ledger transaction % does not sum to zero in %', unbalanced, in_currency
      USING ERRCODE = 'integrity_constraint_violation';
  END IF;
  RETURN NULL;
END $$;
CREATE TRIGGER billing_posting_check AFTER INSERT ON billing_posting
  REFERENCING NEW TABLE AS fresh FOR EACH STATEMENT EXECUTE FUNCTION billing_check_postings();

CREATE FUNCTION billing_check_transaction() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE found bigint;
BEGIN
  SELECT COUNT(*) INTO found FROM billing_posting WHERE transaction_id = NEW.id;
  IF found <> NEW.posting_count OR found < 2 THEN
    RAISE EXCEPTION 'ledger transaction % declares % postings and has %', NEW.key, NEW.posting_count, found
      USING ERRCODE = 'integrity_constraint_violation';
  END IF;
  RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER billing_ledgertransaction_balanced AFTER INSERT ON billing_ledgertransaction
  DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION billing_check_transaction();

CREATE TRIGGER billing_ledgeraccount_fixed BEFORE UPDATE OR DELETE ON billing_ledgeraccount
  FOR EACH ROW EXECUTE FUNCTION billing_refuse_change();
"""
UNLEDGER = """
DROP TRIGGER billing_ledgeraccount_fixed ON billing_ledgeraccount;
DROP TRIGGER billing_posting_check ON billing_posting;
DROP TRIGGER billing_ledgertransaction_balanced ON billing_ledgertransaction;
DROP FUNCTION billing_check_postings();
DROP FUNCTION billing_check_transaction();
"""


class Migration(migrations.Migration):
    dependencies = [("billing", "0001_initial")]

    operations = [
        migrations.RunSQL(APPEND, UNAPPEND),
        migrations.RunSQL(OVERLAP, UNOVERLAP),
        migrations.RunSQL(INVOICE, UNINVOICE),
        migrations.RunSQL(LEDGER, UNLEDGER),
    ]

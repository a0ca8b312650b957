"""The forward market: every sale within its offer and its bid, every seller credited, every buyer's window his own."""

from __future__ import annotations

from collections import Counter, defaultdict
from datetime import datetime, timedelta
from fractions import Fraction
from typing import Any

from benchmarks.auditor import rows
from marketplace import ids
from sandbox.market.promises import CLAIM_WITHIN, Promises

Row = dict[str, Any]
LOOKED_WITHIN = timedelta(hours=4)


class Resold:
    def __init__(self, promises: Promises) -> None:
        self.promises = promises
        self.sales: set[int] = set()

    # --- what was sold
    def look(self, now: datetime) -> list[str]:
        return [*self._offers(), *self._fills(), *self._bids(), *self._survive(), *self._met(now)]

    def _offers(self) -> list[str]:
        """An offer sells what it offered, once."""
        return [
            f"resale {ids.encode('rsl', r['id'])} of {r['gpu_count']} GPUs says {r['sold_gpus']} sold; its sales are of {r['live']}"
            for r in rows(
                "SELECT r.*, (SELECT coalesce(sum(f.gpu_count), 0) FROM marketplace_fill f WHERE f.resale_id = r.id"
                " AND f.undone_at IS NULL) AS live FROM marketplace_resale r"
            )
            if r["live"] != r["sold_gpus"] or r["sold_gpus"] > r["gpu_count"]
        ]

    def _fills(self) -> list[str]:
        """Each sale: the offer's window and price, within the bid, at the price of the contract, never to the seller himself."""
        found = []
        for f in rows(
            "SELECT f.*, c.kind, c.price AS agreed, c.starts_at AS begins, c.ends_at AS over, c.organization_id AS buyer, c.upfront_minor,"
            " c.terminated_at, r.price AS asked, r.starts_at AS r_from, r.ends_at AS r_to, r.organization_id AS seller,"
            " b.limit_price, b.kind AS b_kind, b.earliest, b.latest, b.duration_s, b.expires_at, b.organization_id AS bidder,"
            " q.starts_at AS q_from, q.ends_at AS q_to"
            " FROM marketplace_fill f JOIN marketplace_contract c ON c.id = f.contract_id"
            " LEFT JOIN marketplace_quote q ON q.id = c.quote_id"
            " LEFT JOIN marketplace_resale r ON r.id = f.resale_id LEFT JOIN marketplace_standingbid b ON b.id = f.bid_id"
            f" WHERE f.id > {max(self.sales, default=0)} ORDER BY f.id"
        ):
            self.sales.add(f["id"])
            wrong = {
                "another price than its contract": f["price"] != f["agreed"],
                "another window than its contract": (f["starts_at"], f["ends_at"]) != (f["begins"], f["over"]) and not f["terminated_at"],
            }  # fmt: skip
            if f["resale_id"]:
                seconds = int((f["ends_at"] - f["starts_at"]).total_seconds())
                whole = _cents(f["gpu_count"] * seconds * f["price"])
                wrong |= {
                    "another price than was asked": f["price"] != f["asked"],
                    "another window than was offered": (f["starts_at"], f["ends_at"]) != (f["r_from"], f["r_to"]),
                    "sold to its own seller": f["seller"] == f["buyer"],
                    f"{f['upfront_minor']} due at signing, all of it is {whole}": f["upfront_minor"] != whole,
                }
                self.promises.count("resale: one window, one buyer, paid whole at signing", "made")
            if f["bid_id"]:
                # Whoever signs when it has begun has what is left, from the second on in which the GPUs are clear.
                signed = max(f["q_from"], f["at"])
                lost = f["ends_at"] != f["q_to"] or not f["q_from"] <= f["starts_at"] <= signed + CLAIM_WITHIN
                other = (f["q_to"] - f["q_from"]).total_seconds() != f["duration_s"]
                wrong |= {
                    "over its bid's limit": f["price"] > f["limit_price"],
                    "another kind than its bid's": f["kind"] != f["b_kind"],
                    "outside its bid's window": other or not f["earliest"] <= f["q_from"] <= f["latest"],
                    "another window than its bid was quoted": lost,
                    "not its bidder's": f["bidder"] != f["buyer"],
                    "after its bid was over": f["at"] > f["expires_at"] + timedelta(minutes=15),
                }
                self.promises.count(
                    "bid: met within its limit, window and kind", "kept" if not any(wrong.values()) else "broken"
                )
            found += [f"sale {ids.encode('fil', f['id'])}: {what}" for what, is_so in wrong.items() if is_so]
        return found

    def _bids(self) -> list[str]:
        return [
            f"bid {ids.encode('bid', b['id'])} of {b['gpu_count']} GPUs says {b['filled_gpus']} bought; its sales are of {b['live']}"
            for b in rows(
                "SELECT b.*, (SELECT coalesce(sum(f.gpu_count), 0) FROM marketplace_fill f WHERE f.bid_id = b.id"
                " AND f.undone_at IS NULL) AS live FROM marketplace_standingbid b"
            )
            if b["live"] != b["filled_gpus"] or b["filled_gpus"] > b["gpu_count"]
        ]

    def _survive(self) -> list[str]:
        """Whatever becomes of the seller, the buyer has his window; a sale is undone where he did not pay, and only there."""
        found, fates = [], Counter[str]()
        for f in rows(
            "SELECT f.*, c.state, c.ended_at, s.state AS sellers, s.terminated_at IS NOT NULL AS left_early FROM marketplace_fill f"
            " JOIN marketplace_contract c ON c.id = f.contract_id JOIN marketplace_resale r ON r.id = f.resale_id"
            " JOIN marketplace_contract s ON s.id = r.contract_id"
        ):
            name = ids.encode("fil", f["id"])
            if (f["undone_at"] is not None) != (f["state"] == "cancelled") and not self._undoing(f["contract_id"]):
                found.append(
                    f"sale {name} is {'undone' if f['undone_at'] else 'not undone'}, its buyer's contract is {f['state']}"
                )
            early = f["ended_at"] is not None and f["ended_at"] < f["ends_at"]
            if early and f["state"] in {"ending", "ended", "terminated"} and not self._closed_out(f["contract_id"]):
                fates["broken"] += 1
                found.append(
                    f"sale {name}: its buyer's contract ended at {f['ended_at']:%F %T}, its window at {f['ends_at']:%F %T}"
                )
            elif f["undone_at"] is not None:
                fates["undone: not paid"] += 1
            else:
                fates["kept, though its seller left or was ended" if f["left_early"] else "kept"] += 1
        self.promises.tally["resale: its buyer has the window"] = fates
        return found

    def _undoing(self, contract: int) -> bool:
        return bool(
            rows(
                f"SELECT 1 FROM marketplace_outboxmessage WHERE topic = 'marketplace.undo_sale' AND key = '{contract}'"
            )
        )

    def _closed_out(self, contract: int) -> bool:
        name = ids.encode("ctr", contract)
        return bool(
            rows(f"SELECT 1 FROM marketplace_auditevent WHERE verb = 'contract.closed_out' AND subject = '{name}'")
        )

    def _met(self, now: datetime) -> list[str]:
        """A bid and an offer that suit each other do not stand beside each other for hours with nobody looking at them."""
        at = f"'{now.isoformat()}'"
        pairs = rows(
            "SELECT b.id AS bid, r.id AS resale, greatest(b.created_at, r.created_at, b.rests_until) AS since, b.tried_at"
            " FROM marketplace_standingbid b JOIN marketplace_resale r ON r.state = 'open' AND r.price <= b.limit_price"
            " AND r.organization_id <> b.organization_id AND r.starts_at BETWEEN b.earliest AND b.latest"
            " AND EXTRACT(epoch FROM r.ends_at - r.starts_at) = b.duration_s"
            " JOIN marketplace_contract c ON c.id = r.contract_id AND c.gpu_model_id = b.gpu_model_id AND c.kind = b.kind"
            f" WHERE b.state = 'open' AND r.expires_at > {at} AND b.expires_at > {at}"
        )
        return [
            f"bid {ids.encode('bid', p['bid'])} and resale {ids.encode('rsl', p['resale'])} suit each other since {p['since']:%F %T};"
            f" the bid was last looked at {p['tried_at']}"
            for p in pairs
            if p["since"] < now - LOOKED_WITHIN and (p["tried_at"] is None or p["tried_at"] < p["since"])
        ]

    # --- the money
    def books(self, *, last: bool) -> list[str]:
        """Of each line of a buyer its seller has his part; what was credited to him is no more than that, and at the end all of it."""
        found = []
        parts: dict[int, int] = defaultdict(int)
        for line in rows(
            "SELECT l.*, f.resale_id AS of, f.starts_at, f.ends_at, r.fee_permille, s.state AS sellers, s.ends_at AS left_at,"
            " i.state AS stands FROM billing_invoiceline l JOIN billing_invoice i ON i.id = l.invoice_id AND i.state <> 'void'"
            " JOIN marketplace_fill f ON f.contract_id = l.contract_id AND f.resale_id IS NOT NULL"
            " JOIN marketplace_resale r ON r.id = f.resale_id JOIN marketplace_contract s ON s.id = r.contract_id"
            " WHERE l.kind = 'commitment'"
        ):
            start, end = (line["starts_at"].timestamp(), line["ends_at"].timestamp())
            a, b = max(start, line["start_s"]), min(end, line["end_s"])
            owes = line["left_at"].timestamp() if line["sellers"] == "defaulted" else end
            share = Fraction(round(max(0, min(b, owes) - a)), max(1, round(b - a)))
            due = line["amount_minor"] * share * Fraction(1000 - line["fee_permille"], 1000)
            if line["resale_id"] != line["of"] or abs(due - line["seller_minor"]) >= 1:
                found.append(
                    f"line {line['id']} of {line['amount_minor']} gives {line['seller_minor']} to its seller, by the fee {float(due):g}"
                )
            if line["stands"] != "draft":
                parts[line["of"]] += line["seller_minor"]
        credited = {
            row["resale_id"]: -int(row["n"])
            for row in rows(
                "SELECT l.resale_id, sum(l.amount_minor) AS n FROM billing_invoiceline l JOIN billing_invoice i ON i.id = l.invoice_id"
                " JOIN marketplace_resale r ON r.id = l.resale_id AND r.organization_id = i.organization_id"
                " WHERE l.kind = 'resale' AND i.state <> 'void' GROUP BY 1"
            )
        }
        for pk in parts.keys() | credited.keys():
            has, due_ = credited.get(pk, 0), parts.get(pk, 0)
            if has > due_ or (last and has != due_ and self._open(pk)):
                found.append(
                    f"resale {ids.encode('rsl', pk)}: its seller was credited {has}, his buyers' lines give him {due_}"
                )
        self.promises.tally["resale: cents credited to sellers"] = Counter({str(pk): n for pk, n in credited.items()})
        return found

    def _open(self, resale: int) -> bool:
        """Is the seller's account still billed?"""
        return bool(
            rows(
                "SELECT 1 FROM marketplace_resale r JOIN billing_billingaccount a ON a.organization_id = r.organization_id"
                f" WHERE r.id = {resale} AND a.state = 'open'"
            )
        )


def _cents(milli_millionths: int) -> int:
    """GPUs x seconds x millionths an hour, in cents, half away from zero."""
    return int(Fraction(milli_millionths, 3600 * 10_000) + Fraction(1, 2))

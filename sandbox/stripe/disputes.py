"""Disputes: opened by the published dispute cards or through `/_sandbox/disputes`, answered with evidence, or closed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sandbox.stripe import balance
from sandbox.stripe.app import Call, merge, route
from sandbox.stripe.errors import invalid
from sandbox.stripe.store import Obj, new_id

if TYPE_CHECKING:
    from sandbox.stripe.server import Server

FEE = 1500  # minor units, Stripe's US list price of a dispute
_DUE_S = 7 * 86_400


def open_dispute(call: Call, charge: Obj, reason: str) -> Obj:
    """An inquiry only asks; any other reason takes amount and fee from the balance at once."""
    inquiry = reason == "inquiry"
    dispute: Obj = {
        "id": new_id("du"),
        "object": "dispute",
        "amount": charge["amount_captured"] - charge["amount_refunded"],
        "balance_transactions": [],
        "charge": charge["id"],
        "created": call.now,
        "currency": charge["currency"],
        "enhanced_eligibility_types": [],
        "evidence": {"enhanced_evidence": {}},
        "evidence_details": {
            "due_by": call.now + _DUE_S,
            "enhanced_eligibility": {},
            "has_evidence": False,
            "past_due": False,
            "submission_count": 0,
            "submission_method": "not_submitted",
        },
        "is_charge_refundable": inquiry,
        "livemode": False,
        "metadata": {},
        "payment_intent": charge["payment_intent"],
        "reason": "fraudulent" if inquiry else reason,
        "status": "warning_needs_response" if inquiry else "needs_response",
    }
    if not inquiry:
        moved = balance.move(
            call,
            "adjustment",
            -dispute["amount"],
            charge["currency"],
            dispute["id"],
            fee=FEE,
            description=f"Chargeback withdrawal for {charge['id']}",
        )
        dispute["balance_transactions"] = [moved]
    call.save(dispute)
    call.save(charge | {"disputed": True})
    charge["disputed"] = True
    call.emit("charge.dispute.created", dispute)
    if not inquiry:
        call.emit("charge.dispute.funds_withdrawn", dispute)
    return dispute


def settle(call: Call, dispute: Obj, *, won: bool) -> Obj:
    inquiry = dispute["status"].startswith("warning")
    dispute["status"] = "warning_closed" if inquiry else "won" if won else "lost"
    if won and not inquiry:
        moved = balance.move(
            call, "adjustment", dispute["amount"], dispute["currency"], dispute["id"], category="dispute_reversal"
        )
        dispute["balance_transactions"].append(moved)
        call.save(dispute)
        call.emit("charge.dispute.funds_reinstated", dispute)
    call.save(dispute)
    call.emit("charge.dispute.closed", dispute)
    return dispute


def open_by_hand(server: Server, data: dict[str, Any]) -> dict[str, Any]:
    """`POST /_sandbox/disputes {"charge": "ch_...", "reason": "fraudulent"}` or `{"dispute": "du_...", "won": true}`."""
    store = server.store
    with store.transaction():
        call = Call(store, {}, {}, store.now(), server.base_url)
        if "dispute" in data:
            return settle(call, call.load("dispute", data["dispute"]), won=bool(data.get("won")))
        return open_dispute(call, call.load("charge", data["charge"]), data.get("reason", "fraudulent"))


@route("GET", "/v1/disputes", "DisputeListParams")
def list_disputes(call: Call) -> Obj:
    p = call.params
    return call.page("dispute", "/v1/disputes", charge=p.get("charge"), payment_intent=p.get("payment_intent"))


@route("GET", "/v1/disputes/{dispute}", "DisputeRetrieveParams")
def retrieve_dispute(call: Call) -> Obj:
    return call.load("dispute", call.ids["dispute"])


@route("POST", "/v1/disputes/{dispute}", "DisputeUpdateParams")
def update_dispute(call: Call) -> Obj:
    """`winning_evidence` and `losing_evidence` decide at once, as Stripe's test mode does."""
    p, dispute = call.params, call.load("dispute", call.ids["dispute"])
    if not dispute["status"].endswith("needs_response"):
        raise invalid("This dispute is already closed or under review.")
    merge(dispute, p, ("metadata",))
    dispute["evidence"].update(p.get("evidence", {}))
    dispute["evidence_details"]["has_evidence"] = dispute["evidence_details"]["has_evidence"] or "evidence" in p
    if p.get("submit", True) and "evidence" in p:
        dispute["evidence_details"].update(submission_count=1, submission_method="manual")
        verdict = dispute["evidence"].get("uncategorized_text")
        if verdict in ("winning_evidence", "losing_evidence"):
            return settle(call, dispute, won=verdict == "winning_evidence")
        warning = dispute["status"].startswith("warning")
        dispute["status"] = "warning_under_review" if warning else "under_review"
    call.save(dispute)
    call.emit("charge.dispute.updated", dispute)
    return dispute


@route("POST", "/v1/disputes/{dispute}/close", "DisputeCloseParams")
def close_dispute(call: Call) -> Obj:
    dispute = call.load("dispute", call.ids["dispute"])
    if not dispute["status"].endswith("needs_response"):
        raise invalid("This dispute is already closed.")
    return settle(call, dispute, won=False)

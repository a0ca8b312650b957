"""Transfers to connected accounts and their reversals: separate charges and transfers."""

from __future__ import annotations

from sandbox.stripe import accounts, balance
from sandbox.stripe.app import Call, listing, merge, route
from sandbox.stripe.errors import invalid
from sandbox.stripe.store import Obj, new_id


@route("POST", "/v1/transfers", "TransferCreateParams")
def create_transfer(call: Call) -> Obj:
    p = call.params
    amount, currency = p.get("amount"), p["currency"].lower()
    destination = accounts.load(call, p["destination"], param="destination")
    if destination["closed"] or not accounts.transfers_active(destination):
        raise invalid(
            "Your destination account needs to have at least one of the following capabilities enabled: transfers, "
            "crypto_transfers, legacy_payments",
            code="insufficient_capabilities_for_transfer",
        )
    source = (
        call.load("charge", p["source_transaction"], param="source_transaction") if "source_transaction" in p else None
    )
    if source is not None:
        amount = amount if amount is not None else source["amount"]
        _check_source(call, source, amount, currency)
    if amount is None or amount < 1:
        raise invalid("Invalid positive integer", param="amount", code="parameter_invalid_integer")
    if source is None and balance.available(call, currency) < amount:
        raise invalid(
            "You have insufficient available funds in your Stripe account. Try adding funds directly to your available "
            "balance by creating Charges using the 4000000000000077 test card.",
            code="balance_insufficient",
        )
    transfer: Obj = {
        "id": new_id("tr"),
        "object": "transfer",
        "amount": amount,
        "amount_reversed": 0,
        "balance_transaction": None,
        "created": call.now,
        "currency": currency,
        "description": p.get("description"),
        "destination": destination["id"],
        "destination_payment": new_id("py"),
        "livemode": False,
        "metadata": p.get("metadata", {}),
        "reversals": {},
        "reversed": False,
        "source_transaction": p.get("source_transaction"),
        "source_type": p.get("source_type", "card"),
        "transfer_group": p.get("transfer_group") or (f"group_{source['payment_intent']}" if source else None),
    }
    transfer["reversals"] = {**listing([], f"/v1/transfers/{transfer['id']}/reversals"), "total_count": 0}
    moved = balance.move(call, "transfer", -amount, currency, transfer["id"])
    balance.move(
        call, "payment", amount, currency, transfer["destination_payment"], account=destination["id"], category="charge"
    )
    transfer["balance_transaction"] = moved["id"]
    call.save(transfer)
    call.emit("transfer.created", transfer)
    return transfer


def _check_source(call: Call, source: Obj, amount: int, currency: str) -> None:
    if source["status"] != "succeeded" or source["currency"] != currency:
        raise invalid(
            "The source_transaction must be a succeeded charge of the same currency.", param="source_transaction"
        )
    used = sum(
        t["amount"] - t["amount_reversed"]
        for t in call.store.find("transfer", account=call.account, source_transaction=source["id"])
    )
    if used + amount > source["amount"]:
        message = "The transfers from the source_transaction exceed its amount of {}; {} is left."
        raise invalid(message.format(source["amount"], source["amount"] - used), param="amount")


@route("GET", "/v1/transfers", "TransferListParams")
def list_transfers(call: Call) -> Obj:
    p = call.params
    return call.page(
        "transfer", "/v1/transfers", destination=p.get("destination"), transfer_group=p.get("transfer_group")
    )


@route("GET", "/v1/transfers/{transfer}", "TransferRetrieveParams")
def retrieve_transfer(call: Call) -> Obj:
    return call.load("transfer", call.ids["transfer"])


@route("POST", "/v1/transfers/{transfer}", "TransferUpdateParams")
def update_transfer(call: Call) -> Obj:
    transfer = call.load("transfer", call.ids["transfer"])
    call.save(merge(transfer, call.params, ("metadata", "description")))
    call.emit("transfer.updated", transfer)
    return transfer


@route("POST", "/v1/transfers/{id}/reversals", "TransferReversalCreateParams")
def create_reversal(call: Call) -> Obj:
    """As far as the transfer goes, and as far as the destination's balance goes."""
    p, transfer = call.params, call.load("transfer", call.ids["id"])
    left = transfer["amount"] - transfer["amount_reversed"]
    amount = p.get("amount", left)
    if left == 0:
        raise invalid("Transfer is already fully reversed.", code="transfer_already_reversed")
    if not 0 < amount <= left:
        raise invalid(
            f"Reversal amount ({amount}) is greater than unreversed amount ({left}) on the transfer.", param="amount"
        )
    if balance.available(call, transfer["currency"], account=transfer["destination"]) < amount:
        message = "The recipient's account does not have sufficient funds to reverse this transfer."
        raise invalid(message, code="balance_insufficient")
    reversal: Obj = {
        "id": new_id("trr"),
        "object": "transfer_reversal",
        "amount": amount,
        "created": call.now,
        "currency": transfer["currency"],
        "metadata": p.get("metadata") or {},
        "transfer": transfer["id"],
    }
    moved = balance.move(call, "transfer_refund", amount, transfer["currency"], reversal["id"])
    balance.move(
        call,
        "payment_refund",
        -amount,
        transfer["currency"],
        transfer["destination_payment"],
        account=transfer["destination"],
    )
    reversal["balance_transaction"] = moved["id"]
    call.save(reversal)
    transfer["amount_reversed"] += amount
    transfer["reversed"] = transfer["amount_reversed"] == transfer["amount"]
    merge(transfer, {k: v for k, v in p.items() if k == "description"}, ("description",))
    rows = call.store.find("transfer_reversal", account=call.account, transfer=transfer["id"], newest_first=True)
    more = len(rows) > 10
    transfer["reversals"] = {**listing(rows[:10], transfer["reversals"]["url"], more=more), "total_count": len(rows)}
    call.save(transfer)
    call.emit("transfer.reversed", transfer)
    return reversal


@route("GET", "/v1/transfers/{id}/reversals", "TransferReversalListParams")
def list_reversals(call: Call) -> Obj:
    transfer = call.load("transfer", call.ids["id"])
    return call.page("transfer_reversal", f"/v1/transfers/{transfer['id']}/reversals", transfer=transfer["id"])


@route("GET", "/v1/transfers/{transfer}/reversals/{id}", "TransferReversalRetrieveParams")
def retrieve_reversal(call: Call) -> Obj:
    return call.load("transfer_reversal", call.ids["id"])

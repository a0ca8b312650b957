"""Balance transactions and balances: every movement of money, per account, in minor units."""

from __future__ import annotations

from typing import Any

from sandbox.stripe.app import Call, route
from sandbox.stripe.store import Obj, new_id

_CATEGORY = {"payment_refund": "refund", "adjustment": "dispute", "transfer_refund": "transfer_reversal"}


def processing_fee(amount: int) -> int:
    """Stripe's US list price for cards: 2.9 % + 30 minor units, half away from zero, never above the amount."""
    return min(amount, (amount * 29 + 500) // 1000 + 30)


def move(
    call: Call,
    type_: str,
    amount: int,
    currency: str,
    source: str,
    *,
    fee: int = 0,
    account: str | None = None,
    available_now: bool = True,
    description: str | None = None,
    category: str | None = None,
) -> Obj:
    """Write one balance transaction (amount, fee and net in minor units, net = amount - fee); returns it."""
    settle_s = 0 if available_now else int(call.store.setting("settle_s", 0))
    transaction: Obj = {
        "id": new_id("txn"),
        "object": "balance_transaction",
        "amount": amount,
        "available_on": call.now + settle_s,
        "balance_type": "payments",
        "created": call.now,
        "currency": currency,
        "description": description,
        "exchange_rate": None,
        "fee": fee,
        "fee_details": [
            {
                "amount": fee,
                "application": None,
                "currency": currency,
                "description": "Stripe processing fees",
                "type": "stripe_fee",
            }
        ]
        if fee
        else [],
        "net": amount - fee,
        "reporting_category": category or _CATEGORY.get(type_, type_),
        "source": source,
        "status": "available" if settle_s <= 0 else "pending",
        "type": type_,
    }
    return call.store.put(transaction, account=call.account if account is None else account)


def available(call: Call, currency: str, *, account: str | None = None) -> int:
    """Net of what has settled by now, in minor units."""
    total, waiting = totals(call, account=account).get(currency, (0, 0))
    return total - waiting


def totals(call: Call, *, account: str | None = None) -> dict[str, tuple[int, int]]:
    """Currency -> (net of everything, of which not yet available)."""
    sql = (
        "SELECT json_extract(body, '$.currency'), SUM(json_extract(body, '$.net')),"
        " SUM(CASE WHEN json_extract(body, '$.available_on') > ? THEN json_extract(body, '$.net') ELSE 0 END)"
        " FROM objects WHERE kind = 'balance_transaction' AND account = ? GROUP BY 1"
    )
    who = call.account if account is None else account
    return {row[0]: (row[1], row[2]) for row in call.store.execute(sql, (call.now, who))}


def _amounts(pairs: dict[str, int]) -> list[dict[str, Any]]:
    return [{"amount": v, "currency": k, "source_types": {"card": v}} for k, v in sorted(pairs.items())]


def _aged(call: Call, transaction: Obj) -> Obj:
    return {**transaction, "status": "pending" if transaction["available_on"] > call.now else "available"}


@route("GET", "/v1/balance", "BalanceRetrieveParams")
def retrieve_balance(call: Call) -> Obj:
    sums = totals(call) or {"usd": (0, 0)}
    return {
        "object": "balance",
        "available": _amounts({c: total - waiting for c, (total, waiting) in sums.items()}),
        "livemode": False,
        "pending": _amounts({c: waiting for c, (_, waiting) in sums.items()}),
    }


@route("GET", "/v1/balance_transactions", "BalanceTransactionListParams")
def list_balance_transactions(call: Call) -> Obj:
    p = call.params
    page = call.page(
        "balance_transaction",
        "/v1/balance_transactions",
        type=p.get("type"),
        source=p.get("source"),
        currency=p.get("currency"),
        payout=p.get("payout"),
    )
    return {**page, "data": [_aged(call, t) for t in page["data"]]}


@route("GET", "/v1/balance_transactions/{id}", "BalanceTransactionRetrieveParams")
def retrieve_balance_transaction(call: Call) -> Obj:
    return _aged(call, call.load("balance_transaction", call.ids["id"]))

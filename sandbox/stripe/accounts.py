"""Accounts v2 with the recipient configuration, and the links that lead an operator through onboarding."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from sandbox.stripe.app import Call, merge, route
from sandbox.stripe.errors import invalid
from sandbox.stripe.store import Obj, new_id

_INCLUDABLE = ("configuration", "defaults", "future_requirements", "identity", "requirements")
_NEEDED = (
    "identity.business_details.registered_name",
    "identity.attestations.terms_of_service",
    "configuration.recipient.default_outbound_destination",
)


def rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def _view(account: Obj, include: list[str]) -> Obj:
    """v2 leaves heavy parts null unless they are asked for with `include`."""
    out = {**account, **dict.fromkeys(_INCLUDABLE)}
    for name in include:
        top, _, inner = name.partition(".")
        if not inner:
            out[top] = account[top]
        else:
            out[top] = {**(out[top] or {}), inner: account[top].get(inner)}
    return out


def transfers_active(account: Obj) -> bool:
    recipient = account["configuration"].get("recipient") or {}
    balance = (recipient.get("capabilities") or {}).get("stripe_balance") or {}
    return (balance.get("stripe_transfers") or {}).get("status") == "active"


def _capability(*, active: bool) -> Obj:
    details = [] if active else [{"code": "requirements_past_due", "resolution": "provide_info"}]
    return {"status": "active" if active else "restricted", "status_details": details}


def _entry(description: str) -> Obj:
    restricts = {
        "capability": "stripe_balance.stripe_transfers",
        "configuration": "recipient",
        "deadline": {"status": "currently_due"},
    }
    return {
        "awaiting_action_from": "user",
        "description": description,
        "errors": [],
        "impact": {"restricts_capabilities": [restricts]},
        "minimum_deadline": {"status": "currently_due"},
        "requested_reasons": [{"code": "routine_onboarding"}],
    }


def set_onboarded(call: Call, account: Obj, *, done: bool, identity: Obj | None = None) -> Obj:
    """Grant or take away the transfer capability as onboarding does, and tell the platform."""
    recipient = account["configuration"].get("recipient")
    if recipient is not None:
        capability = _capability(active=done)
        recipient["capabilities"] = {"stripe_balance": {"payouts": capability, "stripe_transfers": capability}}
    if identity:
        account["identity"] = {**(account["identity"] or {}), **identity}
    if done:
        account["requirements"] = {"entries": []}
    else:
        summary = {"minimum_deadline": {"status": "currently_due"}}
        account["requirements"] = {"entries": [_entry(d) for d in _NEEDED], "summary": summary}
    call.store.put(account)
    call.emit("account.updated", v1_view(account), account=account["id"])
    return account


def v1_view(account: Obj) -> Obj:
    """The same account as v1 shows it, which is what a snapshot `account.updated` event carries."""
    active = transfers_active(account)
    return {
        "id": account["id"],
        "object": "account",
        "charges_enabled": False,
        "country": (account["identity"] or {}).get("country", "US").upper(),
        "created": int(datetime.fromisoformat(account["created"]).timestamp()),
        "default_currency": "usd",
        "details_submitted": active,
        "email": account["contact_email"],
        "metadata": account["metadata"],
        "payouts_enabled": active,
        "type": "none",
        "capabilities": {"transfers": "active" if active else "inactive"},
    }


def _configuration(given: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    out = dict(old)
    for name in given:
        if name != "recipient":
            raise invalid("The sandbox knows the recipient configuration only.", param=f"configuration.{name}")
        asked = ((given["recipient"].get("capabilities") or {}).get("stripe_balance") or {}).get(
            "stripe_transfers"
        ) or {}
        current = out.get("recipient") or {"applied": True, "capabilities": None}
        if asked.get("requested") and not current["capabilities"]:
            current["capabilities"] = {"stripe_balance": {"stripe_transfers": _capability(active=False)}}
        out["recipient"] = current
    return out


def _defaults(given: dict[str, Any], old: dict[str, Any] | None) -> dict[str, Any]:
    responsibilities = {**((old or {}).get("responsibilities") or {}), **(given.get("responsibilities") or {})}
    responsibilities.setdefault("requirements_collector", "stripe")
    return {**(old or {}), **given, "responsibilities": responsibilities}


@route("POST", "/v2/core/accounts", "v2.core.AccountCreateParams")
def create_account(call: Call) -> Obj:
    p = call.params
    recipient = _configuration(p.get("configuration", {}), {})
    if recipient and "losses_collector" not in (p.get("defaults", {}).get("responsibilities") or {}):
        raise invalid("defaults.responsibilities is required for a recipient.", param="defaults.responsibilities")
    account: Obj = {
        "id": new_id("acct", 16),
        "object": "v2.core.account",
        "applied_configurations": list(recipient),
        "closed": False,
        "configuration": recipient,
        "contact_email": p.get("contact_email"),
        "contact_phone": p.get("contact_phone"),
        "created": rfc3339(call.now),
        "dashboard": p.get("dashboard", "none"),
        "defaults": _defaults(p.get("defaults", {}), None),
        "display_name": p.get("display_name"),
        "future_requirements": {"entries": []},
        "identity": p.get("identity", {}),
        "livemode": False,
        "metadata": p.get("metadata", {}),
        "requirements": {
            "entries": [_entry(d) for d in _NEEDED],
            "summary": {"minimum_deadline": {"status": "currently_due"}},
        },
    }
    call.store.put(account)
    return _view(account, p.get("include", []))


@route("GET", "/v2/core/accounts", "v2.core.AccountListParams")
def list_accounts(call: Call) -> Obj:
    limit = call.params.get("limit", 20)
    rows = call.store.find("v2.core.account", newest_first=True, limit=limit)
    wanted = set(call.params.get("applied_configurations", []))
    rows = [_view(r, []) for r in rows if wanted <= set(r["applied_configurations"])]
    return {"data": rows, "next_page_url": None, "previous_page_url": None}


@route("GET", "/v2/core/accounts/{id}", "v2.core.AccountRetrieveParams")
def retrieve_account(call: Call) -> Obj:
    return _view(load(call, call.ids["id"]), call.params.get("include", []))


def load(call: Call, id_: str, *, param: str = "id") -> Obj:
    account = call.store.get(id_, kind="v2.core.account")
    return account or call.load("v2.core.account", id_, noun="account", param=param)


@route("POST", "/v2/core/accounts/{id}", "v2.core.AccountUpdateParams")
def update_account(call: Call) -> Obj:
    p, account = call.params, load(call, call.ids["id"])
    merge(account, p, ("contact_email", "contact_phone", "dashboard", "display_name", "metadata"))
    account["configuration"] = _configuration(p.get("configuration", {}), account["configuration"])
    account["applied_configurations"] = list(account["configuration"])
    account["defaults"] = _defaults(p.get("defaults", {}), account["defaults"])
    account["identity"] = {**account["identity"], **p.get("identity", {})}
    call.store.put(account)
    call.emit("account.updated", v1_view(account), account=account["id"])
    return _view(account, p.get("include", []))


@route("POST", "/v2/core/accounts/{id}/close", "v2.core.AccountCloseParams")
def close_account(call: Call) -> Obj:
    account = load(call, call.ids["id"])
    account["closed"] = True
    account["configuration"] = {}
    account["applied_configurations"] = []
    call.store.put(account)
    return _view(account, [])


@route("POST", "/v2/core/account_links", "v2.core.AccountLinkCreateParams")
def create_account_link(call: Call) -> Obj:
    p = call.params
    load(call, p["account"], param="account")
    kind = p["use_case"]["type"]
    if kind not in p["use_case"]:
        raise invalid(f"use_case.{kind} is required when use_case.type is {kind}.", param=f"use_case.{kind}")
    token = new_id("", 24)[1:]
    expires = datetime.fromtimestamp(call.now, UTC) + timedelta(minutes=10)
    link: Obj = {
        "object": "v2.core.account_link",
        "account": p["account"],
        "created": rfc3339(call.now),
        "expires_at": rfc3339(expires.timestamp()),
        "livemode": False,
        "url": f"{call.base_url}/o/{token}",
        "use_case": p["use_case"],
    }
    call.store.put(
        {**link, "id": f"aclk_{token}", "used": False, "until": expires.timestamp()}, kind="sandbox.account_link"
    )
    return link

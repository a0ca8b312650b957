"""Operators as Accounts v2 recipients, and transfers to them."""

from typing import Any

from billing.gateway.wire import api, ask, keyed, noted


def create_recipient(*, name: str, email: str, country: str, reference: str, key: str) -> str:
    """An Accounts v2 recipient: the platform collects, answers for losses, and transfers."""
    made = keyed(
        "v2.core.accounts.create",
        key,
        lambda key: api().v2.core.accounts.create(
            {
                "display_name": name,
                "contact_email": email,
                "dashboard": "express",
                "identity": {"country": country.lower()},
                "configuration": {
                    "recipient": {"capabilities": {"stripe_balance": {"stripe_transfers": {"requested": True}}}}
                },
                "defaults": {"responsibilities": {"fees_collector": "application", "losses_collector": "application"}},
                "metadata": {"operator": reference},
            },
            {"idempotency_key": key},
        ),
    )
    return made.id


def onboarding_link(account: str, *, refresh_url: str, return_url: str, key: str) -> str:
    made = keyed(
        "v2.core.account_links.create",
        key,
        lambda key: api().v2.core.account_links.create(
            {
                "account": account,
                "use_case": {
                    "type": "account_onboarding",
                    "account_onboarding": {
                        "refresh_url": refresh_url,
                        "return_url": return_url,
                    },
                },
            },
            {"idempotency_key": key},
        ),
    )
    return made.url


def transfers_enabled(account: str) -> bool:
    """May the account receive transfers now?"""
    got: Any = ask(
        "v2.core.accounts.retrieve",
        lambda: api().v2.core.accounts.retrieve(account, {"include": ["configuration.recipient"]}),
    )
    try:
        return bool(got.configuration.recipient.capabilities.stripe_balance.stripe_transfers.status == "active")
    except AttributeError:
        return False


def transfer(*, account: str, amount: int, currency: str, reference: str, key: str) -> str:
    made = keyed(
        "transfers.create",
        key,
        lambda key: api().v1.transfers.create(
            {
                "amount": amount,
                "currency": currency.lower(),
                "destination": account,
                "metadata": {"payout": reference},
            },
            {"idempotency_key": key},
        ),
    )
    return made.id


def find_transfer(account: str, reference: str) -> str:
    """Id of the transfer that carries our payout's id; empty where there is none."""
    page = ask("transfers.list", lambda: api().v1.transfers.list({"destination": account, "limit": 100}))
    for got in page.auto_paging_iter():
        if noted(got.metadata, "payout") == reference:
            return got.id
    return ""

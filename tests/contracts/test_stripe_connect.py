"""Operators: accounts v2, onboarding links, transfers as far as the balance goes, reversals, payouts."""

import pytest
import stripe

from tests.contracts.conftest import new_recipient, onboarding_link
from tests.contracts.test_stripe_payments import pay

pytestmark = pytest.mark.serverless


@pytest.fixture
def funded(api, customer, card):
    """A charge of 50.00 that is available at once."""
    return pay(api, customer, card(customer, "pm_card_bypassPending").id)


def test_a_new_recipient_cannot_receive_yet(api, funded):
    account = new_recipient(api)
    assert account.applied_configurations == ["recipient"]
    assert account.configuration.recipient.capabilities.stripe_balance.stripe_transfers.status != "active"
    assert account.requirements.entries
    link = onboarding_link(api, account.id)
    assert link.url.startswith("http")
    with pytest.raises(stripe.InvalidRequestError) as refused:
        api.v1.transfers.create({"amount": 100, "currency": "usd", "destination": account.id})
    assert refused.value.code == "insufficient_capabilities_for_transfer"


def test_v2_parts_are_null_unless_included(api):
    account = new_recipient(api)
    bare = api.v2.core.accounts.retrieve(account.id)
    assert bare.configuration is None
    full = api.v2.core.accounts.retrieve(account.id, {"include": ["configuration.recipient"]})
    assert full.configuration.recipient.applied is True


def test_transfer_and_reversal(api, recipient, funded):
    transfer = api.v1.transfers.create(
        {
            "amount": 1_500,
            "currency": "usd",
            "destination": recipient,
            "transfer_group": "payout-1",
            "metadata": {"line": "1"},
        }
    )
    assert (transfer.amount, transfer.reversed, transfer.destination) == (1_500, False, recipient)
    moved = api.v1.balance_transactions.retrieve(transfer.balance_transaction)
    assert (moved.amount, moved.type) == (-1_500, "transfer")
    reversal = api.v1.transfers.reversals.create(transfer.id, {"amount": 400, "metadata": {"why": "refund"}})
    assert reversal.amount == 400
    read = api.v1.transfers.retrieve(transfer.id)
    assert (read.amount_reversed, read.reversed) == (400, False)
    with pytest.raises(stripe.InvalidRequestError):
        api.v1.transfers.reversals.create(transfer.id, {"amount": 1_101})
    api.v1.transfers.reversals.create(transfer.id)
    assert api.v1.transfers.retrieve(transfer.id).reversed is True


def test_a_transfer_needs_available_funds(api, recipient):
    with pytest.raises(stripe.InvalidRequestError) as short:
        api.v1.transfers.create({"amount": 99_999_999, "currency": "usd", "destination": recipient})
    assert short.value.code == "balance_insufficient"


def test_a_source_transaction_carries_no_more_than_its_charge(api, recipient, funded):
    asked = {"currency": "usd", "destination": recipient, "source_transaction": funded.latest_charge}
    api.v1.transfers.create({"amount": 3_000, **asked})
    with pytest.raises(stripe.InvalidRequestError):
        api.v1.transfers.create({"amount": 2_001, **asked})


def test_transfers_are_listed_by_destination_and_group(api, recipient, funded):
    made = api.v1.transfers.create(
        {"amount": 10, "currency": "usd", "destination": recipient, "transfer_group": funded.id}
    )
    assert [t.id for t in api.v1.transfers.list({"transfer_group": funded.id}).data] == [made.id]


def test_an_unknown_destination(api, funded):
    with pytest.raises(stripe.InvalidRequestError):
        api.v1.transfers.create({"amount": 10, "currency": "usd", "destination": "acct_nowhere"})

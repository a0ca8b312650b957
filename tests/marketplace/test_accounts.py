"""Organizations, people and keys: every rule, and the races on the last owner and the last use of a token."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from django.db import connection

from marketplace.errors import MarketError
from marketplace.models import ApiKey, AuditEvent, BillingStanding, Invitation, Membership, OutboxMessage
from marketplace.services import accounts
from marketplace.tenancy import SYSTEM, Actor
from tests import factories
from tests.factories import NOW
from tests.marketplace.refusals import refused

pytestmark = pytest.mark.django_db


def verbs(organization):
    return list(AuditEvent.objects.filter(organization=organization).order_by("id").values_list("verb", flat=True))


def test_a_new_organization_has_an_owner_no_card_and_an_account_to_be_opened():
    person = factories.user()
    made = accounts.create_organization(
        person, name="Acme", country="de", currency="eur", is_customer=True, is_operator=True, livemode=True, now=NOW
    )
    assert (made.country, made.currency, made.is_operator) == ("DE", "EUR", True)
    assert Membership.objects.get(organization=made).role == "owner"
    assert made.standing.state == BillingStanding.State.NO_CARD
    message = OutboxMessage.objects.get(topic="billing.open_account")
    assert message.payload == {"organization": made.pk}
    assert verbs(made) == ["organization.created"]


def test_neither_customer_nor_operator_is_nothing():
    with refused("invalid_request"):
        accounts.create_organization(factories.user(), name="X", is_customer=False, is_operator=False, now=NOW)
    organization = factories.organization()
    with refused("invalid_request"):
        accounts.update_organization(organization, actor=factories.actor(organization), now=NOW, is_customer=False)


def test_an_update_is_on_the_record_with_before_and_after():
    organization = factories.organization("Old")
    accounts.update_organization(organization, actor=factories.actor(organization), now=NOW, name="New")
    event = AuditEvent.objects.get(organization=organization)
    assert (event.before, event.after) == ({"name": "Old"}, {"name": "New"})


def test_switching_needs_a_membership():
    mine, other = factories.organization(), factories.organization()
    person = factories.member(mine, "viewer").user
    session = {}
    assert accounts.switch_organization(person, mine.pk, session=session, now=NOW).organization == mine
    assert session == {"organization": mine.pk}
    with refused("not_found"):
        accounts.switch_organization(person, other.pk, session=session, now=NOW)
    assert session == {"organization": mine.pk}


class TestInvitations:
    def test_the_invited_address_joins_once(self):
        organization = factories.organization()
        row, token = accounts.invite(
            organization, email="Bob@Example.org", role="engineer", actor=factories.actor(organization), now=NOW
        )
        assert row.digest != token
        bob = factories.user("bob@example.org")
        assert accounts.accept_invitation(bob, token, now=NOW).role == "engineer"
        with refused("invitation_invalid"):
            accounts.accept_invitation(bob, token, now=NOW)
        assert verbs(organization) == ["invitation.created", "member.joined"]

    def test_another_address_a_late_one_and_a_wrong_token_are_refused(self):
        organization = factories.organization()
        _, token = accounts.invite(
            organization, email="bob@example.org", role="viewer", actor=factories.actor(organization), now=NOW
        )
        for person, text, at in (
            (factories.user("eve@example.org"), token, NOW),
            (bob := factories.user("bob@example.org"), token + "x", NOW),
            (bob, token, NOW + timedelta(days=7)),
        ):
            with refused("invitation_invalid"):
                accounts.accept_invitation(person, text, now=at)
        assert not organization.memberships.exists()

    def test_a_member_is_not_invited_and_a_withdrawn_one_is_gone(self):
        organization = factories.organization()
        boss = factories.actor(organization)
        bob = factories.member(organization, "viewer").user
        with refused("already_member"):
            accounts.invite(organization, email=bob.email.upper(), role="viewer", actor=boss, now=NOW)
        row, token = accounts.invite(organization, email="c@example.org", role="viewer", actor=boss, now=NOW)
        accounts.withdraw_invitation(row, actor=boss, now=NOW)
        with refused("invitation_invalid"):
            accounts.accept_invitation(factories.user("c@example.org"), token, now=NOW)

    def test_an_accepted_one_cannot_be_withdrawn(self):
        organization = factories.organization()
        boss = factories.actor(organization)
        row, token = accounts.invite(organization, email="c@example.org", role="viewer", actor=boss, now=NOW)
        accounts.accept_invitation(factories.user("c@example.org"), token, now=NOW)
        with refused("invitation_invalid"):
            accounts.withdraw_invitation(row, actor=boss, now=NOW)


class TestRoles:
    def test_the_last_owner_stays(self):
        organization = factories.organization()
        owner = factories.member(organization, "owner")
        boss = factories.actor(organization)
        with refused("last_owner"):
            accounts.change_role(owner, "admin", actor=boss, now=NOW)
        with refused("last_owner"):
            accounts.remove_member(owner, actor=boss, now=NOW)
        factories.member(organization, "owner")
        assert accounts.change_role(owner, "admin", actor=boss, now=NOW).role == "admin"

    def test_only_an_owner_makes_or_unmakes_one(self):
        organization = factories.organization()
        owner, viewer = factories.member(organization, "owner"), factories.member(organization, "viewer")
        factories.member(organization, "owner")
        admin = factories.actor(organization, "admin")
        for attempt in (
            lambda: accounts.change_role(viewer, "owner", actor=admin, now=NOW),
            lambda: accounts.change_role(owner, "viewer", actor=admin, now=NOW),
            lambda: accounts.remove_member(owner, actor=admin, now=NOW),
            lambda: accounts.invite(organization, email="x@example.org", role="owner", actor=admin, now=NOW),
        ):
            with refused("forbidden"):
                attempt()
        accounts.change_role(viewer, "engineer", actor=admin, now=NOW)
        accounts.remove_member(viewer, actor=admin, now=NOW)
        assert verbs(organization) == ["member.role_changed", "member.removed"]

    def test_a_role_nobody_knows(self):
        organization = factories.organization()
        with refused("invalid_request"):
            accounts.change_role(factories.member(organization, "viewer"), "king", actor=SYSTEM, now=NOW)


class TestKeys:
    def test_the_token_is_shown_once_and_names_its_mode(self):
        for livemode, start in ((True, "tr_live_"), (False, "tr_test_")):
            organization = factories.organization(livemode=livemode)
            row, token = accounts.issue_key(
                organization, name="ci", scopes=["jobs:read"], actor=factories.actor(organization), now=NOW
            )
            assert token.startswith(start)
            assert token.startswith(row.prefix)
            assert len(row.prefix) < len(token) / 2
            assert token not in str(ApiKey.objects.filter(pk=row.pk).values())

    def test_no_key_may_do_more_than_who_issued_it(self):
        organization = factories.organization()
        admin = factories.actor(organization, "admin")
        with refused("forbidden"):
            accounts.issue_key(organization, name="k", scopes=["billing:write"], actor=admin, now=NOW)
        partner = Actor(kind="key", organization_id=organization.pk, scopes=frozenset({"keys:write", "jobs:read"}))
        accounts.issue_key(organization, name="k", scopes=["jobs:read"], actor=partner, now=NOW)
        with refused("forbidden"):
            accounts.issue_key(organization, name="k", scopes=["jobs:write"], actor=partner, now=NOW)

    @pytest.mark.parametrize("scopes", [[], ["jobs:fly"]])
    def test_scopes_are_of_the_table(self, scopes):
        organization = factories.organization()
        with refused("invalid_request"):
            accounts.issue_key(organization, name="k", scopes=scopes, actor=factories.actor(organization), now=NOW)

    def test_a_key_that_has_expired_before_it_is_made(self):
        organization = factories.organization()
        boss = factories.actor(organization)
        with refused("invalid_request"):
            accounts.issue_key(organization, name="k", scopes=["jobs:read"], actor=boss, now=NOW, expires_at=NOW)

    def test_revoking_twice_is_once(self):
        organization = factories.organization()
        row, _ = factories.key(organization)
        boss = factories.actor(organization)
        assert accounts.revoke_key(row, actor=boss, now=NOW) is True
        assert accounts.revoke_key(row, actor=boss, now=NOW) is False
        assert verbs(organization) == ["key.revoked"]


def test_standing_is_one_row_and_only_a_change_of_state_is_audited():
    organization = factories.organization(standing="no_card")
    for state, minor in (("good", 500), ("good", 400), ("past_due", 0)):
        accounts.set_billing_standing(organization.pk, state=state, available_minor=minor, now=NOW)
    organization.standing.refresh_from_db()
    assert (organization.standing.state, organization.standing.available_minor) == ("past_due", 0)
    assert verbs(organization) == ["billing.standing_changed"] * 2
    with refused("not_found"):
        accounts.set_billing_standing(10**9, state="good", available_minor=0, now=NOW)
    with refused("invalid_request"):
        accounts.set_billing_standing(organization.pk, state="rich", available_minor=0, now=NOW)


@pytest.mark.django_db(transaction=True)
class TestRaces:
    def together(self, *calls):
        """Run them at once, each with a connection of its own; returns the codes of refusals, None for success."""

        def one(call):
            try:
                call()
            except MarketError as error:
                return error.code
            finally:
                connection.close()
            return None

        with ThreadPoolExecutor(len(calls)) as pool:
            return list(pool.map(one, calls))

    def test_two_owners_who_remove_each_other_leave_one(self):
        organization = factories.organization()
        pair = [factories.member(organization, "owner") for _ in range(2)]
        boss = factories.actor(organization)
        codes = self.together(*(lambda m=m: accounts.remove_member(m, actor=boss, now=NOW) for m in pair))
        assert sorted(codes, key=str) == [None, "last_owner"]
        assert Membership.objects.filter(organization=organization, role="owner").count() == 1

    def test_a_token_is_good_for_one_of_four(self):
        organization = factories.organization()
        row, token = accounts.invite(
            organization, email="bob@example.org", role="viewer", actor=factories.actor(organization), now=NOW
        )
        bob = factories.user("bob@example.org")
        codes = self.together(*[lambda: accounts.accept_invitation(bob, token, now=NOW)] * 4)
        assert sorted(codes, key=str) == [None, *["invitation_invalid"] * 3]
        assert Invitation.objects.get(pk=row.pk).accepted_at == NOW

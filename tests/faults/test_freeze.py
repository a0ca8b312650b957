"""The platform's freeze: by one button, on record, and every command but a lowering stops, whoever would give it."""

from datetime import timedelta

import pytest
from django.contrib.auth.models import Permission
from django.db import transaction
from django.urls import reverse

from marketplace import tasks
from marketplace.errors import MarketError
from marketplace.locks import Lock, acquire
from marketplace.models import AuditEvent, Host, Miner, Placement, PowerFreeze, PowerNode, Site
from marketplace.services import agents, curtailments, power, sites, verifications
from marketplace.services.power import freeze
from marketplace.tenancy import SYSTEM, Actor
from scheduler import site_loop
from tests import factories as f
from tests.faults.yard import Yard

pytestmark = pytest.mark.django_db


@pytest.fixture
def yard():
    made = Yard()
    made.turn(3)
    return made


def told(yard):
    return agents.desired(yard.agent, {"sequence": 0, "known_safety": -1}, now=yard.now)


def freeze_now(yard):
    freeze.freeze(SYSTEM, reason="a fault at the grid", now=yard.now)


# --- each kind of command
def test_jobs_get_no_watts_until_it_is_lifted(yard):
    waiting = yard.submit()
    yard.link = False
    yard.turn()
    assert yard.state(waiting) == "placed"
    freeze_now(yard)
    yard.link = True
    late = yard.submit(gpus=1)
    yard.turn(12)
    assert not Miner.objects.exclude(desired_mode=0).filter(shed_claims__state="commanded").exists()
    assert Miner.objects.filter(desired_mode=0).exists(), "machines still sleep for who waits: that lowers"
    assert not Placement.objects.filter(state__in=("granted", "starting", "running")).exists()
    assert yard.state(late) == "queued", "nothing is placed where nothing is granted"
    freeze.lift(SYSTEM, now=yard.now)
    yard.until(lambda: yard.state(waiting) == yard.state(late) == "running", seconds=240)


def test_no_machine_is_woken_by_the_loop_by_hand_or_for_a_test(yard):
    asleep = Miner.objects.order_by("pk").first()
    person = f.actor(yard.site.organization)
    sites.set_miner_manual(asleep, True, actor=person, now=yard.now, mode="sleep")
    yard.turn(5)
    freeze_now(yard)
    with pytest.raises(MarketError, match="frozen"):
        sites.set_miner_manual(asleep, True, actor=person, now=yard.now, mode=asleep.mode_names[-1])
    sites.set_miner_manual(asleep, False, actor=person, now=yard.now)
    asleep.refresh_from_db()
    with transaction.atomic():
        acquire((Lock.SITE, yard.site.pk))
        wake = power.Command(asleep.pk, 2, asleep.desired_generation)
        assert power.command_miners(yard.site.pk, [wake], now=yard.now) == 0
    yard.turn(16)
    asleep.refresh_from_db()
    assert asleep.desired_mode == 0
    Miner.objects.filter(pk=asleep.pk).update(state="unresponsive", confirmed_w=asleep.mode_watts[-1])
    yard.turn(16)
    asleep.refresh_from_db()
    assert asleep.desired_mode == 0, "nor to be tested"
    freeze.lift(SYSTEM, now=yard.now)
    yard.until(lambda: not Miner.objects.filter(desired_mode=0).exists(), seconds=400)


def test_gpus_held_lower_for_a_call_get_nothing_back(yard):
    job = yard.submit()
    yard.until(lambda: yard.state(job) == "running", seconds=120)
    host = Placement.objects.get(job=job).host
    call = curtailments.announce(
        f.actor(yard.site.organization), PowerNode.objects.get(kind="site"), cap_w=30_000, starts_at=yard.now, reference="c1",
        ends_at=yard.now + timedelta(minutes=20), mandatory=False, now=yard.now,
    )  # fmt: skip
    freeze_now(yard)
    with transaction.atomic():
        acquire((Lock.SITE, yard.site.pk))
        capped = power.cap_gpus(yard.site.pk, {host.pk: 400}, calls={host.pk: call.pk}, now=yard.now)
        assert capped == [host.pk], "lowering goes on"
    yard.turn(6)
    host.refresh_from_db()
    assert (host.call_gpu_w, host.reserved_w) == (400, host.base_w + 8 * 400)
    freeze.lift(SYSTEM, now=yard.now)
    yard.turn(2)
    host.refresh_from_db()
    assert (host.call_gpu_w, host.desired_limits_w) == (None, [host.gpu_max_w] * 8)


def test_a_call_that_comes_meanwhile_is_obeyed(yard):
    freeze_now(yard)
    curtailments.announce(
        f.actor(yard.site.organization), yard.site.power_nodes.get(parent=None), cap_w=20_000, starts_at=yard.now,
        ends_at=yard.now + timedelta(minutes=10), mandatory=True, reference="r2", now=yard.now,
    )  # fmt: skip
    yard.turn(12)
    assert yard.physics.meter_w[0] < 20_000


def test_work_that_runs_ends_and_gives_its_watts_back(yard):
    job = yard.submit()
    yard.until(lambda: yard.state(job) == "running", seconds=120)
    host = Placement.objects.get(job=job).host
    freeze_now(yard)
    yard.turn(6)
    assert yard.state(job) == "running"
    yard.end(job)
    yard.turn(6)
    host.refresh_from_db()
    assert host.reserved_w == host.parked_w


def test_the_site_is_told_to_hold_and_keeps_its_own_mode_beneath(yard):
    freeze_now(yard)
    before = Site.objects.get(pk=yard.site.pk).desired_generation
    assert told(yard)["mode"] == "hold"
    tasks.drain_outbox(freeze.TOLD)
    assert Site.objects.get(pk=yard.site.pk).desired_generation > before, "its agent is answered at once"
    sites.set_site_mode(yard.site, "shed", actor=f.actor(yard.site.organization), now=yard.now)
    assert told(yard)["mode"] == "shed"
    sites.set_site_mode(yard.site, "auto", actor=f.actor(yard.site.organization), now=yard.now)
    assert told(yard)["mode"] == "hold"
    freeze.lift(SYSTEM, now=yard.now)
    assert told(yard)["mode"] == "auto"


def test_no_benchmark_begins(yard):
    host = Host.objects.first()
    freeze_now(yard)
    with pytest.raises(MarketError, match="frozen"):
        verifications.begin(host, actor=f.actor(yard.site.organization), now=yard.now)


def test_the_installations_own_setting_is_a_floor(yard, settings):
    settings.POWER_FREEZE = True
    assert told(yard)["mode"] == "hold"
    assert not freeze.lift(SYSTEM, now=yard.now)
    job = yard.submit()
    yard.turn(8)
    assert yard.state(job) == "queued"


# --- who, and where it is seen
def button(client, **posted):
    return client.post(reverse("staff:power-freeze"), posted)


def test_one_click_of_who_may_is_audited_and_seen_where_sites_are(yard):
    boss = f.user(is_staff=True)
    boss.user_permissions.add(Permission.objects.get(codename="freeze_power"))
    client, operator = f.client(user=boss), f.client(yard.site.organization)
    page = client.get(reverse("staff:index")).content.decode()
    assert "Freeze all power" in page
    assert button(client, do="freeze", reason="flood at the substation").status_code == 302
    assert button(client, do="freeze", reason="again").status_code == 302
    row = PowerFreeze.objects.get()
    assert (row.reason, row.began_by) == ("flood at the substation", boss.email)
    event = AuditEvent.objects.get(verb="power.frozen")
    assert (event.actor, event.after) == (boss.email, {"reason": "flood at the substation"})
    for path in (
        reverse("operator:index"),
        reverse("operator:marketplace_site_changelist"),
        reverse("operator:marketplace_site_change", args=[yard.site.pk]),
    ):
        shown = operator.get(path).content.decode()
        assert "flood at the substation" in shown, path
        assert "Let sites go on" not in shown, path
    for path in (reverse("staff:index"), reverse("staff:marketplace_site_changelist")):
        assert "Let sites go on" in client.get(path).content.decode(), path
    api = f"/api/v1/sites/{yard.site.public_id}"
    assert operator.get(api).json()["frozen"] is operator.get(f"{api}/power").json()["frozen"] is True
    assert operator.get(api).json()["mode"] == "auto"
    assert button(client, do="lift").status_code == 302
    row.refresh_from_db()
    assert row.ended_by == boss.email
    assert AuditEvent.objects.filter(verb="power.freeze_lifted").count() == 1
    assert operator.get(api).json()["frozen"] is False
    assert "flood at the substation" in client.get(reverse("staff:marketplace_powerfreeze_changelist")).content.decode()


def test_nobody_else_may(yard):
    plain = f.client(user=f.user(is_staff=True))
    assert "Freeze all power" not in plain.get(reverse("staff:index")).content.decode()
    assert button(plain, do="freeze").status_code == 403
    assert button(f.client(yard.site.organization, "owner"), do="freeze").status_code == 404
    for actor in (f.actor(yard.site.organization), Actor(kind="agent", site_id=yard.site.pk)):
        with pytest.raises(MarketError, match="freeze_power"):
            freeze.freeze(actor, now=yard.now)
    freeze_now(yard)
    assert button(plain, do="lift").status_code == 403
    assert PowerFreeze.objects.get().ended_at is None
    assert site_loop.run(yard.site.pk, now=yard.now)["granted"] == 0


# --- who may is for a superuser to say, on the person's page
def page_of(name, person):
    return reverse(f"staff:marketplace_user_{name}", args=[person.pk])


def test_a_superuser_lets_a_colleague_freeze_and_takes_it_back(yard):
    boss, colleague = f.user(is_staff=True, is_superuser=True), f.user(is_staff=True)
    client, theirs = f.client(user=boss), f.client(user=colleague)
    assert button(theirs, do="freeze").status_code == 403
    assert "Let freeze power" in client.get(page_of("change", colleague)).content.decode()
    assert client.post(page_of("permit-freeze", colleague)).status_code == 302
    assert not freeze.permit(Actor(kind="staff", user_id=boss.pk), colleague, allowed=True, now=yard.now), (
        "it stands so already"
    )
    event = AuditEvent.objects.get(verb="power.freeze_permitted")
    assert (event.actor, event.subject, event.before, event.after) == (
        boss.email, colleague.email, {"may": False}, {"may": True},
    )  # fmt: skip
    assert button(theirs, do="freeze").status_code == 302
    assert "May freeze power" in client.get(reverse("staff:marketplace_user_changelist")).content.decode()
    assert client.post(page_of("withdraw-freeze", colleague)).status_code == 302
    assert AuditEvent.objects.filter(verb="power.freeze_withdrawn").count() == 1
    assert PowerFreeze.objects.get().ended_at is None, "what they froze stands"
    assert button(theirs, do="lift").status_code == 403


def test_nobody_else_says_who_may(yard):
    may, other = f.user(is_staff=True), f.user(is_staff=True)
    may.user_permissions.add(Permission.objects.get(codename="freeze_power"))
    client = f.client(user=may)
    assert "Let freeze power" not in client.get(page_of("change", other)).content.decode()
    assert client.post(page_of("permit-freeze", other)).status_code == 403
    assert f.client(yard.site.organization, "owner").post(page_of("permit-freeze", other)).status_code == 404
    with pytest.raises(MarketError, match="superuser to say"):
        freeze.permit(Actor(kind="staff", user_id=may.pk), may, allowed=False, now=yard.now)
    boss = f.user(is_staff=True, is_superuser=True)
    with pytest.raises(MarketError, match="none of our own people"):
        freeze.permit(Actor(kind="staff", user_id=boss.pk), f.user(), allowed=True, now=yard.now)
    with pytest.raises(MarketError, match="always may"):
        freeze.permit(Actor(kind="staff", user_id=boss.pk), boss, allowed=False, now=yard.now)
    assert not AuditEvent.objects.filter(verb__startswith="power.freeze_").exists()

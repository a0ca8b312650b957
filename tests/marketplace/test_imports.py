"""CSV import: dry run, all or nothing, and errors that name line, column, value and what to do."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.django import TestCase as HypothesisCase

from marketplace.models import AuditEvent, Host, Miner, OutboxMessage, PowerNode
from marketplace.services import imports, sites
from tests import factories
from tests.factories import NOW
from tests.marketplace.refusals import refused

pytestmark = pytest.mark.django_db

NODES = """name,parent,kind,cap_w,fixed_w,metering
pdu-b1,hall-b,pdu,400000,,firmware
hall-b,,building,500000,2000,meter
"""
HOSTS = """\
name,gpu_model,gpus,vram_mib,vcpu_milli,ram_mib,nvme_gib,power_node,leaf,nvlink_domains,parked_w,base_w,gpu_min_w,gpu_max_w,cap_control
h1,H100-SXM,4,81920,96000,1048576,14000,pdu-1,leaf-1,0 0 1 1,900,2600,200,700,yes
h2,H100-SXM,2,81920,96000,1048576,,pdu-2,,,900,2600,200,700,
"""
MINERS = """name,model,power_node,driver,address,modes
m1,S21,pdu-1,luxos,127.1.0.1:4028,sleep:25:0 eco:2400:155000 normal:3500:200000
m2,S21,pdu-2,,,sleep:25:0 normal:3500:200000
"""


@pytest.fixture
def site():
    return factories.site()


def load(site, kind, text, **options):
    report = imports.run(site, kind, text, now=NOW, actor=factories.actor(site.organization), **options)
    assert sites.recompute_reserved(site) == dict(site.power_nodes.values_list("pk", "reserved_mw"))
    return report


def test_a_tree_hosts_and_miners(site):
    assert load(site, "power_nodes", NODES).counts["created"] == 2
    assert load(site, "hosts", HOSTS).counts["created"] == 2
    report = load(site, "miners", MINERS)
    assert (report.rows, report.counts["created"], report.errors) == (2, 2, [])
    node = PowerNode.objects.get(name="pdu-b1")
    assert (node.parent.name, node.depth, node.margin_w, node.metering) == ("hall-b", 2, 32_000, "firmware")
    assert PowerNode.objects.get(name="hall-b").parent.name == "site"
    assert Host.objects.get(name="h1").nvlink_domains == [0, 0, 1, 1]
    second = Host.objects.get(name="h2")
    assert (second.nvlink_domains, second.cap_control, second.nvme_gib) == ([0, 0], True, 0)
    assert Miner.objects.get(name="m1").mode_ghs == [0, 155000, 200000]


@pytest.mark.parametrize(("kind", "text"), [("power_nodes", NODES), ("hosts", HOSTS), ("miners", MINERS)])
def test_a_dry_run_says_what_would_happen_and_leaves_nothing(site, kind, text):
    before = set(PowerNode.objects.values_list("name", "reserved_mw"))
    dry = load(site, kind, text, dry_run=True)
    assert dry.counts["created"] == 2
    assert set(PowerNode.objects.values_list("name", "reserved_mw")) == before
    assert not Host.objects.exists() and not Miner.objects.exists()  # noqa: PT018
    assert not AuditEvent.objects.exists() and not OutboxMessage.objects.exists()  # noqa: PT018
    assert load(site, kind, text).counts == dry.counts


@pytest.mark.parametrize(("kind", "text"), [("power_nodes", NODES), ("hosts", HOSTS), ("miners", MINERS)])
def test_the_same_file_again_changes_nothing(site, kind, text):
    load(site, kind, text)
    assert load(site, kind, text).counts == {"created": 0, "updated": 0, "unchanged": 2, "drained": 0}


def test_every_error_names_line_column_value_and_what_to_do(site):
    text = MINERS + "m3,S21,pdu-9,luxos,,sleep:25:0 normal:3500:200000\n\nm4,,pdu-1,luxos,,full\nm5,S21\n"
    report = load(site, "miners", text, dry_run=True)
    found = {(e.line, e.column): e for e in report.errors}
    assert set(found) == {(6, "model"), (6, "modes"), (7, "row")}
    assert found[6, "modes"].value == "full"
    assert "sleep:25:0" in found[6, "modes"].message
    report = load(site, "miners", MINERS + "m3,S21,pdu-9,luxos,,sleep:25:0 normal:3500:200000\n", dry_run=True)
    assert [(e.line, e.column, e.value) for e in report.errors] == [(4, "power_node", "pdu-9")]
    assert report.counts == {}


def test_one_bad_row_keeps_all_others_out(site):
    text = HOSTS.replace("h2,H100-SXM,2", "h2,H100-SXM,two")
    with refused("import_invalid") as caught:
        load(site, "hosts", text)
    assert caught.value.fields == {"/line/3/gpus": "'two' is not a whole number: write digits only, without a unit"}
    assert caught.value.extra["report"]["errors"][0]["line"] == 3
    assert not Host.objects.exists()


def test_what_the_nodes_cannot_carry_is_refused_also_in_a_dry_run():
    small = factories.site(power_w=5_000)
    for dry_run in (True, False):
        with refused("over_power_cap"):
            load(small, "miners", MINERS, dry_run=dry_run)
    assert not Miner.objects.exists()


@pytest.mark.parametrize(
    ("text", "column"),
    [
        ("", "file"),
        ("name,model,power_node,modes\n", "file"),
        ("name,model,power_node\nm,S21,pdu-1\n", "modes"),
        ("name,model,power_node,modes,colour\nm,S,pdu-1,sleep:1:0 a:2:1,red\n", "colour"),
        ("name,name,model,power_node,modes\n", "name"),
        ('name,model,power_node,modes\n"m,S21', "file"),
        ("name\x00,model", "file"),
        (MINERS + MINERS.splitlines()[1], "name"),
    ],
)
def test_files_that_are_no_such_file(site, text, column):
    report = load(site, "miners", text, dry_run=True)
    assert column in {e.column for e in report.errors}
    with refused("import_invalid"):
        load(site, "miners", text)


class TestTree:
    def errors(self, site, text):
        return [(e.line, e.column, e.value) for e in load(site, "power_nodes", text, dry_run=True).errors]

    def test_a_ring_an_orphan_the_root_and_a_twin(self, site):
        head = "name,parent,cap_w\n"
        assert self.errors(site, head + "a,b,1000\nb,a,1000\n") == [(2, "parent", "b"), (3, "parent", "a")]
        assert self.errors(site, head + "a,nowhere,1000\n") == [(2, "parent", "nowhere")]
        assert self.errors(site, head + "site,,1000\n") == [(2, "name", "site")]
        assert self.errors(site, head + "a,,1000\na,,2000\n") == [(2, "name", "a"), (3, "name", "a")]

    def test_a_node_that_exists_is_updated_and_never_moved(self, site):
        load(site, "power_nodes", NODES)
        report = load(site, "power_nodes", NODES.replace("400000", "300000"))
        assert (report.counts["updated"], report.counts["unchanged"]) == (1, 1)
        assert PowerNode.objects.get(name="pdu-b1").margin_w == 24_000
        assert self.errors(site, NODES.replace("hall-b,pdu", "tx-1,pdu")) == [(2, "parent", "tx-1")]

    def test_a_cap_under_what_is_booked_is_an_error_of_its_line(self, site):
        factories.host(site)
        text = "name,parent,cap_w,metering\npdu-1,tx-1,1000,meter\n"
        assert self.errors(site, text) == [(2, "cap_w", "1000")]

    def test_a_fixed_load_that_eats_the_cap(self, site):
        assert self.errors(site, "name,cap_w,fixed_w\na,1000,900\n") == [(2, "fixed_w", "900")]


def test_an_unknown_kind(site):
    with refused("invalid_request"):
        load(site, "racks", NODES)


def test_too_many_rows(site, monkeypatch):
    monkeypatch.setattr(imports, "MAX_ROWS", 1)
    report = load(site, "miners", MINERS, dry_run=True)
    assert [e.column for e in report.errors] == ["file"]
    assert "split it" in report.errors[0].message


class TestAnyText(HypothesisCase):
    @settings(max_examples=30)
    @given(st.sampled_from(imports.KINDS), st.text(max_size=200), st.booleans())
    def test_no_text_breaks_it(self, kind, text, with_heading):
        site = factories.site()
        heading = {"power_nodes": NODES, "hosts": HOSTS, "miners": MINERS}[kind].splitlines()[0] + "\n"
        assert load(site, kind, heading * with_heading + text, dry_run=True).kind == kind

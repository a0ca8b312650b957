"""Sites over the API: the tree, modes, imports, enrolment; what an operator does in an afternoon."""

import pytest

from marketplace.models import Agent, EnrolmentToken, Host, Miner, Site
from marketplace.services.tokens import digest
from tests import factories

pytestmark = pytest.mark.django_db
MINERS = "name,model,power_node,modes\nm1,S21,pdu-1,sleep:25:0 normal:3500:200000\n"


@pytest.fixture
def operator():
    return factories.organization(is_operator=True)


@pytest.fixture
def api(operator):
    return factories.client(operator, "engineer")


def code(response):
    return response.status_code, response.json()["code"]


def post(api, url, body=None, **options):
    return api.post(f"/api/v1/{url}", body, format="json", **options)


def test_an_afternoon_of_an_operator(api):
    site = post(
        api, "sites", {"name": "Pecos", "region": "us-tx", "contract_power_w": 1_000_000, "timezone": "America/Chicago"}
    ).json()
    assert site["power"] == {
        "cap_w": 1_000_000, "fixed_w": 0, "margin_w": 20_000, "reserved_w": 0, "headroom_w": 980_000, "measured_w": None,
    }  # fmt: skip
    url = f"sites/{site['id']}"
    node = post(api, f"{url}/power-nodes", {"name": "pdu-1", "cap_w": 200_000, "metering": "meter"}).json()
    assert (node["parent"], node["kind"], node["margin_w"], node["headroom_w"]) == ("site", "pdu", 4_000, 196_000)
    dry = post(api, f"{url}/import?dry_run=true", {"kind": "miners", "csv": MINERS}).json()
    assert (dry["dry_run"], dry["counts"]["created"], Miner.objects.count()) == (True, 1, 0)
    real = post(api, f"{url}/import", {"kind": "miners", "csv": MINERS}).json()
    assert (real["dry_run"], real["counts"]["created"], Miner.objects.count()) == (False, 1, 1)
    assert api.get(f"/api/v1/{url}").json()["power"]["reserved_w"] == 3500 * 1050 // 1000
    assert post(api, f"{url}/mode", {"mode": "shed"}).json()["actions"] == ["auto", "hold", "off"]
    changed = api.patch(f"/api/v1/power-nodes/{node['id']}", {"cap_w": 3_600}, format="json").json()
    assert (changed["cap_w"], changed["reserved_w"]) == (3_600, 3_500)
    assert [n["name"] for n in api.get(f"/api/v1/{url}/power-nodes").json()["data"]] == ["site", "pdu-1"]
    renamed = api.patch(f"/api/v1/{url}", {"name": "Pecos II", "carbon_g_per_kwh": 12}, format="json").json()
    assert (renamed["name"], renamed["carbon_g_per_kwh"]) == ("Pecos II", 12)


def test_an_import_that_fails_says_where(api, operator):
    site = factories.site(operator)
    url = f"sites/{site.public_id}/import"
    response = post(api, url, {"kind": "miners", "csv": MINERS.replace("pdu-1", "pdu-9")})
    assert code(response) == (422, "import_invalid")
    body = response.json()
    assert [e["pointer"] for e in body["errors"]] == ["/line/2/power_node"]
    assert body["report"]["errors"][0] == {
        "line": 2, "column": "power_node", "value": "pdu-9", "message": f"there is no node pdu-9 at {site.name}: import it first",
    }  # fmt: skip
    dry = post(api, f"{url}?dry_run=true", {"kind": "miners", "csv": "x"})
    assert (dry.status_code, dry.json()["error_count"] > 0) == (200, True)
    assert code(post(api, f"{url}?dry_run=maybe", {"kind": "miners", "csv": MINERS})) == (400, "invalid_request")
    assert code(post(api, url, {"kind": "racks", "csv": MINERS})) == (400, "invalid_request")


def test_over_the_cap_is_refused_with_the_missing_watts(api, operator):
    site = factories.site(operator, power_w=3_000)
    response = post(api, f"sites/{site.public_id}/import", {"kind": "miners", "csv": MINERS})
    assert code(response) == (409, "over_power_cap")
    assert response.json()["missing_w"] > 0
    assert response.json()["node"].startswith("nod_")


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"contract_power_w": 0}, "/contract_power_w"),
        ({"timezone": "Mars/Olympus"}, "/timezone"),
        ({"region": "US TX"}, "/region"),
        ({"pue_permille": 900}, "/pue_permille"),
        ({"fixed_w": 999_999}, "/fixed_w"),
        ({"cell": "us"}, "/cell"),
    ],
)
def test_wrong_sites(api, body, pointer):
    response = post(api, "sites", {"name": "x", "region": "us-tx", "contract_power_w": 10**6, **body})
    assert response.status_code == 400
    assert [e["pointer"] for e in response.json()["errors"]] == [pointer]
    assert not Site.objects.exists()


def test_a_customer_has_no_sites():
    api = factories.client(factories.organization())
    make = {"name": "x", "region": "us-tx", "contract_power_w": 10**6}
    assert code(post(api, "sites", make)) == (403, "forbidden")


def test_a_node_needs_a_parent_of_its_own_site(api, operator):
    site, other = factories.site(operator), factories.site(operator)
    factories.node(other, "elsewhere", parent=other.power_nodes.get(name="tx-1"), cap_w=1000)
    url = f"sites/{site.public_id}/power-nodes"
    assert code(post(api, url, {"name": "a", "cap_w": 1000, "parent": "elsewhere"})) == (400, "invalid_request")
    assert post(api, url, {"name": "a", "cap_w": 1000, "parent": "pdu-1"}).json()["depth"] == 3


def test_enrolment_tokens_and_agents(api, operator):
    site = factories.site(operator)
    made = post(api, f"sites/{site.public_id}/enrolment-tokens", HTTP_IDEMPOTENCY_KEY="k")
    body = made.json()
    assert EnrolmentToken.objects.get().digest == digest(body["token"])
    again = post(api, f"sites/{site.public_id}/enrolment-tokens", HTTP_IDEMPOTENCY_KEY="k").json()
    assert again["token"] is None
    hello = {"token": body["token"], "name": "hall-1", "version": "0.1.0", "runtime": "process"}
    enrolled = post(factories.client(), "agent/enrol", hello)
    assert enrolled.status_code == 201
    assert code(post(factories.client(), "agent/enrol", hello)) == (401, "enrolment_token_invalid")
    listed = api.get(f"/api/v1/sites/{site.public_id}/agents").json()["data"]
    assert [a["id"] for a in listed] == [enrolled.json()["agent"]]
    assert api.delete(f"/api/v1/agents/{listed[0]['id']}").status_code == 204
    assert Agent.objects.get().revoked_at is not None


def test_a_retry_of_a_create_is_one_site(api):
    body = {"name": "Pecos", "region": "us-tx", "contract_power_w": 10**6}
    one = post(api, "sites", body, HTTP_IDEMPOTENCY_KEY="a")
    two = post(api, "sites", body, HTTP_IDEMPOTENCY_KEY="a")
    assert one.json()["id"] == two.json()["id"]
    assert code(post(api, "sites", body)) == (400, "invalid_request")  # the name is taken
    assert Site.objects.count() == 1


def test_lists_cost_the_same_whatever_their_length(api, operator, django_assert_max_num_queries):
    for _ in range(5):
        site = factories.site(operator)
        factories.host(site)
        factories.miner(site)
    for url in ("sites", "hosts", "miners", f"sites/{site.public_id}/power-nodes"):
        with django_assert_max_num_queries(6):
            assert api.get(f"/api/v1/{url}").status_code == 200
    assert Host.objects.count() == 5

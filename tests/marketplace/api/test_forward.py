"""The forward market over HTTP and on the pages: what is offered, bid and sold, and to whom it is shown."""

from datetime import UTC, datetime, timedelta

import pytest

from marketplace.models import Fill, Quote, Resale, StandingBid
from marketplace.services import contracts, quotes
from marketplace.services.forward import bids
from tests import factories as f

pytestmark = pytest.mark.django_db
DAY = timedelta(days=1)
NOW = datetime.now(UTC).replace(second=0, microsecond=0)
START, END = NOW + 2 * DAY, NOW + 12 * DAY
FROM, TO = START + 2 * DAY, START + 4 * DAY
ASK = 1_500_000


@pytest.fixture
def market():
    site = f.site()
    return f.listing(site, hosts=[f.host(site)])


@pytest.fixture
def seller(market):
    return f.organization("Aurora Models")


@pytest.fixture
def contract(market, seller):
    actor = f.actor(seller)
    wanted = quotes.Request("reserved", 8, starts_at=START, ends_at=END)
    now = datetime.now(UTC)
    return contracts.accept(actor, quotes.quote(actor, market.pk, wanted, now=now).pk, now=now)


def offered(contract, **fields):
    return {
        "contract": contract.public_id,
        "gpu_count": 4,
        "starts_at": FROM.isoformat(),
        "ends_at": TO.isoformat(),
        "price": ASK,
        **fields,
    }


def post(api, path, body=None, key=""):
    headers = {"HTTP_IDEMPOTENCY_KEY": key} if key else {}
    return api.post(f"/api/v1/{path}", body or {}, format="json", **headers)


def test_a_partner_sells_on_and_another_buys(contract, seller, market):
    api, other = f.client(seller), f.client(f.organization("Borealis"))
    query = {k: v for k, v in offered(contract).items() if k != "contract"}
    told = api.get(f"/api/v1/contracts/{contract.public_id}/resale-terms", query).json()
    assert (told["gpus"], told["fee_permille"], told["credited"]["amount_minor"]) == (8, 50, 4 * 48 * 150 * 95 // 100)
    made = post(api, "resales", offered(contract), "sell-1")
    assert made.status_code == 201, made.json()
    assert post(api, "resales", offered(contract), "sell-1").json() == made.json()
    row = made.json()
    assert (row["left_gpus"], row["actions"], row["price"]["per_gpu_hour"]) == (4, ["withdraw"], ASK)
    (shown,) = other.get("/api/v1/listings?resale=true&kind=reserved").json()["data"]
    assert shown["resale"] == {"id": row["id"], "starts_at": row["starts_at"], "ends_at": row["ends_at"]}
    assert [r["resale"] for r in other.get("/api/v1/listings?resale=false").json()["data"]] == [None]
    quote = post(other, "quotes", {"listing": row["listing"], "kind": "reserved", "gpu_count": 2}).json()
    assert quote["items"]["to_the_seller"]["amount_minor"] == 2 * 48 * 150 * 95 // 100
    signed = post(other, "contracts", quote["accept"]["body"]).json()
    assert (signed["state"], signed["starts_at"], signed["gpu_count"]) == ("pending_payment", row["starts_at"], 2)
    assert other.get(f"/api/v1/resales/{row['id']}").status_code == 404
    again = api.get("/api/v1/resales?state=open").json()["data"]
    assert [r["left_gpus"] for r in again] == [2]
    (fill,) = f.client(None).get("/api/v1/fills").json()["data"]
    assert (fill["gpu_count"], fill["price"]["per_gpu_hour"], fill["resale"]) == (2, ASK, True)
    assert not {"contract", "organization", "buyer", "seller"} & fill.keys()
    gone = post(api, f"resales/{row['id']}/withdraw").json()
    assert (gone["state"], gone["left_gpus"], gone["sold_gpus"]) == ("withdrawn", 0, 2)
    assert post(api, f"resales/{row['id']}/withdraw").json()["code"] == "illegal_transition"
    operator = f.client(market.organization)
    assert [r["seller"]["name"] for r in operator.get("/api/v1/resales").json()["data"]] == ["Aurora Models"]


def test_what_cannot_be_sold_on_is_refused_by_field(contract, seller):
    api = f.client(seller)
    answer = post(api, "resales", offered(contract, gpu_count=9))
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_request")
    assert "/gpu_count" in str(answer.json())
    stranger = f.client(f.organization())
    assert post(stranger, "resales", offered(contract)).status_code == 404
    assert post(api, "resales", offered(contract, colour="red")).json()["code"] == "unknown_field"


def wanted(market, **fields):
    return {
        "gpu_model": market.gpu_model.name, "region": market.site.region, "gpu_count": 4, "earliest": FROM.isoformat(),
        "duration_s": 2 * 86_400, "limit_price": 2_000_000, "expires_at": FROM.isoformat(), **fields,
    }  # fmt: skip


def test_a_bid_is_placed_met_and_cancelled(contract, seller, market):
    buyer = f.organization("Borealis")
    api = f.client(buyer)
    made = post(api, "bids", wanted(market, reference="po-1"), "bid-1")
    assert made.status_code == 201, made.json()
    row = made.json()
    assert (row["state"], row["min_gpus"], row["latest"], row["consent"]) == ("open", 4, row["earliest"], None)
    post(f.client(seller), "resales", offered(contract))
    bids.run(True, market.gpu_model_id, market.site.region, now=datetime.now(UTC))
    (quote,) = api.get(f"/api/v1/quotes?bid={row['id']}").json()["data"]
    assert (quote["bid"], quote["holds_capacity"], quote["reference"]) == (row["id"], True, "po-1")
    assert f.client(seller).get(f"/api/v1/bids/{row['id']}").status_code == 404
    assert post(api, f"bids/{row['id']}/cancel").json()["state"] == "cancelled"
    assert [b["id"] for b in api.get("/api/v1/bids?state=cancelled&reference=po-1").json()["data"]] == [row["id"]]


def test_signing_by_itself_needs_who_may_sign(market):
    buyer = f.organization()
    engineer = f.client(buyer, role="engineer")
    assert post(engineer, "bids", wanted(market, auto_accept=True)).json()["code"] == "forbidden"
    assert post(engineer, "bids", wanted(market)).status_code == 201
    assert (
        post(f.client(buyer), "bids", wanted(market, auto_accept=True)).json()["consent"]["words"].startswith("I agree")
    )
    assert post(engineer, "bids", wanted(market, kind="on_demand")).status_code == 400


def test_the_book_is_everybodys_and_names_nobody(contract, seller, market):
    post(f.client(seller), "resales", offered(contract))
    post(f.client(f.organization()), "bids", wanted(market, gpu_count=3))
    found = (
        f.client(None).get("/api/v1/book", {"gpu_model": market.gpu_model.name, "region": market.site.region}).json()
    )
    months = [m for m in found["months"] if m["bids"] or m["offers"]]
    assert {(v["price"]["per_gpu_hour"], v["gpus"], v["count"]) for m in months for v in m["bids"]} == {
        (2_000_000, 3, 1)
    }
    assert (ASK, 4, 1) in {(v["price"]["per_gpu_hour"], v["gpus"], v["count"]) for m in months for v in m["offers"]}
    assert "org_" not in str(found)
    assert f.client(None).get("/api/v1/book", {"gpu_model": "none", "region": "x"}).status_code == 404
    assert f.client(None).get("/api/v1/book").status_code == 400


# --- the pages
def text(answer):
    assert answer.status_code == 200, answer.status_code
    return answer.content.decode()


@pytest.fixture
def browse():
    from django.test import Client

    def make(organization=None):
        client = Client()
        if organization is not None:
            client.force_login(f.member(organization).user)
        return client

    return make


def local(at):
    return f"{at:%Y-%m-%dT%H:%M}"


def test_part_of_a_contract_is_sold_on_from_its_page(contract, seller, browse):
    client = browse(seller)
    assert "Sell part of it on" in text(client.get(f"/contracts/{contract.public_id}"))
    here = f"/contracts/{contract.public_id}/resell"
    assert "The rule" in text(client.get(here))
    asked = {"gpu_count": 4, "price": "1.5", "starts_at": local(FROM), "ends_at": local(TO)}
    page = text(client.get(here, asked))
    assert "$273.60" in page  # 4 x 48 h x 1.50, less 5 %
    assert Resale.objects.count() == 0
    refused = client.get(here, {**asked, "gpu_count": 9})
    assert refused.status_code == 400
    assert "at most 8" in refused.content.decode()
    answer = client.post(here, asked)
    page = text(client.get(answer["Location"]))
    assert "Withdraw the offer" in page
    assert "4 × " in text(client.get("/resales"))
    assert "Sold on" in text(client.get(f"/contracts/{contract.public_id}"))
    row = Resale.objects.get()
    market = text(browse().get("/"))
    assert "resale, " in market
    assert "taken as a whole" in text(browse().get(f"/listings/{row.listing.public_id}"))
    buyer = f.organization()
    page = text(browse(buyer).get(f"/listings/{row.listing.public_id}/quote"))
    assert "sell it on" in page
    made = browse(buyer).post(
        f"/listings/{row.listing.public_id}/quote", {"kind": "reserved", "gpu_count": 4, "level": "site"}
    )
    assert "to the customer who sells it on" in text(browse(buyer).get(made["Location"]))
    page = text(client.post(f"/resales/{row.public_id}/withdraw", follow=True))
    assert "What was unsold is yours again" in page


def test_a_bid_is_left_and_cancelled_on_its_pages(market, browse):
    buyer = f.organization()
    client = browse(buyer)
    assert "No bid yet" in text(client.get("/bids"))
    assert "Sign for us at once" in text(client.get(f"/bids/new?gpu_model={market.gpu_model.name}"))
    asked = {
        "gpu_model": market.gpu_model.name, "region": market.site.region, "kind": "reserved", "gpu_count": 4, "level": "site",
        "earliest": local(FROM), "hours": 48, "limit_price": "2", "expires_at": local(FROM), "auto_accept": "on",
    }  # fmt: skip
    assert client.post("/bids/new", {**asked, "hours": ""}).status_code == 400
    wrong = client.post("/bids/new", {**asked, "expires_at": local(TO)})
    assert wrong.status_code == 400
    assert "not after the latest start" in wrong.content.decode()
    page = text(client.post("/bids/new", asked, follow=True))
    assert "all or nothing" in page
    row = StandingBid.objects.get()
    assert row.auto_accept
    assert "agreed by" in page
    bids.run(True, market.gpu_model_id, market.site.region, now=datetime.now(UTC))
    assert Quote.objects.get(bid=row).state == "accepted"
    assert "signed" in text(client.get(f"/bids/{row.public_id}"))
    assert Fill.objects.get().bid == row
    other = text(client.post("/bids/new", {**asked, "auto_accept": "", "limit_price": "0.5"}, follow=True))
    assert "It stands in line" in other
    last = StandingBid.objects.latest("pk")
    assert "Cancelled" in text(client.post(f"/bids/{last.public_id}/cancel", follow=True))
    assert last.public_id in text(client.get("/bids"))


def test_the_book_is_a_page_for_everybody(contract, seller, market, browse):
    assert "The book" in text(browse().get("/book"))
    post(f.client(seller), "resales", offered(contract))
    post(f.client(f.organization()), "bids", wanted(market, gpu_count=3))
    page = text(browse().get("/book", {"of": f"{market.gpu_model.name}@{market.site.region}"}))
    for words in (f"{NOW:%B %Y}", "$1.50", "$2.00", "Nothing has been sold on"):
        assert words in page
    assert "Leave a bid" not in page
    assert "Leave a bid" in text(browse(f.organization()).get("/book"))

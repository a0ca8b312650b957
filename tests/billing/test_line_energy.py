"""The energy of the work behind an invoice's lines: told once, split by the seconds where lines share an hour."""

from datetime import timedelta

import pytest

from billing import line_energy
from billing.core.energy import MJ_PER_MILLIWH
from marketplace.models import DeviceHour
from tests import factories
from tests.billing.conftest import World, make_world
from tests.factories import NOW

pytestmark = pytest.mark.django_db
HOUR = 3600
WH = MJ_PER_MILLIWH * 1000


def drew(world: World, hour: int, **wh: int) -> None:
    """In the `hour`-th whole hour from NOW on, by placement."""
    start = NOW.replace(minute=0, second=0, microsecond=0) + timedelta(hours=hour)
    ids = [int(name[1:]) for name in wh]
    DeviceHour.objects.create(
        site=world.host.site,
        start=start,
        of="placement",
        ids=ids,
        mj=[n * WH for n in wh.values()],
        ms=[3_600_000] * len(ids),
    )


def energies(world: World, invoice) -> list[tuple[str, int | None]]:
    rows = list(invoice.lines.order_by("position"))
    found = line_energy.of_lines(rows)
    return [(row.kind, found.get(row.pk)) for row in rows]


def test_a_line_has_the_energy_of_its_work_and_nothing_is_told_twice(world: World):
    placement = world.ran(0, 2 * HOUR, gpus=8)
    drew(world, 0, **{f"p{placement.pk}": 9000})
    drew(world, 1, **{f"p{placement.pk}": 7000})
    first, second = world.close(HOUR // 2), world.close(3 * HOUR)
    found = [*energies(world, first), *energies(world, second)]
    assert found == [("usage", 4500), ("usage", 4500 + 7000)], "an hour of two invoices is theirs by the seconds of use"


def test_what_nobody_accounted_for_has_none_and_the_amount_is_the_same(world: World):
    placement = world.ran(0, HOUR)
    invoice = world.close(2 * HOUR)
    assert energies(world, invoice) == [("usage", None)]
    api = factories.client(world.customer)
    (line,) = api.get(f"/api/v1/invoices/{invoice.public_id}").json()["lines"]
    assert line["energy_wh"] is None
    before = line["amount"]
    drew(world, 0, **{f"p{placement.pk}": 1200})
    (line,) = api.get(f"/api/v1/invoices/{invoice.public_id}").json()["lines"]
    assert (line["energy_wh"], line["amount"]) == (1200, before)
    page = api.get(f"/invoices/{invoice.public_id}").content.decode()
    assert "1.2 kWh" in page


def test_a_commitment_has_it_whole_on_its_first_line_and_strangers_energy_is_theirs(db):
    world = make_world(kind="reserved", gpu_count=8, starts_at=NOW, ends_at=NOW + timedelta(days=2))
    mine = world.ran(0, HOUR, gpus=4)
    other = factories.contract(world.listing, factories.organization("Somebody else"))
    theirs = world.ran(0, HOUR, gpus=4, contract=other)
    drew(world, 0, **{f"p{mine.pk}": 4000, f"p{theirs.pk}": 5000})
    invoice = world.close(2 * HOUR)
    assert energies(world, invoice) == [("commitment", 4000)]

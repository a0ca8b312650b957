"""What the market's auditor says that a contract owes: its own arithmetic, by hand."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from sandbox.market import held
from sandbox.market.held import Owes

pytestmark = pytest.mark.serverless
AT, HOUR = datetime(2030, 1, 10, tzinfo=UTC), timedelta(hours=1)
GPU_HOUR = 3_600_000  # milli-GPU-seconds
PRICE, LATER = 2_000_000, 2_500_000


def contract(**changes):
    terms = json.dumps({"maintenance": {"hours_per_month": 4}})
    return {
        "id": 1, "kind": "reserved", "state": "active", "gpu_count": 8, "starts_at": AT, "ends_at": AT + 48 * HOUR, "ended_at": None,
        "emergency_notice_s": None, "price": PRICE,
        "billed_through": AT + 24 * HOUR, "terms": terms, **changes,
    }  # fmt: skip


def span(start, hours, **more):
    return {"starts_at": AT + start * HOUR, "ends_at": AT + (start + hours) * HOUR, **more}


def test_a_window_is_due_up_to_the_edge():
    assert Owes(contract(), [], [], []).committed() == {PRICE: 8 * 24 * GPU_HOUR}
    joined = [{"added_gpus": 2, "effective_at": AT + 20 * HOUR, "price": LATER}]
    due = {PRICE: 8 * 24 * GPU_HOUR, LATER: 2 * 4 * GPU_HOUR}
    assert Owes(contract(gpu_count=10), joined, [], []).committed() == due


def test_what_was_sold_on_stays_due_after_an_early_end_and_not_after_a_default():
    sold = [span(10, 30, gpu_count=4)]
    left = {"ends_at": AT + 20 * HOUR, "billed_through": AT + 48 * HOUR}
    assert Owes(contract(**left), [], sold, []).committed() == {PRICE: (8 * 20 + 4 * 20) * GPU_HOUR}
    assert Owes(contract(**left, state="defaulted"), [], sold, []).committed() == {PRICE: 8 * 20 * GPU_HOUR}


def test_maintenance_is_borne_for_the_hours_of_the_month_and_free_beyond_or_without_notice():
    told = span(1, 6, gpus=8, noticed_until=AT + 7 * HOUR)
    assert Owes(contract(), [], [], [told]).missed() == 8 * 2 * GPU_HOUR
    late = told | {"noticed_until": AT + 4 * HOUR}  # the last three hours came too late
    assert Owes(contract(), [], [], [late]).missed() == 8 * 3 * GPU_HOUR
    emergency = told | {"noticed_until": None}
    assert Owes(contract(), [], [], [emergency]).missed() == 8 * 6 * GPU_HOUR
    ahead = span(22, 6, gpus=8, noticed_until=None)
    assert Owes(contract(), [], [], [ahead]).missed() == 8 * 2 * GPU_HOUR  # the rest is not billed yet


def test_two_works_at_once_use_up_the_month_once(monkeypatch):
    rows = [span(1, 4, gpus=2, noticed_until=AT + 5 * HOUR), span(3, 4, gpus=3, noticed_until=AT + 7 * HOUR)]
    assert Owes(contract(), [], [], rows).missed() == 3 * 2 * GPU_HOUR
    used = [
        {
            "start_s": int(AT.timestamp()),
            "end_s": int((AT + HOUR).timestamp()),
            "rate": 200_000,
            "quantity": 200_000 * 3600,
        }
    ]
    monkeypatch.setattr(held, "rows", lambda _: used)
    assert Owes(contract(), [], [], []).beyond() == 0  # drawn down first
    sold = [span(0, 47, gpu_count=8)]
    assert Owes(contract(), [], sold, []).beyond() == 200_000 * 3600 - 8 * GPU_HOUR

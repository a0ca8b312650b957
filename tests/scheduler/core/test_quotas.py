import pytest

from scheduler.core.plan import plan
from scheduler.core.types import Reason, Request
from tests.scheduler.core.test_plan import box

pytestmark = pytest.mark.serverless


def placed(requests, hosts=2):
    return {d.job for d in plan(box(hosts), requests).decisions if d.placed}


def test_an_organizations_limit_holds_over_all_its_contracts():
    jobs = [
        Request(job=i, org=1 + i // 3, gpus=2, queued_at=i, quota_id=i + 1, quota_milli=8000, limit_milli=4000)
        for i in range(6)
    ]
    assert placed(jobs) == {0, 1, 3, 4}


def test_each_limit_binds_where_it_is_the_smaller():
    jobs = [
        Request(job=1, org=1, gpus=4, quota_id=1, quota_milli=2000, limit_milli=9000),
        Request(job=2, org=1, gpus=4, quota_id=2, quota_milli=4000, limit_milli=9000),
        Request(job=3, org=2, gpus=4, quota_id=3, quota_milli=9000, limit_milli=3000),
    ]
    assert placed(jobs) == {2}


def test_what_a_limit_refuses_is_named_and_costs_nobody_else():
    jobs = [Request(job=1, org=1, gpus=8, limit_milli=4000), Request(job=2, org=1, gpus=4, limit_milli=4000)]
    decisions = {d.job: d for d in plan(box(), jobs).decisions}
    assert decisions[1].reason == decisions[1].binding == Reason.ORGANIZATION_LIMIT
    assert decisions[2].placed

"""Columns in, the same columns out; beside a base only what differs costs bytes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from scheduler.core.types import Kind, Level, Policy, Request, Running, Tie, Topology
from scheduler.packed import UnreadableError, align, pack, taken, unpack
from scheduler.tables import from_table, plain, restored, to_table

pytestmark = pytest.mark.serverless
columns = st.sampled_from(["<i2", "<i4", "<i8", "i1", "<f8", "?"]).flatmap(
    lambda d: hnp.arrays(
        d, st.sampled_from([(0,), (5,), (40,), (6, 16)]), elements={"allow_nan": False} if d == "<f8" else None
    )
)


def same(one, two):
    return one.dtype == two.dtype and one.shape == two.shape and (one == two).all()


@given(columns, st.data())
def test_what_is_packed_comes_back_with_and_without_a_base(column, data):
    assert same(unpack(pack({"a": column}, {"n": [1, "x"]}))[0]["a"], column)
    old = column.copy()
    for at in data.draw(st.lists(st.integers(0, max(0, column.size - 1)), max_size=6)) if column.size else []:
        old.reshape(-1)[at] = 0
    body = pack({"a": column}, None, {"a": old})
    assert same(unpack(body, {"a": old})[0]["a"], column)


def test_extremes_survive():
    wide = np.array([-(2**63), 2**63 - 1, 0, 5], np.int64)
    for old in (np.zeros(4, np.int64), np.array([2**63 - 1, -(2**63), 1, 5]), wide, np.zeros(3, np.int64)):
        assert same(unpack(pack({"a": wide}, None, {"a": old}), {"a": old})[0]["a"], wide)


def test_a_base_makes_it_small_and_is_asked_for():
    dice = np.random.default_rng(1)
    column = dice.integers(0, 10**9, 10_000)
    changed = column.copy()
    changed[77] += 1
    assert len(pack({"a": changed}, None, {"a": column})) < 300 < len(pack({"a": changed}, None))
    with pytest.raises(UnreadableError, match="another record"):
        unpack(pack({"a": changed}, None, {"a": column}))
    with pytest.raises(UnreadableError):
        unpack(pack({"a": changed}, None, {"a": column}), {"a": column[:5]})


@pytest.mark.parametrize("body", [b"", b"PK\x03\x04", b"TRC1nonsense"])
def test_other_bytes_are_refused(body):
    with pytest.raises(UnreadableError):
        unpack(body)


def test_rows_are_found_again_by_their_key():
    places = align(np.array([7, 3, 9]), np.array([3, 4, 7]))
    assert places.tolist() == [2, 0, -1]
    assert taken({"a": np.array([30, 40, 70])}, places)["a"].tolist() == [70, 30, 0]
    assert align(np.array([1]), np.array([], np.int64)).tolist() == [-1]
    assert taken({"a": np.array([], np.int64)}, np.array([-1]))["a"].tolist() == [0]


def test_rows_of_the_core_come_back_as_they_were():
    requests = [
        Request(
            job=1,
            kind=Kind.SPOT,
            models=(1 << 62) + 5,
            topology=Topology(Level.LEAF, required=True),
            usage=0.25,
            price_ok=False,
        ),
        Request(job=2, near=(Tie(Level.HOST, 4, (1, 2)),), joins=(3,), members=(5, 6), until=1 << 62),
    ]
    running = [Running(placement=1, job=2, org=3, kind=Kind.FIRM, host=4, gpus=(1, 15), preemptible=False)]
    for kind, rows in ((Request, requests), (Running, running), (Request, [])):
        found = from_table(kind, *to_table(kind, rows))
        assert found == rows
        assert [type(r.kind) for r in found] == [Kind] * len(rows)
    assert found == []
    policy = Policy(shapes=((1, 2, 3, 4, 5, 6),), usage_scale=2.5)
    assert restored(plain(policy)) == policy


def test_a_field_that_one_side_does_not_know_takes_its_default_or_is_left_out():
    table, values = to_table(Request, [Request(job=5, replicas=3, duration_s=60)])
    del table["duration_s"]
    assert from_table(Request, {**table, "forgotten": np.zeros(1)}, values) == [Request(job=5, replicas=3)]
    del table["job"]
    with pytest.raises(TypeError, match=r"Request\.job"):
        from_table(Request, table, values)
    assert restored({"$": "Topology", "f": {"pack": {"$": "Level", "v": 3}, "gone": 1}}) == Topology(Level.LEAF)
    with pytest.raises(TypeError, match="object"):
        plain(object())

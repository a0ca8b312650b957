"""Every lock of the house, in the one order in which they may be taken.

Advisory, transaction-scoped, sorted: two callers that want the same set can never wait for each other in a ring. Row locks
(`select_for_update`) are taken only beneath them.
"""

from enum import IntEnum

from django.db import OperationalError, connection
from psycopg.errors import DeadlockDetected, LockNotAvailable

from marketplace import prepared
from marketplace.errors import MarketError


class Lock(IntEnum):
    CELL = 1
    ORG = 2
    SITE = 3
    NODE = 4
    HOST = 5
    WALLET = 6
    COUNTER = 7
    PROFIT = 8  # a site's P&L and receipts


# One statement for all: they are taken one after another as they stand in the array, each with the whole patience.
_ACQUIRE = (
    "WITH patience AS MATERIALIZED (SELECT set_config('lock_timeout', %s, true))"
    " SELECT pg_advisory_xact_lock(number) FROM patience, unnest(%s::bigint[]) AS number"
)


def _number(kind: Lock, pk: int) -> int:
    """One signed bigint: the kind in the top byte, the id below."""
    return (int(kind) << 56) | (pk & ((1 << 56) - 1))


def acquire(*wanted: tuple[Lock, int], timeout_ms: int = 3000) -> None:
    """Take all locks in order, or raise MarketError("busy") after `timeout_ms` for any of them.

    Must run inside a transaction; the locks go with it.
    """
    assert connection.in_atomic_block, "locks live as long as a transaction: open one first"
    numbers = sorted({_number(kind, pk) for kind, pk in wanted})
    try:
        prepared.rows(_ACQUIRE, [f"{timeout_ms}ms", numbers])
    except OperationalError as error:
        if not isinstance(error.__cause__, LockNotAvailable | DeadlockDetected):
            raise  # the server is gone: that is not somebody else at work
        names = ", ".join(f"{kind.name.lower()} {pk}" for kind, pk in sorted(wanted))
        raise MarketError("busy", f"Waited {timeout_ms} ms for {names}.") from error

"""The power ledger: who may draw how much. The only writer of grants, claims and reserved watts.

Every function runs in the caller's transaction under the site's lock (Lock.SITE); arithmetic is scheduler.core.power.
The order is always: books and recheck.book (placement `granted` or `shedding`) -> command_miners (sleep) -> confirm_sheds (readings) ->
grant_pending (host's watts booked, its limits raised) -> start; and back: release -> lower_hosts (read back) -> wake.
"""

from marketplace.services.power.freeze import FREEZE_STANDS, frozen
from marketplace.services.power.grants import (
    book_nodes,
    books,
    cap_gpus,
    grant_pending,
    limits,
    lower_hosts,
    release,
    uncap_gpus,
)
from marketplace.services.power.held import settle as settle_held
from marketplace.services.power.held import tell as tell_held
from marketplace.services.power.ledger import FRESH, Ledger, active_watts, may_grant, may_wake
from marketplace.services.power.miners import Command, command_miners, forget, settle_miners
from marketplace.services.power.recovery import tests_due

__all__ = [
    "FREEZE_STANDS",
    "FRESH",
    "Command",
    "Ledger",
    "active_watts",
    "book_nodes",
    "books",
    "cap_gpus",
    "command_miners",
    "forget",
    "frozen",
    "grant_pending",
    "limits",
    "lower_hosts",
    "may_grant",
    "may_wake",
    "release",
    "settle_held",
    "settle_miners",
    "tell_held",
    "tests_due",
    "uncap_gpus",
]

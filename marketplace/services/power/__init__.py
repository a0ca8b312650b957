"""The power ledger: who may draw how much. The only writer of grants, claims and reserved watts.

Every function runs in the caller's transaction under the site's lock (Lock.SITE); arithmetic is scheduler.core.power.
The order is always: reserve (placement `intended` or `shedding`) -> command_miners (sleep) -> confirm_sheds (readings) ->
grant_pending (host's watts booked, its limits raised) -> start; and back: release -> lower_hosts (read back) -> wake.
"""

from marketplace.services.power.grants import grant_pending, lower_hosts, release, reserve
from marketplace.services.power.ledger import FRESH_S, Ledger, active_watts
from marketplace.services.power.miners import Command, command_miners, settle_miners

__all__ = [
    "FRESH_S",
    "Command",
    "Ledger",
    "active_watts",
    "command_miners",
    "grant_pending",
    "lower_hosts",
    "release",
    "reserve",
    "settle_miners",
]

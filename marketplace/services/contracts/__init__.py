"""Contracts, by subject. Together these modules are the only writers of Contract, Amendment and their papers.

signing     a quote is accepted; what is due at signing is waited for
ending      terminated early by its rule, over with its window, defaulted, settled when nothing runs any more
clock       what happens because time passes
notices     what customers are told
"""

from marketplace.services.contracts.clock import Ticked, clock
from marketplace.services.contracts.ending import (
    CANCELLED,
    END_JOBS,
    Leaving,
    actions,
    default,
    end,
    leaving,
    settle,
    terminate,
)
from marketplace.services.contracts.notices import NOTICE, sentence
from marketplace.services.contracts.notices import send as send_notice
from marketplace.services.contracts.signing import ACCEPTED, accept, check_standing, confirm_payment

__all__ = [
    "ACCEPTED", "CANCELLED", "END_JOBS", "NOTICE", "Leaving", "Ticked", "accept", "actions", "check_standing", "clock",
    "confirm_payment", "default", "end", "leaving", "send_notice", "sentence", "settle", "terminate",
]  # fmt: skip

"""Why a request does not go to a host, or a job not anywhere."""

from __future__ import annotations

from enum import IntEnum
from typing import Final


class Reason(IntEnum):
    """Why a request does not go to a host, or a job not anywhere. Names are stable: they are shown to users and
    stored.
    """

    OK = 0
    # Stages of the fit rule, in the order in which they are tested.
    NOT_IN_POOL = 1
    WRONG_SITE = 2
    WRONG_MODEL = 3
    HOST_UNSCHEDULABLE = 4
    HOST_RESERVED_FOR_OWNER = 5
    HELD_FOR_EARLIER_JOB = 6
    NO_CPU = 7
    NO_RAM = 8
    NO_NVME = 9
    NO_GPU = 10
    NO_GPU_SHARE = 11
    NO_VRAM = 12
    TOPOLOGY = 13
    NO_WATTS = 14
    # Of the whole job.
    GANG_INCOMPLETE = 15
    OVER_QUOTA = 16
    PRICE_LIMIT = 17
    INVALID = 18
    EMPTY_CELL = 19
    # More stages of the fit rule; numbers are stored, so the order stands in FIT_STAGES.
    TAINTED = 20
    LEAVES_TOO_SOON = 21
    AFFINITY = 22
    RESERVED_SOON = 23  # it would fit, but may stand on GPUs when their reservation begins
    ORGANIZATION_LIMIT = 24  # of the whole job, too: its organization holds as many GPUs as it may
    HOURLY_LIMIT = 25  # what its organization's running work costs an hour would pass the limit set for it
    BUDGET_USED = 26  # its organization's budget of the month is used up


FIT_STAGES: Final = (
    Reason.NOT_IN_POOL,
    Reason.WRONG_SITE,
    Reason.WRONG_MODEL,
    Reason.HOST_UNSCHEDULABLE,
    Reason.HOST_RESERVED_FOR_OWNER,
    Reason.TAINTED,
    Reason.LEAVES_TOO_SOON,
    Reason.AFFINITY,
    *(Reason(i) for i in range(6, 14)),
    Reason.RESERVED_SOON,
    Reason.NO_WATTS,
)
REASONS: Final = 1 + max(Reason)  # length of a histogram of reasons

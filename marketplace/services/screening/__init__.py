"""Screening: is the business what it says, is it on no list of sanctions, may the GPUs be used as it means to.

rule       what asks for which check, and what a rejection stops: the published rule
records    the checks as they stand, and every step of them; what the organization tells; our own people's decisions
asking     the provider is asked, polled, and asked again when an answer grows old
providers  who answers: `manual`, `list` (lists), `http` (remote)
notices    what the organization is told, by mail and on its page
"""

from marketplace.services.screening.asking import ask, tick
from marketplace.services.screening.notices import Standing, send_notice, standing
from marketplace.services.screening.records import (
    ASK,
    NOTICE,
    OPERATOR_CLEAR,
    TOLD,
    begin,
    decide,
    refresh,
    tell,
)
from marketplace.services.screening.rule import controlled, needed, refuse_rejected, require

__all__ = [
    "ASK", "NOTICE", "OPERATOR_CLEAR", "TOLD", "Standing", "ask", "begin", "controlled", "decide", "needed", "refresh",
    "refuse_rejected", "require", "send_notice", "standing", "tell", "tick",
]  # fmt: skip

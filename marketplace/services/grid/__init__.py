"""Signals of the grid that make curtailments by themselves: `sources` (their rows), `rules` (price, frequency, silence), `openadr`
(an OpenADR 3 programme: what is said, `openadr_events`; over HTTP, `openadr_client`).
"""

from marketplace.services.grid.clock import ASK, ask, holds, tick
from marketplace.services.grid.openadr import REPORT, send_report
from marketplace.services.grid.rules import take_frequency
from marketplace.services.grid.sources import add, remove, update

__all__ = ["ASK", "REPORT", "add", "ask", "holds", "remove", "send_report", "take_frequency", "tick", "update"]

"""Scheduled work at a site: announced with its window, prepared for, done, and settled. The only writers of its tables.

announcing  what an operator does: draft, dry run, announce, change, extend, finish early, cancel
planning    which hosts, who is touched, what stands in elsewhere, what stays short
taking      hosts go and come back; seconds that contracts missed
arrivals    GPUs that come back to a contract under announced work
notices     who is told, and what
feeds       calendars for calendar programs
clock       what happens because time passes
reads       what is known of it: for those who judge hosts, for buyers, for calendars
"""

from marketplace.services.maintenance import feeds
from marketplace.services.maintenance.announcing import (
    FIELDS,
    NOTICE_DUE,
    actions,
    announce,
    cancel,
    change,
    draft,
    dry_run,
    extend,
    finish,
)
from marketplace.services.maintenance.arrivals import meet
from marketplace.services.maintenance.clock import clock
from marketplace.services.maintenance.notices import NOTICE, about, concerned_of, sentence, window
from marketplace.services.maintenance.notices import send as send_notice
from marketplace.services.maintenance.planning import Impact, Touched
from marketplace.services.maintenance.reads import covers, during, of_listing, upcoming
from marketplace.services.maintenance.taking import put_back

__all__ = [
    "FIELDS", "NOTICE", "NOTICE_DUE", "Impact", "Touched", "about", "actions", "announce", "cancel", "change", "clock",
    "concerned_of", "covers", "draft", "dry_run", "during", "extend", "feeds", "finish", "meet", "of_listing", "put_back", "send_notice",
    "sentence", "upcoming", "window",
]  # fmt: skip

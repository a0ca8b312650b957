"""Many who download a paper for the first time, at once, get one file."""

import pytest

from marketplace.models import DocumentFile
from marketplace.services import documents
from tests import factories
from tests.factories import NOW
from tests.threads import at_once

pytestmark = pytest.mark.django_db(transaction=True)


def test_a_paper_is_made_into_one_file():
    terms = {
        "kind": "on_demand", "level": "site", "early_termination": {"rule": "at_once"}, "price_rise": None, "total_minor": None,
        "default": {"after_days": 28},
    }  # fmt: skip
    paper = documents.keep_order_form(factories.contract(terms=terms), now=NOW)
    answers = at_once([lambda: bytes(documents.file_of(paper, now=NOW).body) for _ in range(6)])
    assert len(set(answers)) == 1
    assert DocumentFile.objects.count() == 1

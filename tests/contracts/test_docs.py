"""What is not documented fails: every error code stands in docs/errors.md, as the catalogue has it."""

import re
from pathlib import Path

import pytest

from marketplace.errors import CATALOGUE
from marketplace.services import columns

pytestmark = pytest.mark.serverless
ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"^\| `(\w+)` \| (\d+) \| (\w+) \| (.+) \|$", re.MULTILINE)


def rows():
    return {code: (int(status), retry, text) for code, status, retry, text in
            ROW.findall((ROOT / "docs" / "errors.md").read_text())}  # fmt: skip


def test_every_code_says_what_to_do():
    missing = sorted(set(CATALOGUE) - set(rows()))
    assert not missing, f"add a line to docs/errors.md for {missing}"
    assert not sorted(set(rows()) - set(CATALOGUE)), "docs/errors.md has codes that the catalogue has not"
    assert all(len(text) > 10 for _, _, text in rows().values())


def test_status_and_retry_are_those_of_the_catalogue():
    assert {code: row[:2] for code, row in rows().items()} == {c: (k.status, k.retry) for c, k in CATALOGUE.items()}


def test_every_code_that_is_raised_is_in_the_catalogue():
    """A misspelt code would otherwise be found by the first customer who meets it."""
    raised = re.compile(r"MarketError\(\s*[\"'](\w+)[\"']")
    used = {
        code: path
        for folder in ("marketplace", "billing", "scheduler")
        for path in (ROOT / folder).rglob("*.py")
        for code in raised.findall(path.read_text())
    }
    assert len(used) > 20
    assert not {code: str(path) for code, path in used.items() if code not in CATALOGUE}


@pytest.mark.parametrize(
    ("kind", "table"),
    [("power_nodes", columns.POWER_NODES), ("hosts", columns.HOSTS), ("miners", columns.MINERS)],
)
def test_every_column_of_an_import_is_explained(kind, table):
    section = (ROOT / "docs" / "imports.md").read_text().partition(f"\n## {kind}\n")[2].partition("\n## ")[0]
    explained = dict(re.findall(r"^\| `(\w+)` \| (\w+|.*?) \|", section, re.MULTILINE))
    assert list(explained) == [column.name for column in table]
    assert [n for n, what in explained.items() if what == "required"] == [
        c.name for c in table if c.default is columns.REQUIRED
    ]

"""Denied parties from a file: CSV in the shape of the US consolidated screening list, matched by name.

Read are the columns `name`, `alt_names` (separated by `;`), `source`, `type`, `programs` and `source_information_url`; only `name`
is required. The file is read again when it changes, and then everybody is asked about again.

Matching. A name becomes words: accents are taken off, case and punctuation do not count, nor do forms of business (Ltd, GmbH, LLC...).
The score of two names is the best of three ratios of Python's difflib (Ratcliff and Obershelp's measure, 0 to 100): of the words as
they stand, of the words in order of the alphabet, and, where the shorter name has two words or more, of the shorter's words beside
their best partners in the longer. At SCREENING_MATCH (85) or more it is a hit, and a person looks: a hit never rejects anybody.
"""

import csv
import hashlib
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache
from pathlib import Path
from typing import Any

from django.conf import settings

from marketplace.services.screening.providers import Answer, Question, Unavailable

FORMS = frozenset(
    re.split(
        ", *",
        "ag, as, bv, co, company, corp, corporation, gmbh, inc, incorporated, jsc, kg, limited, llc, llp, ltd, nv, ooo, oao, pao, plc,"
        " pte, pty, sa, sarl, sas, sl, spa, srl, the, zao",
    )
)
# Letters that do not come apart into a base and an accent.
LETTERS = str.maketrans({"ø": "o", "ł": "l", "đ": "d", "ß": "ss", "æ": "ae", "œ": "oe", "þ": "th", "ð": "d", "ı": "i"})
MOST_MATCHES = 20


@dataclass(frozen=True)
class Party:
    """A line of the list under one of its names; `words` as `words()` gives them."""

    name: str
    words: tuple[str, ...]
    line: int
    of: str  # the line's first name
    source: str
    programs: str
    url: str


def words(name: str) -> tuple[str, ...]:
    """The name's words without accents, case, punctuation and forms of business; all of them where nothing else would be left."""
    plain = unicodedata.normalize("NFKD", name.casefold().translate(LETTERS))
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter)).replace("&", " and ")
    plain = re.sub(r"['’.]", "", plain)
    found = tuple(re.findall(r"\w+", plain))
    return tuple(word for word in found if word not in FORMS) or found


def score(one: tuple[str, ...], other: tuple[str, ...], least: int = 0) -> int:
    """0 to 100, the same whichever comes first; 0 where it is sure to be under `least`."""
    if not one or not other:
        return 0
    a, b = sorted((one, other), key=lambda w: (len(w), w))
    best = max(_ratio(" ".join(a), " ".join(b), least), _ratio(" ".join(sorted(a)), " ".join(sorted(b)), least))
    if len(a) >= 2 and len(b) > len(a):
        partners = [max((_ratio(word, beside, 0) for beside in b), default=0) for word in a]
        lengths = [len(word) for word in a]
        best = max(best, sum(p * n for p, n in zip(partners, lengths, strict=True)) // sum(lengths))
    return best if best >= least else 0


def _ratio(a: str, b: str, least: int) -> int:
    a, b = sorted((a, b))  # difflib's ratio depends on the order
    match = SequenceMatcher(None, a, b, autojunk=False)
    if match.real_quick_ratio() * 100 < least or match.quick_ratio() * 100 < least:
        return 0
    return int(match.ratio() * 100)


@lru_cache(maxsize=2)
def _load(path: str, changed_ns: int, size: int) -> tuple[str, tuple[Party, ...]]:
    """(digest, parties) of the file as it was then."""
    del changed_ns, size  # they are the cache's key
    raw = Path(path).read_bytes()
    rows = csv.DictReader(raw.decode("utf-8-sig").splitlines())
    if "name" not in (rows.fieldnames or ()):
        raise ValueError("it has no column `name`")
    found = [party for line, row in enumerate(rows, 2) for party in _parties(line, row)]
    if not found:
        raise ValueError("it names nobody")
    return hashlib.sha256(raw).hexdigest(), tuple(found)


def _parties(line: int, row: dict[str, Any]) -> Iterable[Party]:
    first = (row.get("name") or "").strip()
    for name in [first, *(row.get("alt_names") or "").split(";")]:
        if said := words(name):
            yield Party(
                name.strip()[:200], said, line, first[:200], (row.get("source") or "")[:120], (row.get("programs") or "")[:120],
                (row.get("source_information_url") or "")[:200],
            )  # fmt: skip


def load() -> tuple[str, tuple[Party, ...]]:
    """(SHA-256 of the file, its parties). Raises Unavailable where it cannot be read."""
    path = Path(settings.SCREENING_LIST)
    try:
        status = path.stat()
        return _load(str(path), status.st_mtime_ns, status.st_size)
    except (OSError, ValueError, csv.Error) as error:
        raise Unavailable(f"the list {path.name!r} cannot be read: {error}"[:200]) from error


def matches(names: Iterable[str], parties: Iterable[Party], least: int) -> list[dict[str, Any]]:
    """Who on the list is called like one of the names: best first, one for a line of the list."""
    asked = [(name, said) for name in names if (said := words(name))]
    best: dict[int, dict[str, Any]] = {}
    for party in parties:
        for name, said in asked:
            found = score(said, party.words, least)
            if found and found > best.get(party.line, {"score": 0})["score"]:
                best[party.line] = {
                    "asked": name, "name": party.of, "as": party.name, "score": found, "list": party.source,
                    "programs": party.programs, "url": party.url, "line": party.line,
                }  # fmt: skip
    return sorted(best.values(), key=lambda row: (-row["score"], row["line"]))[:MOST_MATCHES]


class ListFile:
    name = "list"

    @property
    def version(self) -> str:
        return load()[0]

    def ask(self, question: Question, ticket: str) -> Answer:  # noqa: ARG002
        facts = question.facts
        if question.kind == "business":
            return Answer("person", "whether a business is what it says, a person finds out")
        digest, parties = load()
        names = dict.fromkeys(
            filter(None, [facts.get("name"), facts.get("legal_name"), *facts.get("beneficial_owners", ()), *facts.get("owners", ())])
        )  # fmt: skip
        evidence = {
            "list": digest,
            "parties": len(parties),
            "threshold": settings.SCREENING_MATCH,
            "names": list(names),
        }
        found = matches(names, parties, settings.SCREENING_MATCH)
        if found:
            return Answer("hit", f"{len(found)} possible matches on the list", {**evidence, "matches": found})
        if question.kind == "export":
            listed = {*settings.EXPORT_RESTRICTED_COUNTRIES, *settings.SANCTIONED_COUNTRIES}
            where = sorted({facts.get("country", ""), *facts.get("end_use_countries", ())} & listed)
            if where:
                return Answer("hit", f"listed countries: {', '.join(where)}", {**evidence, "countries": where})
        elif facts.get("country") in settings.SANCTIONED_COUNTRIES:
            return Answer("hit", f"a listed country: {facts['country']}", evidence)
        return Answer("clear", evidence=evidence)

"""CSV import of power nodes, hosts and miners: every row is checked, all or nothing, with a dry run.

The first line names the columns (services.columns). Lists are written with blanks (`nvlink_domains`: `0 0 1 1`), a miner's
ladder as `sleep:25:0 eco:2400:155000 normal:3500:200000` (name:watts:GH/s).
"""

import csv
import io
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

from django.db import transaction

from marketplace.errors import MarketError
from marketplace.models import PowerNode, Site
from marketplace.services import columns, sites
from marketplace.services.inventory import Changes
from marketplace.tenancy import Actor

MAX_ROWS = 20_000
MAX_ERRORS = 200  # shown; all are counted


@dataclass(frozen=True)
class RowError:
    """`line` as an editor counts them (the heading is 1)."""

    line: int
    column: str
    value: str
    message: str

    def __str__(self) -> str:
        return f"line {self.line}, {self.column}: {self.value!r} {self.message}"


@dataclass
class Report:
    """What an import did, or would do (`dry_run`)."""

    kind: str
    dry_run: bool
    rows: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    errors: list[RowError] = field(default_factory=list)
    error_count: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Line:
    number: int
    raw: dict[str, str]
    values: dict[str, Any]


def run(site: Site, kind: str, text: str, *, dry_run: bool = False, now: datetime, actor: Actor) -> Report:
    """Import `text` (CSV) as `kind`: power_nodes | hosts | miners.

    A dry run does all of it and takes it back; it reports errors instead of raising. Otherwise errors raise import_invalid
    (the problem document carries the report), or over_power_cap where a node cannot carry what is added; nothing is kept.
    """
    if kind not in _KINDS:
        raise MarketError("invalid_request", f"kind {kind!r} is none of {', '.join(_KINDS)}", {"/kind": "unknown"})
    table, apply = _KINDS[kind]
    report = Report(kind, dry_run)
    lines = _parse(text, table, report)
    if not report.error_count:
        with transaction.atomic():
            changes = apply(site, lines, report, now, actor)
            report.counts = changes.counts
            if dry_run or report.error_count:
                transaction.set_rollback(True)
    if report.error_count:
        report.counts = {}
        if not dry_run:
            raise MarketError(
                "import_invalid",
                f"{report.error_count} values are wrong, first: {report.errors[0]}. Correct the file and send it again.",
                {f"/line/{e.line}/{e.column}": f"{e.value!r} {e.message}" for e in report.errors},
                extra={"report": report.as_dict()},
            )
    return report


def _parse(text: str, table: Iterable[columns.Column], report: Report) -> list[_Line]:
    """Rows with their values; whatever is wrong stands in the report."""
    known = [column.name for column in table]
    if "\x00" in text:
        _wrong(report, 1, "file", "", "holds a NUL byte: save it as plain UTF-8 text")
        return []
    reader = csv.reader(io.StringIO(text.removeprefix("\ufeff")), strict=True)
    lines: list[_Line] = []
    try:
        heading = [name.strip() for name in next(reader, [])]
        if not heading:
            _wrong(report, 1, "file", "", f"is empty: the first line names the columns {', '.join(known)}")
        for name in heading:
            if name not in known or heading.count(name) > 1:
                _wrong(report, 1, name, name, f"is unknown or doubled: the columns are {', '.join(known)}")
        for column in table:
            if column.default is columns.REQUIRED and column.name not in heading:
                _wrong(report, 1, column.name, "", "is missing: add the column")
        if report.error_count:
            return []
        for cells in reader:
            if any(cell.strip() for cell in cells):
                lines += _row(reader.line_num, heading, cells, table, report)
                if report.rows > MAX_ROWS:
                    _wrong(report, reader.line_num, "file", "", f"has more than {MAX_ROWS} rows: split it")
                    return []
    except csv.Error as error:
        _wrong(report, reader.line_num, "file", "", f"is no readable CSV here ({error}): check quotes and commas")
    if not report.rows and not report.error_count:
        _wrong(report, 1, "file", "", "has a heading and no rows")
    return lines


def _row(
    number: int, heading: list[str], cells: list[str], table: Iterable[columns.Column], report: Report
) -> list[_Line]:
    report.rows += 1
    if len(cells) != len(heading):
        message = f"has {len(cells)} values for {len(heading)} columns: check commas and quotes"
        _wrong(report, number, "row", ",".join(cells)[:80], message)
        return []
    raw = dict(zip(heading, cells, strict=True))
    values, messages = columns.clean(tuple(table), raw)
    for column, message in messages.items():
        _wrong(report, number, column, raw.get(column, ""), message)
    return [] if messages else [_Line(number, raw, values)]


def _wrong(report: Report, line: int, column: str, value: str, message: str) -> None:
    report.error_count += 1
    if len(report.errors) < MAX_ERRORS:
        report.errors.append(RowError(line, column, value, message))


# --- the three kinds
def _bulk(
    upsert: Callable[..., Changes],
) -> Callable[[Site, list[_Line], Report, datetime, Actor], Changes]:
    def apply(site: Site, lines: list[_Line], report: Report, now: datetime, actor: Actor) -> Changes:
        try:
            return upsert(site, [line.values for line in lines], now=now, actor=actor, strict=True)
        except MarketError as error:
            if error.code != "import_invalid":
                raise
            for pointer, message in error.fields.items():  # /position/column
                _, position, column = pointer.split("/", 2)
                line = lines[int(position)]
                _wrong(report, line.number, column, line.raw.get(column, ""), message)
            return Changes()

    return apply


def _power_nodes(site: Site, lines: list[_Line], report: Report, now: datetime, actor: Actor) -> Changes:
    """Parents may stand after their children. An existing node is updated; it keeps its place in the tree."""
    changes = Changes()
    nodes = {node.name: node for node in PowerNode.objects.filter(site=site)}
    waiting = _checked_tree(nodes, lines, report)
    while waiting and not report.error_count:
        ready = [ln for ln in waiting if (ln.values["parent"] or sites.ROOT) in nodes or ln.values["name"] in nodes]
        if not ready:
            for line in waiting:
                _wrong(report, line.number, "parent", line.values["parent"], "leads back to itself: break the ring")
        for line in ready:
            _one_node(site, nodes, line, report, changes, now, actor)
        waiting = [line for line in waiting if line not in ready]
    return changes


def _checked_tree(nodes: dict[str, PowerNode], lines: list[_Line], report: Report) -> list[_Line]:
    names = [line.values["name"] for line in lines]
    for line in lines:
        name, parent = line.values["name"], line.values["parent"] or sites.ROOT
        present = nodes.get(name)
        if names.count(name) > 1:
            _wrong(report, line.number, "name", name, "stands in more than one row: keep one")
        if name == sites.ROOT:
            _wrong(report, line.number, "name", name, "is the site itself: change it on the site's page")
        if parent not in nodes and parent not in names:
            _wrong(report, line.number, "parent", parent, "is no node of this site nor of this file: add it")
        if present is not None and present.parent is not None and present.parent.name != parent:
            _wrong(
                report, line.number, "parent", parent, f"moves {name} away from {present.parent.name}: add a new node"
            )
    return lines


def _one_node(
    site: Site, nodes: dict[str, PowerNode], line: _Line, report: Report, changes: Changes, now: datetime, actor: Actor
) -> None:
    name = line.values["name"]
    given = {key: value for key, value in line.values.items() if key not in {"name", "parent"}}
    try:
        if (node := nodes.get(name)) is None:
            parent = nodes[line.values["parent"] or sites.ROOT]
            nodes[name] = sites.add_power_node(site, name=name, parent=parent, actor=actor, now=now, **given)
            changes.created.append(name)
            return
        given.pop("kind")
        differs = {key: value for key, value in given.items() if getattr(node, key) != value}
        if differs:
            sites.update_power_node(node, actor=actor, now=now, **differs)
        (changes.updated if differs else changes.unchanged).append(name)
    except MarketError as error:
        if error.code not in {"invalid_request", "over_power_cap"}:
            raise
        column = next(iter(error.fields), "/cap_w").strip("/")
        _wrong(report, line.number, column, str(line.values.get(column, "")), error.detail)


_KINDS: dict[str, tuple[tuple[columns.Column, ...], Any]] = {
    "power_nodes": (columns.POWER_NODES, _power_nodes),
    "hosts": (columns.HOSTS, _bulk(sites.upsert_hosts)),
    "miners": (columns.MINERS, _bulk(sites.upsert_miners)),
}
KINDS = tuple(_KINDS)

"""The house's own rules: what must stand where, what must not stand anywhere, and documents that keep up with the code."""

import ast
import os
import re
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest

pytestmark = pytest.mark.serverless
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("marketplace", "scheduler", "billing", "agent", "sandbox", "benchmarks")
LONGEST = 400


def committed(*patterns: str) -> list[Path]:
    """Files that git knows, which exist; a checkout without git (an archive) is walked instead."""
    listed = subprocess.run(["git", "ls-files", "-z", *patterns], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        names = [name for name in listed.stdout.split("\0") if name]
    else:
        names = [
            str(path.relative_to(ROOT))
            for pattern in patterns
            for path in ROOT.rglob(pattern)
            if ".venv" not in path.parts
        ]
    return [ROOT / name for name in names if (ROOT / name).exists()]


def sources() -> list[Path]:
    return [path for path in committed("*.py") if "migrations" not in path.parts]


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path), feature_version=(3, 11))


def shown(paths: list[str]) -> str:
    return "\n  ".join(["", *paths])


@pytest.mark.parametrize(
    "name",
    [
        "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "Makefile", "manage.py", "requirements.txt",
        "constraints.txt", "pyproject.toml", ".ci/run", ".ci/lint", "docs/operate.md", "docs/agent-protocol.md",
        "docs/adr/README.md",
    ],
)  # fmt: skip
def test_a_newcomer_finds(name: str) -> None:
    assert (ROOT / name).stat().st_size > 0


def test_scripts_can_be_run() -> None:
    assert [name for name in (".ci/run", ".ci/lint", "manage.py") if not os.access(ROOT / name, os.X_OK)] == []


def test_no_source_is_unfinished() -> None:
    mark = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|NotImplementedError|pytest\.mark\.xfail")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in [*sources(), *committed("*.html")]
        if path != Path(__file__)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if mark.search(line)
    ]
    assert not found, shown(found)


def test_no_file_is_too_long() -> None:
    long = [
        f"{lines} lines: {path.relative_to(ROOT)}"
        for path in sources()
        if path.relative_to(ROOT).parts[0] != "tests" and (lines := len(path.read_text().splitlines())) > LONGEST
    ]
    assert not long, f"over {LONGEST} lines, each wants to be two:{shown(long)}"


def test_no_path_of_one_persons_machine_is_in_the_tree() -> None:
    # Written in pieces, so that this file does not find itself.
    mark = re.compile("/" + "root/|/" + "home/[a-z]|/" + "Users/[A-Za-z]")
    found = [
        str(path.relative_to(ROOT))
        for path in committed("*.py", "*.md", "*.toml", "*.txt", "Makefile", ".ci/*")
        if mark.search(path.read_text())
    ]
    assert not found, shown(found)


def test_there_is_no_attic() -> None:
    forbidden = {"utils", "common", "helpers", "signals", "repositories"}
    found = [str(path.relative_to(ROOT)) for path in sources() if {path.stem, path.parent.name} & forbidden]
    assert not found, shown(found)


def test_our_own_code_is_not_mocked() -> None:
    packages = "|".join(PACKAGES)
    mark = re.compile(rf"unittest\.mock|MagicMock|mocker\.|monkeypatch\.setattr\(\s*[\"']?({packages})\b")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in committed("tests/*.py", "tests/**/*.py")
        if path != Path(__file__)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if mark.search(line)
    ]
    assert not found, shown(found)


def test_every_module_can_be_read_by_the_oldest_python_we_name() -> None:
    for path in sources():
        parsed(path)


def test_the_import_contracts_hold() -> None:
    lint = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert lint.returncode == 0, lint.stdout[-3000:] + lint.stderr[-1000:]


def test_every_setting_from_the_environment_is_explained() -> None:
    settings = (ROOT / "marketplace" / "settings.py").read_text()
    named = set(re.findall(r"""\b(?:env(?:\.\w+)?|secret)\(\s*["']([A-Z][A-Z0-9_]+)["']""", settings))
    assert len(named) > 10, "the pattern no longer finds the settings"
    explained = set(re.findall(r"`([A-Z][A-Z0-9_]+)`", (ROOT / "docs" / "operate.md").read_text()))
    assert sorted(named - explained) == [], "add these to the table in docs/operate.md"


def test_every_setting_explained_is_still_read() -> None:
    section = (ROOT / "docs" / "operate.md").read_text().partition("## Settings")[2].partition("\n## ")[0]
    explained = set(re.findall(r"^\| `([A-Z0-9_]+)`", section, flags=re.MULTILINE))
    settings = (ROOT / "marketplace" / "settings.py").read_text()
    assert sorted(name for name in explained if f'"{name}"' not in settings) == []


def test_every_requirement_is_pinned_and_constrained_alike() -> None:
    def pins(name: str) -> dict[str, str]:
        lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
        assert all("==" in line for line in lines if line), f"{name}: everything is pinned"
        pairs = (line.split("==") for line in lines if line)
        return {re.sub(r"\[.*\]", "", package).lower().replace("_", "-"): version for package, version in pairs}

    constrained = pins("constraints.txt")
    different = [
        f"{package} {version}"
        for package, version in pins("requirements.txt").items()
        if constrained.get(package) != version
    ]
    assert different == []


def test_what_is_imported_is_required() -> None:
    """A package that we import stands in requirements.txt by its own name, not as somebody else's dependency."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    required = {re.sub(r"\[.*\]", "", line.partition("==")[0]).lower().replace("_", "-") for line in lines if line}
    sold_by = metadata.packages_distributions()
    missing = set()
    for path in sources():
        for node in ast.walk(parsed(path)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for top in {name.partition(".")[0] for name in names} - {*PACKAGES, "tests", *sys.stdlib_module_names}:
                if not required & {name.lower().replace("_", "-") for name in sold_by.get(top, ())}:
                    missing.add(f"{top} (in {path.relative_to(ROOT)})")
    assert not missing, shown(sorted(missing))


def test_every_decision_has_its_parts_and_is_listed() -> None:
    index = (ROOT / "docs" / "adr" / "README.md").read_text()
    pages = sorted((ROOT / "docs" / "adr").glob("[0-9]*.md"))
    assert len(pages) >= 6
    for page in pages:
        text = page.read_text()
        assert page.name in index, page.name
        for part in ("**Context.**", "**Decision.**", "**Rejected.**", "**The number that decided.**"):
            assert part in text, f"{page.name} has no {part}"
        assert len(text.splitlines()) <= 60, f"{page.name} is longer than a page"


def test_every_link_between_documents_leads_somewhere() -> None:
    dead = [
        f"{path.relative_to(ROOT)} -> {target}"
        for path in committed("*.md")
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", path.read_text())
        if "://" not in target and not (path.parent / target).exists()
    ]
    assert not dead, shown(dead)


def test_every_make_target_of_the_documents_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    asked = {
        word
        for path in committed("*.md")
        for word in re.findall(r"`make ([a-z-]+)", path.read_text())
        + re.findall(r"^make ([a-z-]+)", path.read_text(), re.MULTILINE)
    }
    assert sorted(asked - targets) == []

"""No bare `.objects` where people and keys read: in api, web and admin every queryset begins at `visible_to` or `owned_by`.

`model_queryset = X.objects...` of a Resource is fine: Resource narrows it to the actor and refuses an override.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.serverless
ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("api", "web", "admin")
MANAGERS = {"objects", "_default_manager", "_base_manager"}
NARROWED = {"visible_to", "owned_by", "none"}

# file: function -> why it may look at rows without an actor. Keep it short.
ALLOWED: dict[str, str] = {
    "marketplace/api/auth.py: KeyAuthentication.authenticate": "finds out who the actor is, by the digest of a key",
    "marketplace/api/auth.py: AgentAuthentication.authenticate": "finds out who the actor is, by the digest of a key",
    "marketplace/api/idempotency.py: _once": "asks for the actor's own organization",
    "marketplace/api/staff.py: Health.get": "counts of the whole house, for our own people alone",
    "marketplace/api/staff.py: _by_state": "counts of the whole house, for our own people alone",
    "marketplace/admin/base.py: StaffAdmin.rows_of": "our own people's pages show all rows",
    "marketplace/admin/dashboard.py: staff": "our own people's first page",
    "marketplace/admin/dashboard.py: _n": "counts on our own people's first page",
    "marketplace/admin/staff_money.py: LedgerAccountAdmin.get_changelist_instance": "balances, for our own people alone",
    "marketplace/admin/doors.py: _operator_actor": "finds out who the actor is, by the person's own memberships",
    "marketplace/admin/tenancy.py: own": "the admin's owned_by: narrows by the path to the owner, or refuses the table",
}


def bare(source: str) -> Iterator[tuple[str, int]]:
    """(function or class that holds it, line) of each manager that nothing narrows."""
    tree = ast.parse(source)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "prepared":
            yield where(node, parents), node.lineno
        if not (isinstance(node, ast.Attribute) and node.attr in MANAGERS):
            continue
        names, at = set(), node
        while isinstance(parents.get(at), ast.Attribute) or (
            isinstance(parents.get(at), ast.Call) and parents[at].func is at
        ):
            at = parents[at]
            if isinstance(at, ast.Attribute):
                names.add(at.attr)
        statement = parents.get(at)
        is_resources = isinstance(statement, ast.Assign | ast.AnnAssign) and any(
            isinstance(t, ast.Name) and t.id == "model_queryset"
            for t in (statement.targets if isinstance(statement, ast.Assign) else [statement.target])
        )
        if not names & NARROWED and not is_resources:
            yield where(node, parents), node.lineno


def where(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> str:
    names = []
    while node in parents:
        node = parents[node]
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.append(node.name)
    return ".".join(reversed(names)) or "module"


def found() -> dict[str, int]:
    return {
        f"{path.relative_to(ROOT).as_posix()}: {name}": line
        for room in ROOMS
        for path in sorted((ROOT / "marketplace" / room).rglob("*.py"))
        for name, line in bare(path.read_text())
    }


def test_no_queryset_begins_without_an_actor():
    wrong = {place: line for place, line in found().items() if place not in ALLOWED}
    assert not wrong, (
        f"begin at .visible_to(actor), .owned_by(organization) or Resource.queryset(), or at a row found that way (site.hosts): {wrong}"
    )


def test_the_allowed_places_are_still_there():
    assert set(ALLOWED) <= set(found()), "take the line out of ALLOWED"


@pytest.mark.parametrize(
    ("source", "places"),
    [
        ("def f(a):\n    return Job.objects.filter(pk=1).first()", ["f"]),
        ("def f(a):\n    return Job.objects.select_related('x').visible_to(a).get(pk=1)", []),
        ("def f(a):\n    return Job.objects.owned_by(a)", []),
        ("class R:\n    model_queryset = Job.objects.all()", []),
        ("class R:\n    rows = Job.objects.all()", ["R"]),
        ("class R:\n    def g(self):\n        x = Job._base_manager.all()", ["R.g"]),
        ("def f(a):\n    return visible_to(Job.objects.all())", ["f"]),
        ("def f(a):\n    return prepared.row('SELECT id FROM marketplace_job WHERE id = %s', [1])", ["f"]),
    ],
)
def test_the_lint_itself(source, places):
    assert [name for name, _ in bare(source)] == places

"""The OpenAPI document: valid 3.1, no warning, the same as the committed one, and complete enough for a generator."""

import json
import re
from pathlib import Path

import pytest
import yaml
from django.test import Client
from drf_spectacular.drainage import GENERATOR_STATS
from drf_spectacular.generators import SchemaGenerator
from drf_spectacular.renderers import OpenApiYamlRenderer
from drf_spectacular.validation import validate_schema
from jsonschema import Draft202012Validator

from marketplace.errors import CATALOGUE
from tests.contracts.test_matrix import Cast, cast, knock  # noqa: F401 - the matrix's world, as a fixture
from tests.matrix import ROUTES

pytestmark = pytest.mark.django_db
ROOT = Path(__file__).resolve().parents[2]
WRITES = {"post", "patch", "put", "delete"}


@pytest.fixture(scope="module")
def document():
    GENERATOR_STATS.reset()
    made = SchemaGenerator().get_schema(request=None, public=True)
    assert not GENERATOR_STATS, "drf-spectacular warns: run `make openapi` and read what it says"
    return made


def operations(document):
    return [(path, m, op) for path, methods in document["paths"].items() for m, op in methods.items()]


def test_it_is_valid_openapi_3_1(document):
    assert document["openapi"].startswith("3.1")
    validate_schema(document)


def test_the_committed_document_is_this_one(document):
    fresh = OpenApiYamlRenderer().render(document, renderer_context={}).decode()
    committed = (ROOT / "docs" / "openapi.yaml").read_text()
    assert yaml.safe_load(committed) == yaml.safe_load(fresh), "run `make openapi` and commit docs/openapi.yaml"


def test_every_api_route_of_the_matrix_is_an_operation(document):
    named = {(re.sub(r"\{\w+\}", "{}", path), method.upper()) for path, method, _ in operations(document)}
    # the document itself; Stripe's own contract; bytes for an agent that verifies a host, by a token
    hidden = {"api/v1/schema", "api/v1/webhooks/stripe", "api/v1/probe/<str:token>"}
    listed = {("/" + re.sub(r"<[^>]+>", "{}", r.path), r.method) for r in ROUTES if r.is_api and r.path not in hidden}
    assert listed - named == set()
    assert named - listed == set()


def test_operations_have_unique_names_tags_and_an_answer(document):
    names = [op["operationId"] for _, _, op in operations(document)]
    assert len(names) == len(set(names))
    bare = [name for _, _, op in operations(document) if not op.get("tags") for name in [op["operationId"]]]
    assert not bare
    assert all(any(code.startswith("2") for code in op["responses"]) for _, _, op in operations(document))


def test_refusals_and_idempotency_are_told_on_every_operation(document):
    assert document["components"]["schemas"]["Problem"]["properties"]["code"]["enum"] == sorted(CATALOGUE)
    for path, method, op in operations(document):
        assert "application/problem+json" in op["responses"]["default"]["content"], path
        keyed = any(p["name"] == "Idempotency-Key" for p in op.get("parameters", []))
        assert keyed == (method in WRITES and {"agent": []} not in op.get("security", [])), (path, method)


def test_the_document_is_served_to_anybody():
    response = Client().get("/api/v1/schema", HTTP_ACCEPT="application/vnd.oai.openapi+json")
    assert response.status_code == 200
    assert response.json()["info"]["title"] == "Tailrace API"


def undocumented(value, schema, schemas, at="$"):
    """Keys of an answer that its schema does not name."""
    if "$ref" in schema:
        return undocumented(value, schemas[schema["$ref"].rpartition("/")[2]], schemas, at)
    for part in (*schema.get("allOf", ()), *schema.get("oneOf", ())):
        if "$ref" in part or "properties" in part:
            return undocumented(value, part, schemas, at)
    if isinstance(value, list):
        return [found for each in value for found in undocumented(each, schema.get("items", {}), schemas, f"{at}[]")]
    if not isinstance(value, dict) or "properties" not in schema:
        return []
    known = schema["properties"]
    return [
        found
        for key, each in value.items()
        for found in (undocumented(each, known[key], schemas, f"{at}.{key}") if key in known else [f"{at}.{key}"])
    ]


def test_answers_are_what_the_document_says(document, cast: Cast):  # noqa: F811
    """Every GET of the matrix that answers its own people: all that is required stands there, and nothing that is not named."""
    told = {(re.sub(r"\{\w+\}", "{}", path), method): op for path, method, op in operations(document)}
    wrong, seen = [], 0
    for route in ROUTES:
        op = told.get(("/" + re.sub(r"<[^>]+>", "{}", route.path), "get")) if route.method == "GET" else None
        if op is None or not route.is_api:
            continue
        response = knock(cast.clients["staff" if route.action == "staff" else "owner"], route, cast.world)
        if response.status_code != 200 or not response["Content-Type"].startswith("application/json"):
            continue
        schema = op["responses"]["200"]["content"]["application/json"]["schema"]
        answer = json.loads(response.content)
        whole = {**schema, "components": document["components"]}
        wrong += [
            f"{route.id} {e.json_path}: {e.message[:120]}" for e in Draft202012Validator(whole).iter_errors(answer)
        ]
        wrong += [
            f"{route.id} {key} is not documented"
            for key in undocumented(answer, schema, document["components"]["schemas"])
        ]
        seen += 1
    assert not wrong, "\n".join(wrong)
    assert seen > 40

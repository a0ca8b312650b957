"""A screening service over HTTP: asked once, then polled; it needs no way back to us.

    POST {SCREENING_URL}/screenings   Idempotency-Key: <reference>   {"reference", "kind", "subject"}
    GET  {SCREENING_URL}/screenings/{id}
    both answer {"id", "status": "pending" | "clear" | "match" | "error", "matches": [{"name", "list", "score", ...}]}

Errors, 4xx and 5xx alike, and answers that make no sense are `Unavailable`: the question stays open and is asked again, and our own
people see the service's words. `sandbox/screening.py` speaks the same.
"""

from typing import Any
from urllib.parse import quote

import httpx
from django.conf import settings

from marketplace.services.screening.providers import Answer, Question, Unavailable

TIMEOUT_S = 10
MOST_EVIDENCE = 20  # matches that are kept


class Http:
    name = "http"
    version = ""

    def ask(self, question: Question, ticket: str) -> Answer:
        body = {"reference": question.reference, "kind": question.kind, "subject": question.facts}
        headers = {"Authorization": f"Bearer {settings.SCREENING_KEY}"}
        base = settings.SCREENING_URL.rstrip("/")
        try:
            with httpx.Client(timeout=TIMEOUT_S, headers=headers, follow_redirects=False) as client:
                if ticket:
                    response = client.get(f"{base}/screenings/{quote(ticket, safe='')}")
                else:
                    key = {"Idempotency-Key": question.reference}
                    response = client.post(f"{base}/screenings", json=body, headers=key)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Unavailable(f"no answer: {type(error).__name__}") from error
        if ticket and response.status_code == httpx.codes.NOT_FOUND:
            return Answer("waiting")  # it has forgotten the question: it is asked anew, under the same reference
        if response.status_code not in {httpx.codes.OK, httpx.codes.CREATED, httpx.codes.ACCEPTED}:
            raise Unavailable(f"HTTP {response.status_code}")
        return _read(response)


def _read(response: httpx.Response) -> Answer:
    try:
        said = response.json()
        status, name = said["status"], str(said["id"])[:120]
        matches: list[Any] = list(said.get("matches") or [])
    except (ValueError, KeyError, TypeError) as error:
        raise Unavailable("an answer that makes no sense") from error
    evidence = {"id": name, "matches": matches[:MOST_EVIDENCE], "found": len(matches)}
    if status == "pending":
        return Answer("waiting", ticket=name)
    if status == "clear" and not matches:
        return Answer("clear", evidence=evidence)
    if status in {"match", "clear"}:
        return Answer("hit", f"{len(matches)} possible matches", evidence)
    raise Unavailable(f"status {str(status)[:40]!r}")

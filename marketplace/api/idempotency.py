"""`Idempotency-Key`: the answer is stored in the transaction of its effect, so a retry gets the same answer, once.

Same key and other body: 422. Still running: 409 (an advisory lock, so a crash leaves nothing locked).
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Mapping
from typing import Any, cast

from django.db import transaction
from django.utils import timezone
from rest_framework.renderers import JSONRenderer
from rest_framework.request import Request
from rest_framework.response import Response

from marketplace import prepared
from marketplace.errors import MarketError
from marketplace.tenancy import Actor

MAX_KEY = 120
# The lock, and what the key has answered before. The rows are those from before the lock was ours: one that was kept in that
# moment is met by `_KEEP`.
_BEGIN = """
SELECT mine.ours, k.body_digest, k.route, k.status, coalesce(k.body::text, 'null')
FROM (SELECT pg_try_advisory_xact_lock(%s) AS ours OFFSET 0) mine
LEFT JOIN marketplace_idempotencykey k ON k.organization_id = %s AND k.key = %s
"""
_KEEP = """
INSERT INTO marketplace_idempotencykey (organization_id, key, route, body_digest, status, body, created_at)
VALUES (%s, %s, %s, %s, %s, %s::jsonb, %s) ON CONFLICT (organization_id, key) DO NOTHING
"""


class _Written(Response):
    """An answer as it is stored: what is stored is what is sent, so that it is written once. Other `data` is written anew."""

    def __init__(self, data: Any, status: int, text: str, headers: Mapping[str, str]) -> None:
        super().__init__(data, status=status, headers=headers)
        self._stored = data, text

    @property
    def rendered_content(self) -> Any:
        data, text = self._stored
        if data is None or data is not self.data:
            return super().rendered_content
        self["Content-Type"] = "application/json"
        return text


class _Kept(Exception):  # noqa: N818 (it is no error)
    """Another request of the key has committed since we looked: what we did is undone, and its answer is ours."""


def once(request: Request, effect: Callable[[], Response]) -> Response:
    """Run `effect` in one transaction, or replay what the same key answered before.

    Refusals are not stored: nothing happened, so the same key may try again.
    """
    actor = cast("Actor", request.auth)
    key = request.headers.get("Idempotency-Key", "")
    if not key or actor.organization_id is None:
        with transaction.atomic():
            return effect()
    if len(key) > MAX_KEY:
        raise MarketError("invalid_request", f"Idempotency-Key is longer than {MAX_KEY} characters.")
    asked = [request.query_params.dict(), request.data]  # a dry run is not the run
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()
    route = f"{request.method} {request.path}"[:200]
    try:
        return _once(actor.organization_id, key, (digest, route), effect)
    except _Kept:
        return _once(actor.organization_id, key, (digest, route), effect)


def _once(organization_id: int, key: str, asked: tuple[str, str], effect: Callable[[], Response]) -> Response:
    with transaction.atomic():
        found = prepared.row(_BEGIN, [_lock(organization_id, key), organization_id, key])
        assert found is not None
        ours, *before, status, body = found
        if not ours:
            raise MarketError("idempotency_in_flight", key)
        digest, route = asked
        if status is not None:
            if before != [digest, route]:
                raise MarketError("idempotency_mismatch", f"The key {key} was used for {before[1]} with another body.")
            return _Written(json.loads(body), status, body, {"Idempotent-Replayed": "true"})
        response = effect()
        text = JSONRenderer().render(response.data).decode() or "null"
        kept = [organization_id, key, route, digest, response.status_code, text, timezone.now()]
        if not prepared.count(_KEEP, kept):
            raise _Kept
    return _Written(response.data, response.status_code, text, response.headers)


def _lock(organization_id: int, key: str) -> int:
    return (9 << 56) | (organization_id & 0xFFFFFF) << 32 | zlib.crc32(key.encode())

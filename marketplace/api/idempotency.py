"""`Idempotency-Key`: the answer is stored in the transaction of its effect, so a retry gets the same answer, once.

Same key and other body: 422. Still running: 409 (an advisory lock, so a crash leaves nothing locked).
"""

import hashlib
import json
import zlib
from collections.abc import Callable
from typing import Any, cast

from django.db import connection, transaction
from django.utils import timezone
from rest_framework.request import Request
from rest_framework.response import Response

from marketplace.errors import MarketError
from marketplace.models import IdempotencyKey
from marketplace.rows import Read
from marketplace.tenancy import Actor

MAX_KEY = 120
_SEEN = Read(IdempotencyKey, "WHERE t.organization_id = %s AND t.key = %s")
_KEEP = (
    "INSERT INTO marketplace_idempotencykey (organization_id, key, route, body_digest, status, body, created_at)"
    " VALUES (%s, %s, %s, %s, %s, %s::jsonb, %s)"
)


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
    with transaction.atomic():
        if not _lock(actor.organization_id, key):
            raise MarketError("idempotency_in_flight", key)
        seen = _SEEN.first([actor.organization_id, key])
        if seen is not None:
            if (seen.body_digest, seen.route) != (digest, route):
                raise MarketError("idempotency_mismatch", f"The key {key} was used for {seen.route} with another body.")
            return Response(seen.body, status=seen.status, headers={"Idempotent-Replayed": "true"})
        response = effect()
        kept: list[Any] = [
            actor.organization_id,
            key,
            route,
            digest,
            response.status_code,
            _text(response.data),
            timezone.now(),
        ]
        with connection.cursor() as cursor:
            cursor.execute(_KEEP, kept)
    return response


def _lock(organization_id: int, key: str) -> bool:
    number = (9 << 56) | (organization_id & 0xFFFFFF) << 32 | zlib.crc32(key.encode())
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_try_advisory_xact_lock(%s)", [number])
        return bool(cursor.fetchone()[0])


def _text(data: Any) -> str:
    from rest_framework.utils.encoders import JSONEncoder

    return json.dumps(data, cls=JSONEncoder)

"""Jobs' secrets at rest: Fernet with rotation (settings.SECRETS_KEYS, newest first). Opened only for the agent that runs the job."""

import json
from functools import cache

from cryptography.fernet import Fernet, MultiFernet
from django.conf import settings


@cache
def _box() -> MultiFernet:
    return MultiFernet([Fernet(key) for key in settings.SECRETS_KEYS])


def seal(plain: dict[str, str]) -> bytes:
    return _box().encrypt(json.dumps(plain).encode())


def unseal(sealed: bytes | memoryview | None) -> dict[str, str]:
    if sealed is None:
        return {}
    found: dict[str, str] = json.loads(_box().decrypt(bytes(sealed)))
    return found

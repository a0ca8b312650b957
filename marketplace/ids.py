"""Public ids: `job_9f3k2m7q0w1x`, derived from the primary key, with no column and no index of their own.

The permutation only hides how many there are; access is decided by tenancy, never by guessing. It is a bijection on 60 bits:
`code = (pk * MULTIPLIER + offset(prefix)) mod 2^60`, written in 12 characters of Crockford's base 32.
"""

from zlib import crc32

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_VALUES = {c: i for i, c in enumerate(_ALPHABET)}
_SPACE = 1 << 60
_MULTIPLIER = 0x9E3779B97F4A7C5 | 1
_INVERSE = pow(_MULTIPLIER, -1, _SPACE)


def encode(prefix: str, pk: int) -> str:
    """`("job", 17)` -> `"job_............"`."""
    code = (pk * _MULTIPLIER + crc32(prefix.encode()) * 0x1F3D5B79) % _SPACE
    return f"{prefix}_" + "".join(_ALPHABET[(code >> shift) & 31] for shift in range(55, -1, -5))


def decode(prefix: str, public_id: str) -> int | None:
    """The primary key, or None where the text is no id of that prefix (callers answer 404)."""
    head, _, tail = public_id.rpartition("_")
    if head != prefix or len(tail) != 12 or any(c not in _VALUES for c in tail):
        return None
    code = 0
    for c in tail:
        code = code << 5 | _VALUES[c]
    pk = (code - crc32(prefix.encode()) * 0x1F3D5B79) * _INVERSE % _SPACE
    return pk if 0 < pk < 1 << 53 else None

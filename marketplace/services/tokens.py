"""Secrets that are shown once: API keys, agents' keys, enrolment tokens and invitations."""

import hashlib
import secrets


def new(prefix: str) -> str:
    """`prefix` and 256 random bits, such as `tr_live_...`, `enr_...`, `agk_...`."""
    return prefix + secrets.token_urlsafe(32)


def digest(token: str) -> str:
    """SHA-256 in hex: all that is stored of a token. 256 random bits need no salt."""
    return hashlib.sha256(token.encode()).hexdigest()

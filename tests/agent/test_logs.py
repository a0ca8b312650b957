"""Redaction keeps every length, so that the offset of the text is the offset in the file."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.logs import redact

pytestmark = pytest.mark.serverless


def shipped(raw, secrets, cuts):
    """What arrives when a file grows by the given cuts and is read from the last offset each time."""
    sent, offset = b"", 0
    for end in [*sorted(cuts), len(raw)]:
        final = end == len(raw)
        data = redact(raw[offset:end], secrets, final=final)
        sent += data
        offset += len(data)
    return sent


def test_secrets_and_broken_bytes_keep_their_length():
    assert redact(b"key=abcdef;", ["abcdef"], final=True) == b"key=******;"
    assert redact(b"a\xff\xfeb", [], final=True) == b"a??b"
    assert redact("é".encode()[:1], [], final=True) == b"?"
    assert redact(b"abc", ["ab"], final=True) == b"abc", "too short to be told from words"


def test_a_tail_that_may_become_a_secret_or_a_character_waits():
    assert redact(b"key=abc", ["abcdef"], final=False) == b"key="
    assert redact(b"key=abc", ["abcdef"], final=True) == b"key=abc"
    assert redact(b"caf\xc3", [], final=False) == b"caf"
    assert redact(b"caf\xc3x", [], final=False) == b"caf?x"


@given(
    raw=st.lists(
        st.sampled_from([b"secret-1", b"secr", b"x", "é€".encode(), b"\xff", b"\xe2\x82", b"\n", b"tok-22"]),
        max_size=25,
    ),
    cuts=st.lists(st.integers(0, 120), max_size=6),
)
def test_whatever_the_chunks_the_whole_is_the_same(raw, cuts):
    raw = b"".join(raw)
    secrets = ["secret-1", "tok-22"]
    sent = shipped(raw, secrets, [c for c in cuts if c < len(raw)])
    assert len(sent) == len(raw)
    sent.decode()
    assert b"secret-1" not in sent
    assert b"tok-22" not in sent
    assert sent == redact(raw, secrets, final=True)

"""Session tokens: the format, what verifies, and that every failure is one."""

from __future__ import annotations

import base64
import hmac
import itertools
import math
import pickle
import string
import time
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.uuid7 import uuid7
from gateway.web import tokens as module
from gateway.web.keys import FileSource, Key, KeyRing, Stored
from gateway.web.secret import Secret
from gateway.web.tokens import Tokens


@pytest.fixture
def ring(tmp_path):
    ring = KeyRing(FileSource(tmp_path / "keys"), 86_400)
    ring.open()
    return ring


@pytest.fixture
def tokens(ring):
    return Tokens(ring)


def test_uuid7_is_of_version_7_and_variant_10_and_begins_with_the_milliseconds():
    before = time.time_ns() // 1_000_000
    made = uuid7()
    after = time.time_ns() // 1_000_000
    assert (made.version, made.variant) == (7, uuid.RFC_4122)
    assert before <= made.int >> 80 <= after


def test_a_token_has_the_documented_form(tokens, ring):
    instance = uuid7()
    text = tokens.issue(instance).reveal()
    assert text.startswith("wkn_")
    assert "=" not in text
    raw = base64.urlsafe_b64decode(text[4:] + "=")
    assert len(raw) == 80
    assert raw[:16] == instance.bytes
    assert raw[48:] == hmac.digest(ring.current.value.reveal(), raw[:48], "sha256")


def test_a_token_resolves_to_its_instance(tokens):
    instance = uuid7()
    assert tokens.resolve(tokens.issue(instance)) == (instance, True, "full")
    assert tokens.resolve(tokens.issue(instance, "read-only")) == (instance, True, "read-only")


def test_a_read_only_token_looks_like_any_other_and_is_signed_with_a_key_derived_from_the_token_key(tokens, ring):
    instance = uuid7()
    text = tokens.issue(instance, "read-only").reveal()
    assert len(text) == len(tokens.issue(instance).reveal())
    raw = base64.urlsafe_b64decode(text[4:] + "=")
    assert raw[:16] == instance.bytes
    derived = hmac.digest(ring.current.value.reveal(), b"mayfly read-only token", "sha256")
    assert raw[48:] == hmac.digest(derived, raw[:48], "sha256")


def test_neither_kind_of_token_can_be_made_into_the_other_without_a_key(tokens):
    instance = uuid7()
    full, read_only = (
        base64.urlsafe_b64decode(tokens.issue(instance, access).reveal()[4:] + "=") for access in ("full", "read-only")
    )
    for head, nonce, mac in itertools.product((full, read_only), repeat=3):
        text = "wkn_" + base64.urlsafe_b64encode(head[:16] + nonce[16:48] + mac[48:]).decode().rstrip("=")
        found = tokens.resolve(Secret(text))
        if nonce is mac:
            assert found == (instance, True, "full" if mac is full else "read-only")
        else:
            assert found[1:] == (False, "read-only")


def test_two_tokens_of_one_instance_differ(tokens):
    instance = uuid7()
    assert tokens.issue(instance).reveal() != tokens.issue(instance).reveal()


def test_W8_every_changed_bit_of_a_token_fails(tokens):
    raw = base64.urlsafe_b64decode(tokens.issue(uuid7()).reveal()[4:] + "=")
    for bit in range(80 * 8):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        text = "wkn_" + base64.urlsafe_b64encode(flipped).decode().rstrip("=")
        assert tokens.resolve(Secret(text))[1] is False


def test_a_token_in_any_other_spelling_fails(tokens):
    text = tokens.issue(uuid7()).reveal()
    alphabet = string.ascii_uppercase + string.ascii_lowercase + string.digits + "-_"
    # The last character carries two spare bits: three other characters decode to the same bytes.
    last = alphabet.index(text[-1])
    same_bytes = [text[:-1] + alphabet[last ^ spare] for spare in (1, 2, 3)]
    for spelling in [
        *same_bytes,
        text + "=",
        text + " ",
        " " + text,
        text.replace("wkn_", "WKN_"),
        text[4:],
        text[:-1],
        "",
        "wkn_",
    ]:
        assert tokens.resolve(Secret(spelling))[1] is False, spelling


def test_the_standard_alphabet_is_not_accepted_for_the_url_safe_one(tokens):
    for _ in range(50):
        text = tokens.issue(uuid7()).reveal()
        standard = "wkn_" + text[4:].replace("-", "+").replace("_", "/")
        if standard != text:
            assert tokens.resolve(Secret(standard))[1] is False
            return
    pytest.fail("fifty tokens without - or _")


@given(st.text(max_size=200))
def test_no_text_makes_a_token_fail_otherwise_than_by_a_stranger_id(tmp_path_factory, text):
    ring = KeyRing(FileSource(tmp_path_factory.mktemp("k") / "keys"), 86_400)
    ring.open()
    instance, verified, access = Tokens(ring).resolve(Secret(text))
    assert verified is False
    assert access == "read-only"
    assert instance.version == 7


def test_a_failed_token_names_another_random_instance_each_time(tokens):
    bad = Secret("wkn_" + "A" * 107)
    assert tokens.resolve(bad)[0] != tokens.resolve(bad)[0]


@pytest.mark.parametrize("kind", ["good", "read-only", "forged", "malformed", "previous"])
def test_four_digests_are_computed_and_compared_for_every_token(tokens, ring, monkeypatch, kind):
    text = tokens.issue(uuid7()).reveal()
    if kind == "previous":
        ring._take(Stored(Key.fresh(time.time()), ring.current), math.inf)
    shared = tokens.issue(uuid7(), "read-only").reveal()
    presented = {"forged": "wkn_" + "A" * 107, "malformed": "x", "read-only": shared}.get(kind, text)
    digests, comparisons = [], []
    real_mac, real_compare = module._mac, hmac.compare_digest
    monkeypatch.setattr(module, "_mac", lambda *a: digests.append(a) or real_mac(*a))
    monkeypatch.setattr(module.hmac, "compare_digest", lambda *a: comparisons.append(a) or real_compare(*a))
    tokens.resolve(Secret(presented))
    assert (len(digests), len(comparisons)) == (4, 4)


@pytest.mark.parametrize("access", ["full", "read-only"])
def test_a_token_outlives_one_rotation_and_not_two(tmp_path, access):
    now = [1000.0]
    ring = KeyRing(FileSource(tmp_path / "keys"), 100, clock=lambda: now[0], since_boot=lambda: now[0])
    ring.open()
    tokens, instance = Tokens(ring), uuid7()
    token = tokens.issue(instance, access)
    now[0] += 160
    assert ring.rotate_if_due()
    now[0] += 30
    assert not ring.rotate_if_due()
    assert tokens.resolve(token) == (instance, True, access)
    now[0] += 160
    assert ring.rotate_if_due()
    assert tokens.resolve(token)[1] is False


def test_a_secret_cannot_be_printed_compared_hashed_or_pickled():
    secret = Secret("wkn_hidden")
    for shown in (repr(secret), str(secret), f"{secret}", f"{[secret]}", "%s" % secret):  # noqa: UP031
        assert "hidden" not in shown
    with pytest.raises(TypeError):
        secret == "wkn_hidden"  # noqa: B015
    with pytest.raises(TypeError):
        hash(secret)
    with pytest.raises(TypeError):
        pickle.dumps(secret)

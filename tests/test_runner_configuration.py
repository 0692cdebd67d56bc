"""The one variable that a runner reads."""

from __future__ import annotations

import json

import pytest

from runner.configuration import Configuration, ConfigurationError

from .runner_database import CONFIGURATION, CONFIGURATION_KEYS


def changed(**changes) -> str:
    return json.dumps({**CONFIGURATION_KEYS, **changes})


def test_every_key_is_read():
    assert CONFIGURATION.deadline_ms == 2000
    assert CONFIGURATION.sqlite_limits["LENGTH"] == 300_000


def test_a_journal_of_every_page_of_a_full_database_fits_under_the_same_quota():
    pages = CONFIGURATION.max_pages
    assert pages == 2539
    assert pages * (4096 + 8) + 64 * 1024 <= CONFIGURATION.instance_bytes


@pytest.mark.parametrize("key", CONFIGURATION_KEYS)
def test_a_missing_key_is_refused(key):
    with pytest.raises(ConfigurationError, match=key):
        Configuration.parse(json.dumps({name: value for name, value in CONFIGURATION_KEYS.items() if name != key}))


@pytest.mark.parametrize("limit", CONFIGURATION_KEYS["sqlite_limits"])
def test_a_missing_limit_is_refused(limit):
    limits = {name: value for name, value in CONFIGURATION_KEYS["sqlite_limits"].items() if name != limit}
    with pytest.raises(ConfigurationError, match=limit):
        Configuration.parse(changed(sqlite_limits=limits))


@pytest.mark.parametrize("key", [key for key in CONFIGURATION_KEYS if key != "sqlite_limits"])
@pytest.mark.parametrize("value", [-1, 1.0, "1", True, None, 2**31, []])
def test_a_value_of_another_type_or_range_is_refused(key, value):
    with pytest.raises(ConfigurationError, match=key):
        Configuration.parse(changed(**{key: value}))


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "[]",
        "null",
        "{",
        changed(more=1),
        changed(sqlite_limits=[]),
        changed(sqlite_limits={**CONFIGURATION_KEYS["sqlite_limits"], "LENGHT": 1}),
        changed(sqlite_limits={**CONFIGURATION_KEYS["sqlite_limits"], "LENGTH": -1}),
        changed(sqlite_limits={**CONFIGURATION_KEYS["sqlite_limits"], "LENGTH": "1"}),
        changed().replace('"nofile": 64', '"nofile": 64, "nofile": 65'),
    ],
)
def test_another_form_is_refused(text):
    with pytest.raises(ConfigurationError):
        Configuration.parse(text)


def test_limits_that_only_newer_builds_have_may_be_given():
    assert Configuration.parse(changed(sqlite_limits={**CONFIGURATION_KEYS["sqlite_limits"], "SCHEMA": 500, "TRIGGER_STEPS": 200}))

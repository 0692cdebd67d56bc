"""Settings come from MAYFLY_* variables, and the operator's table says what the code says."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from gateway.settings import PREFIX, Settings, SettingsError

OPERATIONS = Path(__file__).resolve().parent.parent / "docs" / "operations.md"


def documented_rows() -> list[tuple[str, str, str]]:
    rows = re.findall(r"^\| `(MAYFLY_\w+)` \| (.*?) \| (.*?) \|$", OPERATIONS.read_text(), re.MULTILINE)
    return [(name, default.strip("`"), text) for name, default, text in rows]


def test_M15_the_documented_table_equals_the_code():
    wanted = [(PREFIX + item.name.upper(), str(item.default), item.metadata["help"]) for item in fields(Settings)]
    assert documented_rows() == wanted


def test_an_empty_environment_gives_the_defaults():
    assert Settings.from_environment({"PATH": "/bin"}) == Settings()


def test_values_are_read_with_their_type():
    settings = Settings.from_environment({"MAYFLY_TTL_SECONDS": "5", "MAYFLY_STATE_DIR": "/x", "MAYFLY_DEADLINE_SECONDS": "0.5"})
    assert (settings.ttl_seconds, settings.state_dir, settings.deadline_seconds) == (5, Path("/x"), 0.5)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("MAYFLY_TLL_SECONDS", "5", "is not a setting"),
        ("MAYFLY_TTL_SECONDS", "ten", "is not a int"),
        ("MAYFLY_TTL_SECONDS", "0", "below 1"),
        ("MAYFLY_ENGINE", "podman", "not one of auto, docker, zygote"),
        ("MAYFLY_DEADLINE_SECONDS", "nan", "is not finite"),
        ("MAYFLY_DEADLINE_SECONDS", "inf", "is not finite"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(name, value, words):
    with pytest.raises(SettingsError, match=words) as caught:
        Settings.from_environment({name: value})
    assert name in str(caught.value)


@pytest.mark.parametrize("life", ["MAYFLY_TTL_SECONDS", "MAYFLY_MAX_LIFE_SECONDS"])
def test_no_instance_may_outlive_its_token(life):
    at_most = {"MAYFLY_KEY_ROTATION_SECONDS": "7200", "MAYFLY_TTL_SECONDS": "7200", "MAYFLY_MAX_LIFE_SECONDS": "7200"}
    assert Settings.from_environment(at_most).max_life_seconds == 7200
    with pytest.raises(SettingsError, match=f"MAYFLY_KEY_ROTATION_SECONDS=7200 is below {life}=7201"):
        Settings.from_environment(at_most | {life: "7201"})


def test_an_address_may_have_half_of_what_it_may_make_unless_the_settings_say_otherwise():
    assert Settings().most_instances_per_address == 50
    assert Settings(rate_creates_per_minute=0).most_instances_per_address == 0
    assert Settings(rate_creates_per_minute=0, instances_per_address=7).most_instances_per_address == 7
    assert Settings(instances_per_address=0).most_instances_per_address == 0


def test_the_sqlite_limits_carry_sqlites_names():
    assert Settings().sqlite_limits["VDBE_OP"] == 100_000
    assert Settings().sqlite_limits["LIKE_PATTERN_LENGTH"] == 100

"""Weeks of rotation by clocks that move by hand, over a real folder and over Secrets Manager as moto's server plays it."""

from __future__ import annotations

import itertools
import random
import secrets

import pytest

from gateway.web.keys import FileSource, KeyRing
from gateway.web.keys.secrets_manager import SecretsManagerSource

from .keys_time import AHEAD, DAY, LOOK, PERIOD, TTL, YEAR, Clock, Fleet


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture(params=["file", "aws"])
def fleet(request, clock, tmp_path):
    """Two gateways, not yet started."""
    if request.param == "file":
        return Fleet(clock, lambda: FileSource(tmp_path / "keys"), 2)
    settings = request.getfixturevalue("aws").settings(key_source="aws", key_secret=f"weeks/{secrets.token_hex(8)}")
    return Fleet(clock, lambda: SecretsManagerSource(settings), 2)


def once_a_day(rotations: list[float]) -> bool:
    return all(PERIOD <= after - before <= PERIOD + LOOK for before, after in itertools.pairwise(rotations))


def test_in_nine_days_a_key_is_replaced_once_a_day_and_tokens_last_one_cycle_to_two(fleet):
    fleet.start_all()
    fleet.run(9 * DAY, fleet.tokens_last_between_one_cycle_and_two)
    assert len(fleet.rotations) == 8
    assert once_a_day(fleet.rotations)


@pytest.mark.parametrize("seed", range(2))
def test_restarts_at_random_instants_change_none_of_that(fleet, seed):
    chance = random.Random(seed)
    fleet.start_all()
    begin = fleet.clock.boot
    while fleet.clock.boot < begin + 8 * DAY:
        # Half of them around rotations, where there is something to lose.
        fleet.run(
            chance.choice([chance.uniform(1, DAY), chance.uniform(1, 2 * AHEAD)]), fleet.tokens_last_between_one_cycle_and_two
        )
        fleet.restart(chance.randrange(2))
    assert 7 <= len(fleet.by_key) <= 10


@pytest.mark.parametrize("seed", range(2))
def test_a_running_gateway_is_indifferent_to_a_clock_that_jumps(fleet, seed):
    chance = random.Random(seed)
    fleet.start_all()
    for _ in range(12):
        fleet.run(chance.choice([chance.uniform(1, DAY), chance.uniform(1, AHEAD)]), fleet.tokens_last_between_one_cycle_and_two)
        fleet.clock.jump(chance.choice([DAY, -DAY, YEAR, -YEAR, 1.5 * DAY, -3600, 3600]))
    fleet.run(3 * DAY, fleet.tokens_last_between_one_cycle_and_two)
    assert len(fleet.rotations) >= 3
    assert once_a_day(fleet.rotations)


@pytest.mark.parametrize("jump", [DAY, -DAY, YEAR, -YEAR])
def test_a_jump_and_its_correction_cost_no_live_token_though_gateways_restart_between(fleet, jump):
    fleet.start_all()
    fleet.run(1.5 * DAY)
    for _ in range(2):
        fleet.clock.jump(jump)
        fleet.restart(0)
        fleet.run(4 * TTL)
        fleet.clock.jump(-jump)
        fleet.restart(1)
        fleet.run(4 * TTL)
    fleet.run(2 * DAY)
    fleet.run(PERIOD, fleet.tokens_last_between_one_cycle_and_two)


def test_a_key_made_in_the_future_is_replaced_though_its_gateway_restarts_every_day(fleet):
    fleet.clock.jump(YEAR)
    fleet.start_all()
    fleet.clock.jump(-YEAR)
    key = fleet.gateways[0].ring.current.value.reveal()
    for _ in range(2):
        fleet.run(0.9 * DAY)
        fleet.restart(0)
        fleet.restart(1)
    assert fleet.gateways[0].ring.current.value.reveal() != key


@pytest.mark.parametrize("stop", [DAY, 7 * DAY, YEAR])
def test_after_a_stop_the_last_key_is_replaced_at_once_and_the_one_before_it_is_forgotten(fleet, stop):
    fleet.start_all()
    fleet.run(1.2 * DAY)
    older, newest = fleet.by_key.values()
    fleet.gateways.clear()
    fleet.clock.pass_by(stop)
    fleet.start_all()
    assert (fleet.accepts(older), fleet.accepts(newest)) == ({False}, {True})
    fleet.run(2.5 * DAY, fleet.tokens_last_between_one_cycle_and_two)
    assert fleet.accepts(newest) == {False}
    assert len(fleet.rotations[1:]) == 2


def test_a_new_key_signs_nowhere_before_every_gateway_knows_it(fleet):
    fleet.start_all()
    first, second = fleet.gateways
    fleet.run(PERIOD - 1)
    key = first.ring.current.value.reveal()
    fleet.clock.pass_by(1)
    assert first.ring.rotate_if_due()
    new = first.ring.previous.value.reveal()
    assert first.ring.current.value.reveal() == key
    # The other gateway's look is due within a minute; until then it knows nothing, and needs to know nothing.
    fleet.clock.pass_by(LOOK)
    assert not first.ring.rotate_if_due()
    assert second.ring.current.value.reveal() == key
    assert not second.ring.rotate_if_due()
    assert second.ring.previous.value.reveal() == new
    fleet.clock.pass_by(AHEAD - LOOK)
    first.ring.rotate_if_due()
    second.ring.rotate_if_due()
    assert first.ring.current.value.reveal() == new
    assert first.ring.previous.value.reveal() == key
    assert second.ring.current.value.reveal() == key
    assert second.ring.previous.value.reveal() == new


def test_without_the_wait_another_gateway_refuses_the_first_tokens_of_a_new_key(fleet, monkeypatch):
    """The control of the fleets above."""
    monkeypatch.setattr("gateway.web.keys.ring._LOOKS_AHEAD", 0)
    fleet.start_all()
    with pytest.raises(AssertionError, match="refused"):
        fleet.run(PERIOD + LOOK)


def test_rotation_by_the_wall_clock_would_lose_live_tokens(fleet, monkeypatch):
    """The control of the jumps above."""
    fleet.start_all()
    for gateway in fleet.gateways:
        monkeypatch.setattr(gateway.ring, "_since_boot", lambda: fleet.clock.wall)
        gateway.ring._published_at = fleet.clock.wall
    fleet.run(2 * PERIOD)
    one = fleet.issued[-1]
    for _ in range(2):
        fleet.clock.jump(YEAR)
        for gateway in fleet.gateways:
            gateway.ring.rotate_if_due()
    assert fleet.accepts(one) == {False}


def test_a_gateway_that_starts_while_a_key_is_published_ahead_does_not_sign_with_it(fleet):
    fleet.start_all()
    fleet.run(PERIOD)
    assert len(fleet.rotations) == 1
    late = KeyRing(fleet.source(), DAY, lambda: fleet.clock.wall, lambda: fleet.clock.boot)
    late.open()
    assert late.current.value.reveal() == fleet.gateways[0].ring.current.value.reveal()
    assert late.previous.value.reveal() == fleet.gateways[0].ring.previous.value.reveal()

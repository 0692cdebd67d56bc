"""Room and loans: bounded for all, for each address by a seventh of what it leaves free, and given back whatever happens."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.web.errors import OverloadedError
from gateway.web.room import Room

NEAR, FAR = "192.0.2.1", "192.0.2.2"


def test_an_address_takes_no_more_than_a_seventh_of_what_it_leaves_free():
    room = Room(6400)
    with room.loan(NEAR) as first, room.loan(NEAR) as second, room.loan(FAR) as third:
        first.take(700)
        with pytest.raises(OverloadedError):
            second.take(101)
        second.take(100)
        with pytest.raises(OverloadedError):
            third.take(701)
        third.take(700)
        assert (room.free, room.held(NEAR), room.held(FAR), second.size) == (4900, 800, 700, 100)
    assert (room.free, room.held(NEAR), room.held(FAR)) == (6400, 0, 0)


@pytest.mark.parametrize("floods", [1, 3, 20])
def test_however_many_flood_each_leaves_room_for_a_newcomer(floods):
    room = Room(1_000_000)
    for number in range(floods):
        loan = room.loan(f"192.0.2.{number}")
        with contextlib.suppress(OverloadedError):
            while True:
                loan.take(100)
    with room.loan(FAR.replace("192", "193")) as newcomer:
        newcomer.take(room.free // 8)
    assert room.free > 1_000_000 * (7 / 8) ** floods * 0.99
    assert room.free == 1_000_000 - sum(room.held(f"192.0.2.{number}") for number in range(floods))


def test_all_of_a_64_are_one_address():
    room = Room(1000)
    room.loan("2001:db8::1").take(100)
    with pytest.raises(OverloadedError):
        room.loan("2001:db8::2").take(50)


def test_a_loan_that_is_over_gets_nothing_and_holds_nothing():
    room = Room(1000, share=1)
    with room.loan(NEAR) as loan:
        loan.hold(300)
        loan.hold(100)
        assert (loan.size, room.free) == (100, 900)
        with pytest.raises(ValueError, match="101 bytes of 100"):
            loan.give_back(101)
    assert (loan.size, room.free) == (0, 1000)
    with pytest.raises(OverloadedError):
        loan.take(1)


@given(st.lists(st.tuples(st.sampled_from([NEAR, FAR]), st.integers(0, 400)), max_size=30))
def test_in_any_order_what_is_held_and_what_is_free_are_all_there_is(holds):
    room = Room(1000, share=1)
    loans = {address: room.loan(address) for address in (NEAR, FAR)}
    for address, size in holds:
        before = loans[address].size
        try:
            loans[address].hold(size)
        except OverloadedError:
            assert loans[address].size == before < size
        assert room.free + sum(loan.size for loan in loans.values()) == 1000
        assert room.free >= 0
    for loan in loans.values():
        loan.hold(0)
    assert room.free == 1000
    assert not room._held

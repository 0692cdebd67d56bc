"""Which bytes of a file are sent: the decision against a plain reading of RFC 9110, and by hand where that has a choice."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.web.ranges import Beyond, Decision, Part, Unchanged, Whole, decide

TAG = '"' + "ab" * 32 + '"'
OTHER = '"' + "cd" * 32 + '"'


def decision(size: int, *, ranges: list[str] | None = None, if_range: list[str] | None = None, none_match: list[str] | None = None):
    return decide(size, TAG, if_none_match=none_match or [], if_range=if_range or [], ranges=ranges or [])


def reference(size: int, spec: tuple[int | None, int | None]) -> Decision:
    """One range over a list of positions: those that it names are selected one by one."""
    first, last = spec
    positions = range(size)
    if first is None:
        selected = positions[-last:] if last else positions[:0]
        if last and not size:
            return Whole()
    elif last is not None and last < first:
        return Whole()
    else:
        selected = [position for position in positions if position >= first and (last is None or position <= last)]
    return Part(selected[0], selected[-1]) if len(selected) else Beyond()


sizes = st.integers(0, 40)
numbers = st.integers(0, 50)
specs = st.one_of(st.tuples(numbers, numbers), st.tuples(numbers, st.none()), st.tuples(st.none(), numbers))
blank = st.sampled_from(["", " ", "\t", " \t "])


@given(sizes, specs, blank, blank, st.sampled_from(["bytes", "Bytes", "BYTES"]), st.integers(0, 30))
def test_one_range_selects_what_the_rfc_says_however_it_is_spelt(size, spec, before, after, unit, zeros):
    first, last = ("" if number is None else "0" * zeros + str(number) for number in spec)
    text = f"{unit}={before}{first}-{last}{after}"
    assert decision(size, ranges=[text]) == reference(size, spec)
    assert decision(size, ranges=[f"{text},"]) == reference(size, spec)
    assert decision(size, ranges=[text], if_range=[TAG]) == reference(size, spec)


@given(sizes, st.lists(specs, min_size=2, max_size=5), st.booleans())
def test_several_ranges_are_answered_with_the_whole_file(size, several, in_one_line):
    texts = ["".join(("" if a is None else str(a), "-", "" if b is None else str(b))) for a, b in several]
    lines = ["bytes=" + ",".join(texts)] if in_one_line else ["bytes=" + texts[0], *texts[1:]]
    assert decision(size, ranges=lines) == Whole()


@given(st.integers(0, 1 << 40), st.lists(st.text(max_size=30)), st.lists(st.text(max_size=30)), st.lists(st.text(max_size=30)))
@example(10, [], [], ["bytes=" + "9" * 8000 + "-"])
@example(10, [], [], ["bytes=-" + "9" * 8000])
@example(10, [], [], ["bytes=٣-٤"])
def test_no_header_makes_it_fail_or_leave_the_file(size, none_match, if_range, ranges):
    found = decide(size, TAG, if_none_match=none_match, if_range=if_range, ranges=ranges)
    if isinstance(found, Part):
        assert 0 <= found.first <= found.last < size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "bytes",
        "bytes=",
        "bytes=-",
        "bytes=a-b",
        "bytes=1",
        "bytes=1-2-3",
        "bytes=+1-2",
        "bytes=1 -2",
        "items=0-1",
        "0-1",
        "bytes=5-4",
    ],
)
def test_what_is_no_range_is_as_if_it_were_not_there(text):
    assert decision(10, ranges=[text]) == Whole()


@pytest.mark.parametrize(
    ("lines", "same"),
    [
        ([TAG], True),
        (["W/" + TAG], True),
        (["*"], True),
        ([" * "], True),
        ([f"{OTHER}, {TAG}"], True),
        ([OTHER, TAG], True),
        (['"a,b", ' + TAG], True),
        ([OTHER], False),
        ([TAG[1:-1]], False),
        (["**"], False),
        ([TAG.upper()], False),
        ([""], False),
    ],
)
def test_if_none_match_is_compared_weakly_and_goes_before_every_range(lines, same):
    assert (decision(10, none_match=lines) == Unchanged()) is same
    assert (decision(10, none_match=lines, ranges=["bytes=0-1"]) == Unchanged()) is same


@pytest.mark.parametrize("lines", [[OTHER], ["W/" + TAG], ["Sun, 22 Nov 2026 00:00:00 GMT"], [TAG, TAG], [""]])
def test_if_range_that_is_not_this_file_by_strong_comparison_gives_all_of_it(lines):
    assert decision(10, ranges=["bytes=0-1"], if_range=lines) == Whole()
    assert decision(10, ranges=["bytes=99-"], if_range=lines) == Whole()

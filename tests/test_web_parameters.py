"""Queries, headers and the body of /batch: what is read, what is refused with a hint, and that nothing else ever happens."""

from __future__ import annotations

import json
from urllib.parse import quote, urlencode

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

import runner.bulk
from gateway.web import batch, parameters
from gateway.web.body import MAX_ARGUMENTS
from gateway.web.errors import BadParameterError, CallerError, InvalidArgsError, InvalidJsonError, MissingSqlError
from gateway.web.parameters import idempotency_key, on_damage_header, read_import, read_on_damage, read_query, wants_lines

# ── queries


def test_an_import_is_read_with_all_its_parameters():
    columns = [("column", "id:integer"), ("column", "a:b:TEXT"), ("column", "plain")]
    raw = urlencode([("table", "t ä"), ("format", "csv"), ("header", "no"), ("delimiter", ";"), ("null", ""), *columns])
    assert read_import(raw, "") == {
        "table": "t ä",
        "format": "csv",
        "columns": [("id", "INTEGER"), ("a:b", "TEXT"), ("plain", None)],
        "header": False,
        "delimiter": ";",
        "null": "",
    }


@pytest.mark.parametrize(
    ("kind", "written"), [("text/csv", "csv"), ("application/json", "json"), ("application/x-ndjson", "ndjson")]
)
def test_the_format_of_an_import_is_that_of_its_content_type_unless_it_is_named(kind, written):
    assert read_import("table=t", kind)["format"] == written
    assert read_import(f"table=t&format={written}", kind)["format"] == written
    assert read_import(f"table=t&format={written}", "application/octet-stream")["format"] == written
    plain = read_import(f"table=t&format={written}", "")
    assert (plain["columns"], plain["header"], plain["delimiter"], plain["null"]) == (None, True, ",", None)


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        ("", ""),
        ("format=csv", ""),
        ("table=&format=csv", ""),
        ("table=t", ""),
        ("table=t", "application/octet-stream"),
        ("table=t&format=xml", ""),
        ("table=t&format=CSV", ""),
        ("table=t&format=json", "text/csv"),
        ("table=t&format=json&header=no", ""),
        ("table=t&format=ndjson&null=", ""),
        ("table=t&format=json&delimiter=,", ""),
        ("table=t&format=csv&header=maybe", ""),
        ("table=t&format=csv&delimiter=", ""),
        ("table=t&format=csv&delimiter=%22", ""),
        ("table=t&format=csv&delimiter=%0A", ""),
        ("table=t&format=csv&delimiter=ab", ""),
        ("table=t&table=u&format=csv", ""),
        ("table=t&format=csv&x=1", ""),
        ("table=t&format=csv&Table=1", ""),
        ("table=t&format=csv&column=a:VARCHAR", ""),
        ("table=t&format=csv&column=:TEXT", ""),
        ("table=t&format=csv&column=", ""),
        ("table=t%00&format=csv", ""),
        ("table=" + "t" * 256 + "&format=csv", ""),
        ("table=t&format=csv" + "&column=a" * 101, ""),
        ("table=t&format=csv&" + "&".join("x" * 3 for _ in range(3)), ""),
        ("table=%ff&format=csv", ""),
        ("table=%zz&format=csv", ""),
        ("table=ä&format=csv", ""),
        ("table=t&format=csv&", ""),
    ],
)
def test_an_import_that_is_not_of_the_documented_form_is_refused(raw, kind):
    with pytest.raises(BadParameterError) as refused:
        read_import(raw, kind)
    assert refused.value.message.removeprefix("invalid parameter: ")


@given(st.text(), st.text(max_size=20))
def test_no_query_makes_anything_fail_otherwise(raw, kind):
    for read in (lambda: read_import(raw, kind), lambda: read_on_damage(raw), lambda: read_query(raw)):
        try:
            read()
        except BadParameterError as error:
            error.body("0" * 32)


@given(
    st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1, max_size=50),
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1, max_size=20),
            st.sampled_from(parameters.IMPORT_COLUMN_TYPES),
        ),
        max_size=5,
    ),
)
def test_every_name_of_a_table_or_column_comes_through(table, columns):
    raw = "&".join(
        [f"table={quote(table, safe='')}", "format=csv", *(f"column={quote(':'.join(pair), safe='')}" for pair in columns)]
    )
    assert read_import(raw, "")["table"] == table
    assert read_import(raw, "")["columns"] == (columns or None)


def test_the_types_of_columns_are_those_of_the_runner():
    assert tuple(parameters.IMPORT_COLUMN_TYPES) == tuple(runner.bulk.TYPES)


def test_a_route_without_parameters_takes_none():
    assert read_query("") == {}
    with pytest.raises(BadParameterError, match="bad_parameter"):
        read_query("x=1")


def test_on_damage_is_one_of_two_words_once():
    assert read_on_damage("") is None
    assert read_on_damage("on_damage=salvage") == "salvage"
    for raw in ("on_damage=", "on_damage=Strict", "on_damage=strict&on_damage=strict", "on_damage"):
        with pytest.raises(BadParameterError):
            read_on_damage(raw)


# ── headers


def headers(*pairs: tuple[str, str]) -> CIMultiDict[str]:
    return CIMultiDict(pairs)


def test_the_mode_of_damage_is_read_where_an_instance_is_made_and_refused_elsewhere():
    named = headers(("x-mayfly-on-damage", " salvage "))
    assert on_damage_header(named, creates=True) == "salvage"
    assert on_damage_header(headers(), creates=False) is None
    for faulty in (named, headers(("X-Mayfly-On-Damage", "never"))):
        with pytest.raises(BadParameterError):
            on_damage_header(faulty, creates=False)
    for faulty in (headers(("X-Mayfly-On-Damage", "never")), headers(*[("X-Mayfly-On-Damage", "strict")] * 2)):
        with pytest.raises(BadParameterError):
            on_damage_header(faulty, creates=True)


def test_an_idempotency_key_is_1_to_255_visible_ascii_characters():
    assert idempotency_key(headers()) is None
    for key in ("a", "!~", "x" * 255):
        assert idempotency_key(headers(("Idempotency-Key", key))) == key
    for key in ("", " ", "a b", "ä", "x" * 256, "a\x7f"):
        with pytest.raises(BadParameterError):
            idempotency_key(headers(("Idempotency-Key", key)))
    with pytest.raises(BadParameterError):
        idempotency_key(headers(("Idempotency-Key", "a"), ("Idempotency-Key", "a")))


@pytest.mark.parametrize(
    ("accept", "wants"),
    [
        ([], False),
        (["*/*"], False),
        (["application/json"], False),
        (["application/x-ndjson"], True),
        (["Application/X-NDJSON; charset=utf-8"], True),
        (["application/json;q=0.5, application/x-ndjson;q=0.9"], True),
        (["text/html", "application/x-ndjson"], True),
        (["application/x-ndjson;q=0"], False),
        (["application/x-ndjson; q=0.000"], False),
        (["application/x-ndjsonp"], False),
    ],
)
def test_lines_are_sent_to_who_names_them(accept, wants):
    assert wants_lines(accept) is wants


# ── the body of /batch


def body(*statements: object, **more: object) -> bytes:
    return json.dumps({"statements": statements, **more}).encode()


def test_a_batch_is_read_with_arguments_and_conditions():
    read = batch.parse(body({"sql": "A", "args": [1, {"$blob": "AA=="}]}, {"sql": "B", "if": "changed"}, int64="string"))
    assert msgspec.to_builtins(read) == {
        "steps": [{"sql": "A", "args": [1, {"$blob": "AA=="}], "if": None}, {"sql": "B", "args": None, "if": "changed"}],
        "int64": "string",
    }


@pytest.mark.parametrize(
    ("raw", "error", "statement"),
    [
        (b"{", InvalidJsonError, None),
        (b"[]", InvalidJsonError, None),
        (b"{}", InvalidJsonError, None),
        (body(), InvalidJsonError, None),
        (body(*[{"sql": "A"}] * 1001), InvalidJsonError, None),
        (body({"sql": "A"}, x=1), InvalidJsonError, None),
        (body({"sql": "A", "x": 1}), InvalidJsonError, None),
        (body({"sql": "A"}, int64="hex"), InvalidJsonError, None),
        (body({"sql": "A"}, {"sql": "B", "if": "maybe"}), InvalidJsonError, None),
        (body({"sql": "A", "if": "changed"}), InvalidJsonError, 0),
        (body({"sql": "A"}, {}), MissingSqlError, 1),
        (body({"sql": "A"}, {"sql": " "}), MissingSqlError, 1),
        (body({"sql": 7}), MissingSqlError, 0),
        (body({"sql": "A"}, {"sql": "B", "args": [[1]]}), InvalidArgsError, 1),
        (body({"sql": "A", "args": [{"$int": "x"}]}), InvalidArgsError, 0),
        (body(*[{"sql": "A", "args": [1] * (MAX_ARGUMENTS // 2)}] * 2, {"sql": "B", "args": [1]}), InvalidArgsError, 2),
        (b'{"statements":' + b"[" * 500_000, InvalidJsonError, None),
        (b'{"statements":[{"sql":"\xff"}]}', InvalidJsonError, None),
    ],
)
def test_a_faulty_batch_is_refused_with_the_statement_at_fault(raw, error, statement):
    with pytest.raises(error) as refused:
        batch.parse(raw)
    assert refused.value.hint
    assert refused.value.extra.get("statement") == statement


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["sql", "args", "if", "$int", "x"]), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(
    st.binary(max_size=100)
    | st.builds(
        lambda some, int64: json.dumps({"statements": some, "int64": int64}).encode(),
        st.lists(json_values, max_size=4),
        st.sampled_from(["number", "string", 1]),
    )
)
def test_no_body_makes_the_parser_of_batches_fail_otherwise(raw):
    try:
        batch.parse(raw)
    except CallerError as error:
        error.body("0" * 32)

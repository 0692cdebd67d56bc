"""Import: what an upload is read as, value by value, and that a refused one leaves nothing behind."""

from __future__ import annotations

import csv
import io
import json
import math
import tracemalloc
from pathlib import Path
from time import monotonic

import apsw
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.bulk import ImportOrder, load
from runner.database import open_database
from runner.wire import ImportInvalidError, RowEncoder, Verdict, VerdictError

from .runner_database import CONFIGURATION, TenantDatabase
from .sealed_process import run_sealed, seal

LIMITS = CONFIGURATION.sqlite_limits


@pytest.fixture
def connection(tmp_path):
    """A tenant's, with its authorizer and limits."""
    tenant = TenantDatabase(tmp_path)
    database = open_database(tenant.configuration, lambda: False, str(tenant.path))
    yield database.connection
    database.close()


def take(connection, upload, format="csv", *, expired=lambda: False, **order):
    upload = upload if isinstance(upload, bytes) else upload.encode()
    return load(connection, upload, ImportOrder(order.pop("table", "t"), format, **order), LIMITS, expired)


def rows(connection, table="t"):
    return [list(row) for row in connection.execute(f'SELECT * FROM "{table}" ORDER BY rowid')]


def refusal(connection, upload, format="csv", **order):
    """Line and message; the schema and every row are what they were."""
    before = contents(connection)
    with pytest.raises(ImportInvalidError) as refused:
        take(connection, upload, format, **order)
    assert contents(connection) == before
    assert not connection.in_transaction
    return refused.value.line, refused.value.message


def contents(connection):
    tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
    return {name: rows(connection, name) for name in tables}


# ── CSV ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_csv_is_read_as_rfc_4180_says(connection, end):
    lines = ["id,name,note", '1,"a,b","two', 'lines"', '2,"say ""hi""",', "3,naïve 🦋,' '"]
    loaded = take(connection, "\ufeff" + end.join(lines) + end)
    assert (loaded.table, loaded.created, loaded.rows) == ("t", True, 3)
    assert loaded.columns == [("id", "INTEGER"), ("name", "TEXT"), ("note", "TEXT")]
    assert rows(connection) == [[1, "a,b", f"two{end}lines"], [2, 'say "hi"', None], [3, "naïve 🦋", "' '"]]


def test_the_last_line_of_csv_needs_no_end(connection):
    take(connection, 'a,b\n1,"x"')
    assert rows(connection) == [[1, "x"]]


def test_an_empty_field_is_null_and_quotes_make_it_an_empty_text(connection):
    take(connection, 'a,b\n,""\nNULL,x\n')
    assert rows(connection) == [[None, ""], ["NULL", "x"]]


def test_a_given_text_means_null_unless_it_is_quoted(connection):
    take(connection, 'a,b\n\\N,"\\N"\n,x\n', null="\\N")
    assert rows(connection) == [[None, "\\N"], ["", "x"]]


def test_a_header_is_no_row_and_has_no_nulls(connection):
    assert take(connection, "a,NULL,\n1,2,3\n", null="NULL").columns == [("a", "INTEGER"), ("NULL", "INTEGER"), ("", "INTEGER")]


@pytest.mark.parametrize("delimiter", [";", "\t", "|", " ", "^", "]", "\\", "-", "·", "🦋"])
def test_any_character_can_be_the_delimiter(connection, delimiter):
    take(connection, f'a{delimiter}b\n1{delimiter}"x{delimiter},"\n2{delimiter}y\n', delimiter=delimiter)
    assert rows(connection) == [[1, f"x{delimiter},"], [2, "y"]]


def test_without_a_header_columns_have_the_names_given_or_numbers(connection):
    assert take(connection, "1,x\n", header=False).columns == [("column1", "INTEGER"), ("column2", "TEXT")]
    given_names = [("n", None), ("v", "INTEGER")]
    assert take(connection, "1,x\n", header=False, table="u", columns=given_names).columns == [("n", "INTEGER"), ("v", "INTEGER")]
    assert rows(connection, "u") == [[1, "x"]]


def test_a_header_alone_makes_an_empty_table(connection):
    loaded = take(connection, "a,b\n", columns=[("B", "text")])
    assert (loaded.created, loaded.columns, loaded.rows) == (True, [("a", ""), ("b", "TEXT")], 0)


@pytest.mark.parametrize(
    ("upload", "line", "message"),
    [
        ("a,b\n1,2\n3\n", 3, "1 value, and there are 2 columns"),
        ("a,b\n1,2\n\n", 3, "1 value, and there are 2 columns"),
        ('a,b\n1,"\n\n"\n1,2,3\n', 5, "3 values, and there are 2 columns"),
        ('a,b\n1,2\n3,"x\n\n', 3, "a quoted field that does not end"),
        ('a,b\n1,2\n3,"x" \n', 3, "a quote in a field"),
        ('a,b\n3,5" pipe 6" \n', 2, "a quote in a field"),
        (b"a,b\n1,2\n3,\0\n", 3, "NUL"),
        (b'a,b\n1,2\n3,"\n\xff"\n', 3, "not UTF-8"),
        (b"a,b\n1,2\n3,\xed\xa0\x80\n", 3, "not UTF-8"),
        ("a,b,A\n1,2,3\n", 1, "column A is there twice"),
        ("", 1, "no header"),
        ("a\n" + "x" * 300_001, 2, "too big"),
        (",".join(f"c{number}" for number in range(101)), 1, "more than 100 columns"),
    ],
)
def test_csv_that_is_none_is_refused_by_the_line_where_the_record_begins(connection, upload, line, message):
    found, said = refusal(connection, upload)
    assert found == line
    assert message in said


TYPED = {
    "INTEGER": [["0", "-1", "9223372036854775807", "-9223372036854775808"], ["5", ""]],
    "REAL": [["1.5", "-2.50", "3", "1e300", "5e-324", "0.1"], ["1.0", "2"], ["0.30000000000000004"], ["1E5"]],
    "TEXT": [
        *(
            [text]
            for text in ("007", "+1", " 1", "1 ", "9223372036854775808", "-0", ".5", "5.", "0x10", "1e999", "inf", "nan", "1_0")
        ),
        ["0.1000000000000000055"],  # more than a float can tell
        ["9007199254740993", "0.5"],
        ["1", "x"],
        ["１"],
    ],
    "": [["-0.0", "2.5"], [""]],
}


@pytest.mark.parametrize(("kind", "texts"), [(kind, texts) for kind, columns in TYPED.items() for texts in columns])
def test_a_column_of_csv_has_the_type_that_changes_no_value(connection, kind, texts):
    assert take(connection, "a,b\n" + "".join(f"{text},x\n" for text in texts)).columns[0] == ("a", kind)
    for (found, _), text in zip(rows(connection), texts, strict=True):
        if not text:
            assert found is None
        elif kind == "INTEGER":
            assert str(found) == text
        elif kind == "TEXT":
            assert found == text
        else:
            assert type(found) is float
            assert (found, math.copysign(1, found)) == (float(text), math.copysign(1, float(text)))


def test_D2_a_type_is_inferred_from_all_rows(connection):
    upload = "a,b,c\n" + "1,1,1\n" * 2000 + "x,2.5,7\n"
    assert take(connection, upload).columns == [("a", "TEXT"), ("b", "REAL"), ("c", "INTEGER")]
    assert rows(connection)[0] == ["1", 1.0, 1]


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8) | st.sampled_from(
    ['"', ",", "\r", "\n", "\r\n", "12"]
)


@given(st.integers(1, 4).flatmap(lambda width: st.lists(st.lists(TEXT | st.none(), min_size=width, max_size=width), min_size=1)))
def test_what_python_writes_as_csv_comes_back(table):
    text = io.StringIO()
    for row in table:
        fields = io.StringIO()
        csv.writer(fields, quoting=csv.QUOTE_ALL, lineterminator="").writerow(["" if value is None else value for value in row])
        parts = ["" if value is None else f'"{value.replace(chr(34), chr(34) * 2)}"' for value in row]
        assert None in row or fields.getvalue() == ",".join(parts)
        text.write(",".join(parts) + "\r\n")
    connection = apsw.Connection(":memory:")
    columns = [(f"c{place}", "TEXT") for place in range(len(table[0]))]
    take(connection, text.getvalue(), header=False, columns=columns)
    assert rows(connection) == table


# ── JSON and NDJSON ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_json_objects_are_rows_by_name(connection):
    upload = '[{"a": 1, "b": "x"},\n {"B": null, "c": true},\n {}]'
    loaded = take(connection, upload, "json")
    assert loaded.columns == [("a", "INTEGER"), ("b", "TEXT"), ("c", "INTEGER")]
    assert rows(connection) == [[1, "x", None], [None, None, 1], [None, None, None]]


def test_json_arrays_are_rows_by_position(connection):
    assert take(connection, "[[1, 2.5, null], [2, 3.5, null]]", "json").columns == [
        ("column1", "INTEGER"),
        ("column2", "REAL"),
        ("column3", ""),
    ]
    take(connection, " [ ] ", "json", table="u", columns=[("a", "TEXT"), ("b", None)])
    assert take(connection, '[["x", 1]]', "json", table="u", columns=[("b", None), ("a", None)]).columns == [
        ("a", "TEXT"),
        ("b", ""),
    ]
    assert rows(connection, "u") == [["1", "x"]]


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        ("true", 1),
        ("false", 0),
        ("9223372036854775807", 2**63 - 1),
        ('{"$int": "-9223372036854775808"}', -(2**63)),
        ('{"$real": "-Infinity"}', -math.inf),
        ('{"$text": "YQ=="}', "a"),
        ('{"$blob": "AAH/"}', b"\x00\x01\xff"),
        (r'"a\u0000\ud83e\udd8b"', "a\0🦋"),
        ('{"b": [1, {"c": null}], "a": "ü"}', '{"b":[1,{"c":null}],"a":"ü"}'),
        ("[1,2.5,18446744073709551616]", "[1,2.5,18446744073709551616]"),
        ('{"$oid": "5"}', '{"$oid":"5"}'),
    ],
)
def test_each_json_value_has_one_meaning(connection, value, stored):
    for format, upload in (("json", f'[{{"a": {value}}}]'), ("ndjson", f'{{"a": {value}}}\n')):
        take(connection, upload, format, table=format)
        ((found,),) = rows(connection, format)
        assert (type(found), found) == (type(stored), stored)


@pytest.mark.parametrize("value", ["9223372036854775808", "1e999", r'"\ud800"', "NaN", "[1e999]", r'["\udfff"]', '{"$int": 5}',
    '{"$blob": "AAH"}', '{"$real": "0"}', '{"a": 1, "a": 2}', "1" * 5000, "[" * 100_000, "nul", "01", "'x'"])  # fmt: skip
def test_a_value_that_json_or_sqlite_has_not_is_refused_by_its_line(connection, value):
    assert refusal(connection, f'[\n{{"a": 1}},\n{{"a": {value}}}]', "json")[0] == 3
    assert refusal(connection, f'{{"a": 1}}\n\n{{"a": {value}}}', "ndjson")[0] == 3


@pytest.mark.parametrize(
    ("upload", "line"),
    [
        ("", 1),
        ("{}", 1),
        ('[{"a": 1}\n', 2),
        ('[{"a": 1}\n {"a": 2}]', 2),
        ('[{"a": 1},\n]', 2),
        ('[{"a": 1}]\n[]', 2),
        ('[{"a": 1},\n[1]]', 2),
        ("[\n5]", 2),
        ('[{"a": 1},\n\n{"a": 1, "A": 2}]', 3),
        ('[{"a": 1},\n{"a\\u0000": 1}]', 2),
        (b'[{"a": 1},\n{"a": "\xff"}]', 2),
        (b'[{"a": 1},\n{"a": [{"b": "\xff"}]}]', 2),
        (b'[{"a": 1},\n{"\xff": 1}]', 2),
        (b'[{"a": 1},\n{"a": 1}\xff]', 2),
        (b'[{"a": 1},\n{"a": "\0"}]', 2),
        ('[{"a": 1},\n{"a": {"$text": "\u00e9"}}]', 2),
        ("[[1],\n[1, 2]]", 2),
    ],
)
def test_json_that_is_no_array_of_rows_is_refused_by_its_line(connection, upload, line):
    assert refusal(connection, upload, "json")[0] == line


def test_a_row_of_json_may_be_longer_than_what_is_read_at_a_time(connection):
    values = ["x" * length for length in (70_000, 65_536, 1, 200_000, 131_071)]
    take(connection, json.dumps([[value] for value in values], indent=3), "json")
    assert rows(connection) == [[value] for value in values]


def test_minus_zero_keeps_its_sign(connection):
    assert take(connection, "[[-0.0], [1.5]]", "json").columns == [("column1", "")]
    assert str(rows(connection)) == "[[-0.0], [1.5]]"


def answer(columns, table, complete=True, count=None):
    encoder = RowEncoder(1 << 20, False)
    lines = [json.dumps({"columns": columns}).encode(), *(encoder.encode(row) for row in table)]
    trailer = {"complete": complete, "rows": len(table) if count is None else count, "rows_affected": 0}
    return b"\n".join([*lines, json.dumps(trailer).encode()]) + b"\n"


VALUES = (
    st.none()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"), max_size=5)
    | st.binary(max_size=5)
)


@settings(max_examples=200)
@given(st.integers(1, 3).flatmap(lambda width: st.lists(st.lists(VALUES, min_size=width, max_size=width), max_size=6)))
def test_every_value_that_an_answer_can_hold_comes_back_from_it(table):
    connection = apsw.Connection(":memory:")
    columns = [f"c{place}" for place in range(len(table[0]) if table else 1)]
    assert take(connection, answer(columns, table), "ndjson").rows == len(table)
    assert [[(type(value), repr(value)) for value in row] for row in rows(connection)] == [
        [(type(value), repr(value)) for value in row] for row in table
    ]


@pytest.mark.parametrize(
    "upload",
    [
        answer(["a"], [[1]], complete=False),
        answer(["a"], [[1]], count=2),
        answer(["a"], [[1]]).rsplit(b"\n", 2)[0],
        answer(["a"], [[1]]) + b"[2]\n",
        answer(["a"], [[1, 2]]),
        answer(["a", "A"], [[1, 2]]),
        answer(["a", None], []),
        b'{"columns":["a"]}\n{"a":1}\n',
        b'{"columns":["a"]}\n5\n',
        b"",
    ],
)
def test_an_answer_that_is_not_whole_is_refused(connection, upload):
    refusal(connection, upload, "ndjson")


# ── Tables that exist ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_rows_go_into_a_table_that_exists_by_name_and_the_rest_has_its_default(connection):
    connection.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, Name TEXT, n REAL DEFAULT 7, g AS (n * 2))")
    loaded = take(connection, "name,ID\nx,5\n")
    assert (loaded.created, loaded.columns) == (False, [("id", "INTEGER"), ("Name", "TEXT"), ("n", "REAL")])
    take(connection, '[{"name": "y", "n": 1}, {"name": "z"}, {}]', "json")
    assert rows(connection) == [[5, "x", 7.0, 14.0], [6, "y", 1.0, 2.0], [7, "z", 7.0, 14.0], [8, None, 7.0, 14.0]]
    take(connection, "9,w,0.5\n", header=False)
    take(connection, "v\n", header=False, columns=[("name", None)])
    assert rows(connection)[4:] == [[9, "w", 0.5, 1.0], [10, "v", 7.0, 14.0]]


@pytest.mark.parametrize(
    ("upload", "line", "message"),
    [
        ('n,a\n1,"\n"\n1,\n', 4, "NOT NULL constraint failed: t.a"),
        ("n,a\n5,x\n6,y\n5,z\n", 4, "UNIQUE constraint failed: t.n"),
        ("n,a\n" + "".join(f"{number},x\n" for number in range(1001)) + "x,y\n", 1003, "cannot store TEXT value in INTEGER column"),
        ("n,other\n1,2\n", 1, "the table has no column other"),
        ("n,a\n,x\n1\n", 3, "1 value"),
    ],
)
def test_a_row_that_the_table_does_not_take_is_refused_by_its_line(connection, upload, line, message):
    connection.execute("CREATE TABLE t(n INTEGER UNIQUE, a TEXT NOT NULL) STRICT; INSERT INTO t VALUES (-1, 'before')")
    found, said = refusal(connection, upload)
    assert found == line
    assert message in said


def test_a_constraint_that_rolls_back_by_itself_leaves_nothing_either(connection):
    connection.execute("CREATE TABLE t(a UNIQUE ON CONFLICT ROLLBACK)")
    assert refusal(connection, "a\n1\n1\n") == (3, "UNIQUE constraint failed: t.a")


def test_fts_tables_and_views_with_triggers_take_rows_as_from_any_insert(connection):
    connection.execute("""
        CREATE VIRTUAL TABLE f USING fts5(x, y);
        CREATE TABLE base(a); CREATE VIEW v AS SELECT a AS b FROM base;
        CREATE TRIGGER r INSTEAD OF INSERT ON v BEGIN INSERT INTO base VALUES (new.b * 2); END;
    """)
    assert take(connection, "y,x\none,two words\n", table="f").columns == [("x", ""), ("y", "")]
    take(connection, '[{"b": 4}]', "json", table="v")
    assert connection.execute("SELECT y FROM f('words')").get == "one"
    assert connection.execute("SELECT a FROM base").get == 8


@pytest.mark.parametrize(
    ("table", "column"), [("sqlite_new", "a"), ("sqlite_schema", "name"), ("json_each", "key"), ("v", "a"), ("i", "a")]
)
def test_a_name_that_no_rows_can_go_to_is_refused_in_the_words_of_sqlite(connection, table, column):
    connection.execute("CREATE TABLE base(a); CREATE VIEW v AS SELECT a FROM base; CREATE INDEX i ON base(a)")
    before = contents(connection)
    with pytest.raises(apsw.SQLError):
        take(connection, f"{column}\n1\n", table=table)
    assert contents(connection) == before
    assert not connection.in_transaction


@pytest.mark.parametrize("name", ['a"; DROP TABLE t; --', "select", "", " ", "ü", "a.b", "[x]", "`"])
def test_any_name_of_a_table_or_column_is_only_a_name(connection, name):
    header = '"' + name.replace('"', '""') + '"'
    assert take(connection, f"{header},b\n1,2\n", table=name or "t").columns == [(name, "INTEGER"), ("b", "INTEGER")]
    assert rows(connection, (name or "t").replace('"', '""')) == [[1, 2]]


def test_an_action_that_the_authorizer_refuses_is_refused_inside_of_a_trigger_too(connection):
    connection.execute("CREATE TABLE t(a); CREATE TRIGGER r AFTER INSERT ON t BEGIN SELECT load_extension(new.a); END")
    with pytest.raises(apsw.Error):
        take(connection, "a\n1\n")
    assert rows(connection) == []


# ── The order, and time ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "order",
    [
        {"delimiter": '"'},
        {"delimiter": "\n"},
        {"delimiter": "\0"},
        {"delimiter": ",,"},
        {"delimiter": ""},
        {"null": "a,b"},
        {"null": 'a"'},
        {"format": "xml"},
        {"columns": []},
        {"columns": [("a", "TEXT"), ("A", None)]},
        {"columns": [("a", "TEXT); DROP TABLE t; --")]},
        {"columns": [("other", "TEXT")]},
        {"columns": [("a\0", "TEXT")]},
        {"table": "t\0"},
        {"table": "\udcff"},
    ],
)
def test_an_order_without_sense_is_refused(connection, order):
    assert refusal(connection, "a,b\n1,2\n", **order)[0] is None


@pytest.mark.parametrize("polls", [0, 1, 7, 12])
def test_D2_an_import_that_runs_out_of_time_leaves_nothing(connection, polls):
    left = iter([False] * polls)
    with pytest.raises(VerdictError) as timeout:
        take(connection, "a\n" + "1\n" * 4000, expired=lambda: next(left, True))
    assert timeout.value.verdict is Verdict.TIMEOUT
    assert contents(connection) == {}
    assert not connection.in_transaction


@pytest.mark.parametrize(
    ("format", "upload"),
    [
        ("csv", b'a,b\n1,"' + b"\n" * 3_000_000),
        ("csv", b"a,b\n" + b'"' * 3_000_000),
        ("csv", b"a\n" + b'"x"",' * 600_000),
        ("csv", b"a\n" + b'"",' * 1_000_000),
        ("csv", b"," * 3_000_000),
        ("json", b"[" + b" " * 3_000_000),
        ("json", b'[["' + b"x" * 3_000_000),
        ("ndjson", b'[["' + b"\n" * 3_000_000),
    ],
)
def test_the_time_taken_is_linear_in_what_is_refused(connection, format, upload):
    def seconds(size):
        begin = monotonic()
        refusal(connection, upload[:size], format)
        return monotonic() - begin

    short = min(seconds(len(upload) // 8) for _ in range(2))
    assert seconds(len(upload)) < 8 * 4 * short + 0.5  # a quadratic one would take 64 times as long


def peak_bytes(task):
    tracemalloc.start()
    try:
        task()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_an_upload_is_never_in_memory_as_text_as_a_whole_nor_a_record_that_is_too_wide_as_fields(connection):
    for wide in (b"," * 1_000_000, b'"",' * 333_333):
        assert peak_bytes(lambda wide=wide: refusal(connection, wide)) < 4 * len(wide)  # as fields, 8 to 20 times
    upload = ("a,b\n" + "x,🦋 and some more text\n" * 40_000).encode()
    assert peak_bytes(lambda: take(connection, upload)) < len(upload)


PIECES = st.sampled_from(
    ['"', '""', ",", "\n", "\r\n", "\r", "a", "1", "-0.0", "9" * 20, "1e5", "é", "\0", "[", "]", "{", "}", ":", " "]
)
PIECES |= st.sampled_from(
    ['"a":', "null", '{"$blob":"AA=="}', '{"$int":"5"}', '{"columns":["a"]}\n', '{"complete":true,"rows":0}', "1e999"]
)


@settings(max_examples=500)
@given(
    st.lists(PIECES, max_size=12).map("".join) | st.binary(max_size=12), st.sampled_from(["csv", "json", "ndjson"]), st.booleans()
)
def test_D2_whatever_is_uploaded_is_loaded_whole_or_refused_as_invalid(upload, format, header):
    connection = apsw.Connection(":memory:")
    loaded = line = None
    try:
        loaded = take(connection, upload, format, header=header)
    except ImportInvalidError as refused:
        line = refused.line
    assert not connection.in_transaction
    if loaded is None:
        assert contents(connection) == {}
        assert line is None or 1 <= line <= len(upload) + 1
    else:
        assert len(rows(connection)) == loaded.rows


def import_sealed(folder):
    tenant = TenantDatabase(Path(folder))
    seal(tenant)
    database = open_database(tenant.configuration, lambda: False, str(tenant.path))
    uploads = {"csv": 'a,b\n1,"ü\n"\n', "json": '[{"a": 1, "b": [2.5, "🦋"]}]', "ndjson": '[1,{"$blob":"/w=="}]\n'}
    for format, upload in uploads.items():
        take(database.connection, upload, format, table=format)
        print(rows(database.connection, format), flush=True)
    try:
        take(database.connection, "[[1", "json")
    except ImportInvalidError as refused:
        print(refused.message, flush=True)


def test_an_import_takes_no_file_and_no_system_call_that_a_runner_lacks(tmp_path):
    assert run_sealed(__name__, "import_sealed", tmp_path) == [
        str([[1, "ü\n"]]),
        str([[1, '[2.5,"🦋"]']]),
        str([[1, b"\xff"]]),
        "not JSON",
    ]

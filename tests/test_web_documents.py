"""docs/api.md and openapi.json say what the code does."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import get_type_hints

import msgspec
import pytest

import gateway
import runner.rows
import runner.wire
from gateway.settings import Settings
from gateway.web import access_log, batch, body, connection, dialogue, errors, handlers, openapi, parameters, replays, room, server
from gateway.web.errors import ApiError, BadParameterError, CallerError, ServiceError, leaves, table
from gateway.web.middleware import COMMON_HEADERS
from gateway.web.parameters import read_import
from gateway.web.routes import PATHS, ROUTES
from gateway.web.runner import Report

REPO = Path(__file__).parent.parent
API = (REPO / "docs" / "api.md").read_text()
DOCUMENT = msgspec.json.decode(openapi.DOCUMENT)


def test_the_documented_errors_are_the_errors():
    documented = re.findall(r"^\| (\d{3}) \| `([a-z_]+)` \| `([^`]+)` \| (.*?) \| (yes|no) \|$", API, re.MULTILINE)
    written = [
        (str(row.status), row.code, row.text, row.when.replace("|", "\\|"), "yes" if row.retry_after else "no") for row in table()
    ]
    assert documented == written


def test_every_code_is_unique_and_on_one_branch():
    codes = [row.code for row in table()]
    assert len(codes) == len(set(codes))
    for cls in leaves():
        assert issubclass(cls, CallerError) != issubclass(cls, ServiceError)
        assert (cls.status in (500, 503)) == issubclass(cls, ServiceError), cls


def test_an_error_without_a_code_cannot_be_raised_by_name():
    assert {row.code for row in table()} == {cls.code for cls in leaves()}
    assert not hasattr(ApiError, "code")


def test_openapi_knows_every_code_and_every_status():
    assert DOCUMENT["openapi"].startswith("3.1")
    assert DOCUMENT["components"]["schemas"]["Error"]["properties"]["code"]["enum"] == [row.code for row in table()]
    responses = DOCUMENT["components"]["responses"]
    assert set(responses) == {str(row.status) for row in table()}
    for route in (route for route in ROUTES if "X-Walkin-Session" in route.headers and route.method != "HEAD"):
        answers = DOCUMENT["paths"][route.path][route.method.lower()]["responses"]
        assert set(answers) >= set(responses)
        assert all(answers[status] == {"$ref": f"#/components/responses/{status}"} for status in responses)
    for row in table():
        response = responses[str(row.status)]
        assert f"`{row.code}` · `{row.text}`: {row.when}" in response["description"]
        assert not row.retry_after or "Retry-After" in response["headers"]


def test_every_reference_of_openapi_resolves():
    references = set(re.findall(r"#/components/schemas/(\w+)", openapi.DOCUMENT.decode()))
    assert references == set(DOCUMENT["components"]["schemas"]) - {"Unused"}


def test_every_route_is_in_both_documents():
    assert set(DOCUMENT["paths"]) == set(PATHS)
    for path, operations in DOCUMENT["paths"].items():
        methods = {route.method.lower() for route in ROUTES if route.path == path}
        # HEAD is spelt out where it is more than GET without a body.
        assert set(operations) | {"head"} == methods | {"head"}
        assert path in API


def test_every_operation_names_the_headers_that_its_route_takes():
    for route in ROUTES:
        operation = DOCUMENT["paths"][route.path].get(route.method.lower(), {"parameters": []})
        named = {parameter["name"] for parameter in operation.get("parameters", ()) if parameter["in"] == "header"}
        assert named <= set(route.headers), route.path
        if route.method not in ("HEAD",):
            assert set(route.headers) - named <= {"Accept", "Content-Type"}, route.path
        for name in route.headers:
            assert name in ("Accept", "Content-Type") or f"`{name}`" in API


def test_the_documented_parameters_of_an_import_are_those_that_are_read():
    documented = {
        parameter["name"] for parameter in DOCUMENT["paths"]["/import"]["post"]["parameters"] if parameter["in"] == "query"
    }
    assert documented == {"table", "format", "column", "header", "delimiter", "null"}
    for name in documented:
        assert f"| `{name}` |" in API
    with pytest.raises(BadParameterError) as refused:
        read_import("x=1", "")
    assert all(name in refused.value.message for name in documented)


FIXED = {
    "seconds asked for by `POST /extend`": handlers.MAX_EXTENSION_SECONDS,
    "request line, and each header": server.MAX_LINE_BYTES,
    "request line and all headers": connection.MAX_HEADER_BYTES,
    "headers of a request": server.MAX_HEADERS,
    "parameters of a query": parameters.MAX_FIELDS,
    "bodies that arrive or wait, all together": room.ROOM_BYTES,
    "requests that wait on a connection": connection.MAX_PIPELINED,
    "nesting of arguments, columns and rows": 1,
    "arguments of a request": body.MAX_ARGUMENTS,
    "statements of a batch": batch.MAX_STATEMENTS,
    "characters of an `Idempotency-Key`": parameters.MAX_KEY_CHARS,
    "answers kept for them, all together": replays.REPLAY_BYTES,
    "characters of the name of a table or column to import": parameters.MAX_NAME_CHARS,
    "columns named in an import's query": parameters.MAX_IMPORT_COLUMNS,
    "bytes of a pattern of `REGEXP`": 1000,
    "rows in lines that are sent at once": dialogue.FRAME_BYTES,
    "whole reply of a runner: rows, schema, report": Settings().max_reply_frame_bytes,
    "answers under way, all together": room.ANSWERS_BYTES,
    "findings of a report": 100,
    "characters of an error's text or hint": errors.MAX_DETAIL_CHARS,
    "characters of a user agent in the log": access_log.USER_AGENT_CHARS,
}


def test_the_documented_limits_are_those_of_the_code():
    rows = re.findall(r"^\| (.*?) \| `([\d.]+)`[^|]*\| (`MAYFLY_[A-Z_]+`|fixed) \| (.*?) \|$", API, re.MULTILINE)
    assert len(rows) > 30
    defaults, fixed = Settings(), {}
    for what, value, setting, checked_by in rows:
        assert set(checked_by.split(", ")) <= {"web", "runner", "launcher"}
        if setting == "fixed":
            fixed[what] = int(value)
        else:
            assert float(value) == float(getattr(defaults, setting.strip("`").removeprefix("MAYFLY_").lower())), what
    assert fixed == FIXED


def test_the_bounds_that_both_sides_check_are_the_same_on_both():
    assert get_type_hints(Report, include_extras=True)["findings"].__metadata__[0].max_length == 100
    assert runner.wire._MOST_STEPS == batch.MAX_STATEMENTS
    assert runner.rows._MOST_BYTES == dialogue.FRAME_BYTES


def test_every_exposed_header_is_documented():
    for name in COMMON_HEADERS["Access-Control-Expose-Headers"].split(", "):
        assert f"`{name}`" in API, name


def test_the_version_is_the_projects():
    assert tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["version"] == gateway.__version__

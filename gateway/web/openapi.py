"""GET /openapi.json: OpenAPI 3.1, built from the error table and the constants of the parsers, so that they cannot differ."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, get_args, get_type_hints

import msgspec

from .. import __version__
from .batch import MAX_STATEMENTS
from .errors import Row, table
from .parameters import IMPORT_COLUMN_TYPES, MAX_IMPORT_COLUMNS, MAX_KEY_CHARS, MAX_NAME_CHARS
from .runner import Finding

_Object = dict[str, Any]

_STRING: _Object = {"type": "string"}
_INTEGER: _Object = {"type": "integer"}


def _tag(name: str, what: str, **more: Any) -> _Object:
    return {
        "type": "object",
        "properties": {name: {"type": "string", "description": what, **more}},
        "required": [name],
        "additionalProperties": False,
    }


_ROW_TAGS = [
    _tag("$real", "A REAL that is not finite.", enum=["Infinity", "-Infinity"]),
    _tag("$text", "Base64 of TEXT that is not valid UTF-8.", contentEncoding="base64"),
    _tag("$blob", "Base64 of a BLOB.", contentEncoding="base64"),
]
_PLAIN: list[_Object] = [{"type": "null"}, {"type": "integer", "format": "int64"}, {"type": "number"}, _STRING]

_FINDING_CODES: tuple[str, ...] = get_args(get_type_hints(Finding)["code"])
_BOOLEAN: _Object = {"type": "boolean"}
_TOKEN: _Object = {"type": "string", "pattern": "^wkn_[A-Za-z0-9_-]{107}$"}
_DIGEST: _Object = {"type": "string", "pattern": "^[0-9a-f]{64}$"}


def _ref(schema: str) -> _Object:
    return {"$ref": f"#/components/schemas/{schema}"}


def _array(items: _Object, **more: Any) -> _Object:
    return {"type": "array", "items": items, **more}


def _nullable(schema: _Object) -> _Object:
    return {"anyOf": [schema, {"type": "null"}]}


def _closed(required: _Object, optional: _Object | None = None, **more: Any) -> _Object:
    """An object of exactly these keys."""
    properties = {**required, **(optional or {})}
    return {"type": "object", "required": [*required], "additionalProperties": False, "properties": properties, **more}


_ARGS: _Object = {
    "description": "Values for `?` by position, or for `:name`, `@name`, `$name` by name without the prefix.",
    "oneOf": [_array(_ref("Argument")), {"type": "object", "additionalProperties": _ref("Argument")}, {"type": "null"}],
}
_INT64: _Object = {
    "type": "string",
    "enum": ["number", "string"],
    "default": "number",
    "description": "How INTEGER values are written in rows.",
}


def _schemas(rows: tuple[Row, ...]) -> _Object:
    sql = {"type": "string", "minLength": 1, "description": "One statement, or several separated by `;`."}
    return {
        "Value": {"description": "A value of a row; docs/api.md has the table.", "oneOf": [{"anyOf": _PLAIN}, *_ROW_TAGS]},
        "Argument": {
            "description": "A value for a parameter.",
            "oneOf": [
                {"anyOf": [*_PLAIN, {"type": "boolean"}]},
                *_ROW_TAGS,
                _tag("$int", "A 64-bit integer in decimal.", pattern="^-?[0-9]{1,19}$"),
            ],
        },
        "Request": _closed({"sql": sql}, {"args": _ARGS, "int64": _INT64}),
        "Result": _closed(
            {"rows_affected": _INTEGER},
            {
                "columns": _array(_STRING),
                "rows": _array(_array(_ref("Value"))),
                "truncated": {"const": True, "description": "Present when rows were cut."},
            },
            dependentRequired={"columns": ["rows"], "rows": ["columns"], "truncated": ["rows"]},
        ),
        "Batch": _closed(
            {"statements": _array(_ref("Statement"), minItems=1, maxItems=MAX_STATEMENTS)},
            {"int64": _INT64},
        ),
        "Statement": _closed(
            {"sql": sql},
            {
                "args": _ARGS,
                "if": {
                    "description": "What must be true of the statement before; otherwise this one is skipped. Not in the first.",
                    "enum": ["changed", "unchanged", "rows", "no_rows", None],
                },
            },
        ),
        "BatchResult": _closed({"results": _array({"oneOf": [_ref("Result"), _closed({"skipped": {"const": True}})]})}),
        "Head": {
            "description": "The first line.",
            **_closed({"columns": _nullable(_array(_STRING))}),
        },
        "Trailer": {
            "description": "The last line: whether all rows came, and if not, why.",
            **_closed(
                {"complete": _BOOLEAN, "rows": _INTEGER, "rows_affected": _INTEGER},
                {"reason": {"type": "string", "enum": ["timeout", "bytes", "error", "failed"]}, "message": _STRING},
            ),
        },
        "Line": {"oneOf": [_ref("Head"), _array(_ref("Value")), _ref("Trailer")]},
        "Schema": _closed(
            {
                "tables": _array(
                    _closed(
                        {
                            "name": _STRING,
                            "kind": {"type": "string", "enum": ["table", "virtual", "shadow"]},
                            "strict": _BOOLEAN,
                            "without_rowid": _BOOLEAN,
                            "rows": _nullable(_INTEGER),
                            "columns": _array(
                                _closed(
                                    {
                                        "name": _STRING,
                                        "type": _STRING,
                                        "not_null": _BOOLEAN,
                                        "default": _nullable(_STRING),
                                        "primary_key": {**_INTEGER, "description": "Place in the primary key; 0 if in none."},
                                        "hidden": {**_BOOLEAN, "description": "Hidden or generated."},
                                    }
                                )
                            ),
                        }
                    )
                ),
                "indexes": _array(
                    _closed(
                        {
                            "name": _STRING,
                            "table": _STRING,
                            "unique": _BOOLEAN,
                            "origin": {"type": "string", "enum": ["c", "u", "pk"]},
                            "partial": _BOOLEAN,
                            "columns": _array(_nullable(_STRING)),
                        }
                    )
                ),
                "views": _array(_closed({"name": _STRING})),
                "triggers": _array(_closed({"name": _STRING, "table": _STRING})),
                "page_bytes": _INTEGER,
                "used_bytes": _INTEGER,
                "free_bytes": _INTEGER,
            }
        ),
        "Imported": _closed(
            {
                "table": _STRING,
                "created": _BOOLEAN,
                "columns": _array({"type": "array", "prefixItems": [_STRING, _STRING], "minItems": 2, "maxItems": 2}),
                "rows": _INTEGER,
            }
        ),
        "Taken": _closed(
            {
                "size": _INTEGER,
                "sha256": _DIGEST,
                "converted": _array({"type": "string", "enum": ["journal_mode", "page_size"]}),
            },
            {"report": _ref("Report")},
        ),
        "Report": _closed(
            {
                "kind": {"type": "string", "enum": ["verify", "salvage"]},
                "ok": _BOOLEAN,
                "size": _INTEGER,
                "sha256": _DIGEST,
                "page_size": _nullable(_INTEGER),
                "pages": _nullable(_INTEGER),
                "findings": _array(
                    _closed(
                        {
                            "code": {"type": "string", "enum": [*_FINDING_CODES]},
                            "page": _nullable(_INTEGER),
                            "object": _nullable(_STRING),
                            "message": _STRING,
                        }
                    ),
                    maxItems=100,
                ),
                "more_findings": _BOOLEAN,
                "tables": _array(_closed({"name": _STRING, "kept": _INTEGER, "lost": _INTEGER, "lost_is_exact": _BOOLEAN})),
                "unassigned": _INTEGER,
                "objects_lost": _array(_closed({"type": _STRING, "name": _STRING})),
            }
        ),
        "Salvaged": _closed({"report": _ref("Report")}),
        "Forked": _closed({}),
        "Shared": _closed({"session": _TOKEN, "access": {"const": "read-only"}}),
        "Extension": _closed({}, {"seconds": _nullable({"type": "integer", "minimum": 1})}),
        "Extended": _closed({"expires_at": {**_INTEGER, "description": "Unix second."}}),
        "Error": _closed(
            {
                "error": {"type": "string", "description": "Short text."},
                "code": {"type": "string", "enum": [row.code for row in rows]},
                "request_id": {"type": "string", "pattern": "^[0-9a-f]{32}$"},
            },
            {
                "hint": {"type": "string", "description": "What to change."},
                "statement": {**_INTEGER, "description": "Of a batch, from 0."},
                "line": {**_nullable(_INTEGER), "description": "Of an import, from 1."},
                "report": {**_ref("Report"), "description": "Of damage."},
            },
        ),
        "Health": {
            "type": "object",
            "required": ["status", "version"],
            "properties": {
                "status": {"type": "string", "enum": ["ok", "unavailable"]},
                "version": _STRING,
                "engine": _STRING,
                "engine_choice": {"type": "string", "description": "Why this engine: set, or what `auto` found."},
                "separation": {"type": "boolean", "description": "Whether web and launcher run under two users."},
                "reason": {"type": "string", "description": "An error code, when unavailable."},
            },
        },
    }


def _json(schema: str) -> _Object:
    return {"application/json": {"schema": _ref(schema)}}


_BYTES: _Object = {"schema": {"type": "string", "format": "binary"}}
_FILE: _Object = {"application/vnd.sqlite3": _BYTES}
_UPLOAD: _Object = {**_FILE, "application/x-sqlite3": _BYTES, "application/octet-stream": _BYTES}


def _header(description: str, schema: _Object = _STRING) -> _Object:
    return {"description": description, "schema": schema}


def _parameter(place: str, name: str, description: str, schema: _Object = _STRING, required: bool = False) -> _Object:
    return {"name": name, "in": place, "required": required, "description": description, "schema": schema}


_SESSION = _parameter("header", "X-Walkin-Session", "The token of an earlier answer; without it a new instance is made.", _TOKEN)
_OWN_SESSION = _parameter("header", "X-Walkin-Session", "The token of an earlier answer.", _TOKEN, required=True)
_MODE: _Object = {"type": "string", "enum": ["strict", "salvage"]}
_ON_DAMAGE = _parameter("header", "X-Mayfly-On-Damage", "Of a new instance: what is done when it is found damaged.", _MODE)
_KEY = _parameter(
    "header",
    "Idempotency-Key",
    "With a session: the request runs once, however often it is sent.",
    {"type": "string", "pattern": f"^[!-~]{{1,{MAX_KEY_CHARS}}}$"},
)
_NAME: _Object = {"type": "string", "minLength": 1, "maxLength": MAX_NAME_CHARS}
_IMPORT = (
    _parameter("query", "table", "The table, which is made if it is not there.", _NAME, required=True),
    _parameter("query", "format", "Unless Content-Type says it.", {"type": "string", "enum": ["csv", "json", "ndjson"]}),
    _parameter(
        "query",
        "column",
        f"`name` or `name:TYPE`, TYPE one of {', '.join(IMPORT_COLUMN_TYPES)}; once for each column.",
        _array(_STRING, maxItems=MAX_IMPORT_COLUMNS),
    ),
    _parameter("query", "header", "CSV: whether the first line has the names.", {"type": "string", "enum": ["yes", "no"]}),
    _parameter("query", "delimiter", "CSV: between fields.", {"type": "string", "minLength": 1, "maxLength": 1, "default": ","}),
    _parameter("query", "null", "CSV: the field that means NULL.", _STRING),
)
_CACHED = (
    _parameter("header", "If-None-Match", "Tags of files that the caller has."),
    _parameter("header", "Range", "One range of bytes; several are answered with the whole file."),
    _parameter("header", "If-Range", "The tag of the file that the range is of."),
)

_OF_REQUEST: _Object = {
    "X-Request-ID": _header("The id of this request."),
    "RateLimit-Limit": _header("Requests per minute and address.", _INTEGER),
    "RateLimit-Remaining": _header("Requests left in this window.", _INTEGER),
    "RateLimit-Reset": _header("Seconds until the window ends.", _INTEGER),
}
_END: _Object = {"X-Walkin-TTL": _header("The unix second at which the instance is deleted.", _INTEGER)}
_MADE: _Object = {"X-Walkin-Session": _header("The token of the instance that this call made."), **_END}
_REPLAYED: _Object = {"Idempotent-Replayed": _header("`true` on an answer that was given before.")}
_OF_FILE: _Object = {
    "ETag": _header("The SHA-256 of the file."),
    "Accept-Ranges": _header("`bytes`."),
    "Content-Disposition": _header("A file, not a page."),
}


def _error_responses(rows: tuple[Row, ...]) -> _Object:
    by_status: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        by_status[row.status].append(row)
    responses: _Object = {}
    for status, those in sorted(by_status.items()):
        headers = {"X-Request-ID": _header("The request id of the body.")}
        if any(row.retry_after for row in those):
            headers["Retry-After"] = _header("Seconds after which to try again.", _INTEGER)
        responses[str(status)] = {
            "description": "\n".join(f"* `{row.code}` · `{row.text}`: {row.when}" for row in those),
            "headers": headers,
            "content": _json("Error"),
        }
    return responses


def _answer(description: str, headers: _Object, content: _Object | None = None) -> _Object:
    return {"description": description, "headers": {**headers, **_OF_REQUEST}, **({"content": content} if content else {})}


def _operation(
    name: str,
    summary: str,
    parameters: tuple[_Object, ...],
    answers: _Object,
    statuses: Iterable[str],
    content: _Object | None = None,
    optional_body: bool = False,
) -> _Object:
    operation: _Object = {"operationId": name, "summary": summary, "parameters": [*parameters]}
    if content is not None:
        operation["requestBody"] = {"required": not optional_body, "content": content}
    operation["responses"] = {**answers, **{status: {"$ref": f"#/components/responses/{status}"} for status in statuses}}
    return operation


def _of_instances(statuses: Iterable[str]) -> _Object:
    """The routes that take a session."""
    keyed = (_SESSION, _ON_DAMAGE, _KEY)

    def operation(name: str, summary: str, parameters: tuple[_Object, ...], answers: _Object, *body: Any) -> _Object:
        return _operation(name, summary, parameters, answers, statuses, *body)

    lines = {"application/x-ndjson": {"schema": _ref("Line")}}
    taken = _json("Taken")
    file = {
        "200": _answer("The database.", {**_END, **_OF_FILE}, _FILE),
        "206": _answer("A part of it.", {**_END, **_OF_FILE, "Content-Range": _header("Which one.")}, _FILE),
        "304": _answer("The caller has it.", {**_END, "ETag": _OF_FILE["ETag"]}),
    }
    whole = {"200": _answer("What GET would answer, without the file.", {**_END, **_OF_FILE}), "304": file["304"]}
    return {
        "/sql": {
            "post": operation(
                "sql",
                "Run SQL in an instance; without a session a new instance is made.",
                keyed,
                {"200": _answer("Every statement ran.", {**_MADE, **_REPLAYED}, {**_json("Result"), **lines})},
                _json("Request"),
            )
        },
        "/batch": {
            "post": operation(
                "batch",
                "Run statements in one transaction, some of them only if the one before did what is asked for.",
                keyed,
                {"200": _answer("All that were not skipped ran.", {**_MADE, **_REPLAYED}, _json("BatchResult"))},
                _json("Batch"),
            )
        },
        "/import": {
            "post": operation(
                "import",
                "Load CSV, JSON or NDJSON into one table, all rows or none.",
                (*keyed, *_IMPORT),
                {"200": _answer("All rows are in the table.", {**_MADE, **_REPLAYED}, _json("Imported"))},
                dict.fromkeys(("text/csv", "application/json", "application/x-ndjson", "application/octet-stream"), _BYTES),
            )
        },
        "/db": {
            "get": operation("download", "The instance as a SQLite file.", (_OWN_SESSION, *_CACHED), file),
            "head": operation("look", "Its size and tag.", (_OWN_SESSION, _CACHED[0]), whole),
            "put": operation(
                "upload",
                "A SQLite file becomes a new instance, or takes the place of the session's.",
                (_SESSION, _ON_DAMAGE, _parameter("query", "on_damage", "What is done with a file that is damaged.", _MODE)),
                {
                    "200": _answer("It has taken the place of what was there.", _END, taken),
                    "201": _answer("It is a new instance.", _MADE, taken),
                },
                _UPLOAD,
            ),
        },
        "/schema": {
            "get": operation(
                "schema", "Tables, columns, indexes, room.", (_OWN_SESSION,), {"200": _answer("They.", _END, _json("Schema"))}
            )
        },
        "/fork": {
            "post": operation(
                "fork", "Copy the instance.", (_OWN_SESSION,), {"201": _answer("A new instance.", _MADE, _json("Forked"))}
            )
        },
        "/share": {
            "post": operation(
                "share",
                "A token of the same instance that can only read.",
                (_OWN_SESSION,),
                {"200": _answer("The token.", _END, _json("Shared"))},
            )
        },
        "/extend": {
            "post": operation(
                "extend",
                "Let the instance live longer.",
                (_OWN_SESSION,),
                {"200": _answer("When it ends now.", _END, _json("Extended"))},
                _json("Extension"),
                True,
            )
        },
        "/session": {
            "delete": operation("end", "Delete the instance.", (_OWN_SESSION,), {"204": _answer("It is gone.", {})}),
        },
        "/salvage": {
            "post": operation(
                "salvage",
                "Put what can be read of a damaged database in its place.",
                (_OWN_SESSION,),
                {"200": _answer("What was done; nothing, if it is not damaged.", _END, _json("Salvaged"))},
            )
        },
    }


def _readiness(operation: str, summary: str) -> _Object:
    return {
        "get": {
            "operationId": operation,
            "summary": summary,
            "responses": {
                "200": {"description": "It could.", "content": _json("Health")},
                "503": {"description": "It could not; `reason` is an error code.", "content": _json("Health")},
            },
        }
    }


def build() -> _Object:
    rows = table()
    errors = _error_responses(rows)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Mayfly",
            "version": __version__,
            "description": "A private SQLite database for anyone who can send an HTTP request, deleted after its time to live.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "paths": {
            **_of_instances(errors),
            "/healthz": _readiness("healthz", "Whether a request could be served now."),
            "/readyz": _readiness("readyz", "The same, without the report."),
            "/livez": {
                "get": {
                    "operationId": "livez",
                    "summary": "Whether the process serves at all.",
                    "responses": {"200": {"description": "It does.", "content": _json("Health")}},
                }
            },
            "/openapi.json": {
                "get": {
                    "operationId": "openapi",
                    "summary": "This document.",
                    "responses": {
                        "200": {"description": "OpenAPI 3.1.", "content": {"application/json": {"schema": {"type": "object"}}}}
                    },
                }
            },
        },
        "components": {"schemas": _schemas(rows), "responses": errors},
    }


DOCUMENT = msgspec.json.encode(build())

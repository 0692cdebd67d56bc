"""GET /openapi.json: OpenAPI 3.1, built from the error table so that the two cannot differ."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import msgspec

from .. import __version__
from .errors import Row, table

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


def _schemas(rows: tuple[Row, ...]) -> _Object:
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
        "Request": {
            "type": "object",
            "required": ["sql"],
            "additionalProperties": False,
            "properties": {
                "sql": {"type": "string", "minLength": 1, "description": "One statement, or several separated by `;`."},
                "args": {
                    "description": "Values for `?` by position, or for `:name`, `@name`, `$name` by name without the prefix.",
                    "oneOf": [
                        {"type": "array", "items": {"$ref": "#/components/schemas/Argument"}},
                        {"type": "object", "additionalProperties": {"$ref": "#/components/schemas/Argument"}},
                        {"type": "null"},
                    ],
                },
                "int64": {
                    "type": "string",
                    "enum": ["number", "string"],
                    "default": "number",
                    "description": "How INTEGER values are written in rows.",
                },
            },
        },
        "Result": {
            "type": "object",
            "required": ["rows_affected"],
            "additionalProperties": False,
            "dependentRequired": {"columns": ["rows"], "rows": ["columns"], "truncated": ["rows"]},
            "properties": {
                "columns": {"type": "array", "items": _STRING},
                "rows": {"type": "array", "items": {"type": "array", "items": {"$ref": "#/components/schemas/Value"}}},
                "rows_affected": _INTEGER,
                "truncated": {"const": True, "description": "Present when rows were cut."},
            },
        },
        "Error": {
            "type": "object",
            "required": ["error", "code", "request_id"],
            "additionalProperties": False,
            "properties": {
                "error": {"type": "string", "description": "Short text."},
                "code": {"type": "string", "enum": [row.code for row in rows]},
                "request_id": {"type": "string", "pattern": "^[0-9a-f]{32}$"},
                "hint": {"type": "string", "description": "What to change."},
            },
        },
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
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}


def _header(description: str, schema: _Object = _STRING) -> _Object:
    return {"description": description, "schema": schema}


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
            "/sql": {
                "post": {
                    "operationId": "sql",
                    "summary": "Run SQL in an instance; without a session a new instance is made.",
                    "parameters": [
                        {
                            "name": "X-Walkin-Session",
                            "in": "header",
                            "required": False,
                            "description": "The token of an earlier answer.",
                            "schema": {"type": "string", "pattern": "^wkn_[A-Za-z0-9_-]{107}$"},
                        }
                    ],
                    "requestBody": {"required": True, "content": _json("Request")},
                    "responses": {
                        "200": {
                            "description": "Every statement ran.",
                            "headers": {
                                "X-Walkin-Session": _header("The token of the instance that this call made."),
                                "X-Walkin-TTL": _header("The unix second at which the instance is deleted.", _INTEGER),
                                "X-Request-ID": _header("The id of this request."),
                                "RateLimit-Limit": _header("Requests per minute and address.", _INTEGER),
                                "RateLimit-Remaining": _header("Requests left in this window.", _INTEGER),
                                "RateLimit-Reset": _header("Seconds until the window ends.", _INTEGER),
                            },
                            "content": _json("Result"),
                        },
                        **_error_responses(rows),
                    },
                }
            },
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
        "components": {"schemas": _schemas(rows)},
    }


DOCUMENT = msgspec.json.encode(build())

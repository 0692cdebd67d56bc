"""The body of POST /batch: statements that run in one transaction, read as strictly as that of POST /sql."""

from __future__ import annotations

import msgspec

from .body import MAX_ARGUMENTS, Condition, Int64Form, Step, decoded, parse_args, parse_sql
from .errors import ApiError, InvalidArgsError, InvalidJsonError

MAX_STATEMENTS = 1_000

_FORM = '{"statements": array of {"sql": string, "args": array or object, "if": a condition}, "int64": "number" or "string"}'


class Batch(msgspec.Struct, frozen=True):
    """A batch that is in order."""

    steps: list[Step]
    int64: Int64Form


class _Statement(msgspec.Struct, forbid_unknown_fields=True):
    """As in body.py: SQL and arguments unread, so that a fault in one is told apart from a fault in another."""

    sql: msgspec.Raw = msgspec.Raw(b"")
    args: msgspec.Raw = msgspec.Raw(b"null")
    condition: Condition | None = msgspec.field(name="if", default=None)


class _Body(msgspec.Struct, forbid_unknown_fields=True):
    statements: list[_Statement]
    int64: Int64Form = "number"


_body = msgspec.json.Decoder(_Body)


def parse(raw: bytes) -> Batch:
    """Raises InvalidJsonError, MissingSqlError or InvalidArgsError with a hint; `statement` says in which one."""
    body = decoded(raw, _body, _FORM)
    if not 1 <= len(body.statements) <= MAX_STATEMENTS:
        raise InvalidJsonError(hint=f"1 to {MAX_STATEMENTS} statements")
    steps, arguments = [], 0
    for number, statement in enumerate(body.statements):
        try:
            step = Step(parse_sql(statement.sql), parse_args(statement.args), statement.condition)
            arguments += len(step.args or ())
            if arguments > MAX_ARGUMENTS:
                raise InvalidArgsError(hint=f"at most {MAX_ARGUMENTS} arguments in all statements together")
            if number == 0 and step.condition is not None:
                raise InvalidJsonError(hint='the first statement has none before it for an "if"')
        except ApiError as error:
            error.extra["statement"] = number
            raise
        steps.append(step)
    return Batch(steps, body.int64)

"""docs/security.md shows the runner's tables. `python -m tests.test_security_tables` writes it anew after a change of theirs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import apsw

from gateway.settings import Settings
from runner import child, policy, syscalls, zygote

REPO = Path(__file__).resolve().parent.parent
PAGE = REPO / "docs" / "security.md"


def names(found: Iterable[str]) -> str:
    return " ".join(f"`{name}`" for name in found)


def table(*rows: tuple[str, str]) -> str:
    head, *rest = rows
    return "\n".join(f"| {left} | {right} |" for left, right in (head, ("---", "---"), *rest))


def page() -> str:
    limits = [
        (item.name.removeprefix("limit_").upper(), item.default) for item in fields(Settings) if item.name.startswith("limit_")
    ]
    profile, slot = (json.loads((REPO / "infra" / name).read_text())["syscalls"] for name in ("seccomp.json", "seccomp-slot.json"))
    of_a_slot = [group for group in slot if group["action"] == "SCMP_ACT_ALLOW" and group not in profile]
    bounds = bounds_of_a_pattern()
    return f"""# The runner's tables

What SQL and native code can do in a runner, from the tables that the code itself reads; `tests/test_security_tables.py` keeps
this page equal.

## The authorizer

{
        table(
            ("SQLite asks for", "answer"),
            ("pragmas that may be read", names(sorted(policy.READ_PRAGMAS))),
            ("pragmas that may take an argument, which names what to look at", names(sorted(policy.ARGUMENT_PRAGMAS))),
            ("pragmas that may be set", names(sorted(policy.WRITE_PRAGMAS))),
            ("functions refused", names(sorted(policy.DENIED_FUNCTIONS))),
            ("virtual tables allowed", names(sorted(policy.MODULES))),
            ("actions allowed whatever they are about", names(sorted(actions(policy.FREE_ACTIONS)))),
            ("`ATTACH`, `DETACH`", "refused, but for the nameless database that a plain `VACUUM` attaches itself"),
            ("anything else", "refused"),
        )
    }

## The connection

{
        table(
            ("`sqlite3_db_config`", "value"),
            *(
                (f"`{apsw.mapping_db_config[flag].removeprefix('SQLITE_DBCONFIG_')}`", str(value))
                for flag, value in policy.CONFIG_FLAGS
            ),
        )
    }

{table(("`sqlite3_limit`", "default"), *((f"`{name}`", f"{value:,}") for name, value in limits))}

## Regular expressions

`x REGEXP p`, `regexp(p, x)` and `regexpi(p, x)`, which takes A–Z for a–z, are SQLite's own `ext/misc/regexp.c`, compiled into every
connection. It runs an automaton over the text, all of whose states move on together, and never goes back. `infra/patches` has what
was changed.

| bound | value | by what |
| --- | --- | --- |
| pattern | {bounds["RE_MAX_PATTERN"]:,} bytes | `RE_MAX_PATTERN`, also of how deep the compiler calls itself |
| automaton | {bounds["RE_MAX_NFA"]:,} states | `RE_MAX_NFA`, after each `X{{p,q}}` has been written out |
| work for a character | one step a state | a state is in a set once; whether it is there is one look |
| text | {dict(limits)["LENGTH"]:,} bytes | `LENGTH` |
| clock | every {
        bounds["RE_CLOCK_WORK"]:,} steps | `RE_CLOCK_WORK`: a function is one opcode, within which SQLite itself doesn't look |
| compiled patterns | one for each REGEXP of a statement, 5 kB | SQLite keeps it as auxiliary data, unless it changes with the row |

The costliest pattern on the longest text takes 0.7 s of processor time on the development machine (`./infra/bench regexp`). The
function is deterministic and innocuous: indexes, checks and generated columns may use it with `TRUSTED_SCHEMA` 0. The authorizer is
asked for it by name.

## System calls

After confinement, {
        sum(len(group.names) for group in syscalls.ALLOWED)
    } are left (fewer on architectures that lack some); each is in a group with its reason.

{table(("allowed by the runner's own filter", "reason"), *((names(group.names), group.reason) for group in syscalls.ALLOWED))}

{table(("answered EPERM", "reason"), *((names(group.names), group.reason) for group in syscalls.REFUSED))}

Any other ends the process. Arguments are checked of {names(sorted(syscalls.ARGUMENTS))}.

Before confinement the container's profile, `infra/seccomp.json`, allows these:

{table(("allowed in the container", "reason"), *((names(group["names"]), group["comment"]) for group in profile))}

Under `MAYFLY_ENGINE=zygote` the container is the zygote's slot, and `infra/seccomp-slot.json` allows these besides. A child has
them until its own filter takes them, which is before it reads a byte of the request.

{table(("allowed in a slot", "reason"), *((names(group["names"]), group["comment"]) for group in of_a_slot))}

## A zygote's child

It is cloned with every capability over namespaces of its own, and with none over anything else. These steps, in this order, stand
between that and the request: {names(name for name, _ in child.STEPS)}. Before it, once, its zygote has taken these:
{names(name for name, _ in zygote.STEPS)}. The bounding set of its capabilities is emptied while it waits for `run`;
`capabilities` empties it again if that has failed, and refuses if it fails once more.
"""


def bounds_of_a_pattern() -> dict[str, int]:
    """What the patch of SQLite's regexp.c defines, by the names that it has there."""
    (patch,) = (REPO / "infra" / "patches").glob("*-regular-expressions-*.patch")
    defined = re.findall(r"^\+#define (RE_\w+) +\(?(\d+)(?:<<(\d+))?\)?$", patch.read_text(), re.MULTILINE)
    return {name: int(value) << int(shift or 0) for name, value, shift in defined}


def actions(codes: Iterable[int]) -> Iterable[str]:
    return (apsw.mapping_authorizer_function[code].removeprefix("SQLITE_") for code in codes)


def test_M15_the_page_shows_the_tables_of_the_code():
    assert PAGE.read_text() == page()


if __name__ == "__main__":
    PAGE.write_text(page())

"""docs/security.md shows the runner's tables. `python -m tests.test_security_tables` writes it anew after a change of theirs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import apsw

from gateway.settings import Settings
from runner import policy, syscalls

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
    profile = json.loads((REPO / "infra" / "seccomp.json").read_text())["syscalls"]
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

## System calls

After confinement, {
        sum(len(group.names) for group in syscalls.ALLOWED)
    } are left (fewer on architectures that lack some); each is in a group with its reason.

{table(("allowed by the runner's own filter", "reason"), *((names(group.names), group.reason) for group in syscalls.ALLOWED))}

{table(("answered EPERM", "reason"), *((names(group.names), group.reason) for group in syscalls.REFUSED))}

Any other ends the process. Arguments are checked of {names(sorted(syscalls.ARGUMENTS))}.

Before confinement the container's profile, `infra/seccomp.json`, allows these:

{table(("allowed in the container", "reason"), *((names(group["names"]), group["comment"]) for group in profile))}
"""


def actions(codes: Iterable[int]) -> Iterable[str]:
    return (apsw.mapping_authorizer_function[code].removeprefix("SQLITE_") for code in codes)


def test_M15_the_page_shows_the_tables_of_the_code():
    assert PAGE.read_text() == page()


if __name__ == "__main__":
    PAGE.write_text(page())

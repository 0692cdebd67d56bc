"""`infra/doctor`: one line a check, or one JSON object."""

from __future__ import annotations

import argparse
import json
import sys

from gateway.settings import Settings, SettingsError

from .finding import Finding, Level
from .host import this_host
from .table import CHECKS, Check


def line(check: Check, finding: Finding) -> str:
    start = f"{finding.level:8}{check.name}: {finding.found}"
    return start if finding.level is Level.OK else f"{start} -- {check.why} -- {finding.remedy}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="infra/doctor", description="Looks at this host and says what Mayfly lacks on it.")
    parser.add_argument("--json", action="store_true", help="one JSON object in the place of lines")
    arguments = parser.parse_args()
    try:
        settings = Settings.from_environment()
    except SettingsError as error:
        print(f"mayfly doctor: {error}", file=sys.stderr)
        return 1
    host = this_host(settings)
    findings = [(check, check.of(host)) for check in CHECKS]
    count = {level: sum(finding.level is level for _, finding in findings) for level in Level}
    if arguments.json:
        checks = [
            {"name": check.name, "level": finding.level, "found": finding.found, "why": check.why, "remedy": finding.remedy}
            for check, finding in findings
        ]
        print(json.dumps({"failures": count[Level.FAILURE], "warnings": count[Level.WARNING], "checks": checks}, indent=1))
    else:
        for check, finding in findings:
            print(line(check, finding))
        print(f"{count[Level.FAILURE]} failures, {count[Level.WARNING]} warnings")
    return 2 if count[Level.FAILURE] else 0


if __name__ == "__main__":
    sys.exit(main())

"""docs/api.md and openapi.json say what the code does."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import msgspec
import pytest

import gateway
from gateway.settings import Settings
from gateway.web import openapi
from gateway.web.errors import ApiError, CallerError, ServiceError, leaves, table
from gateway.web.middleware import COMMON_HEADERS

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
    responses = DOCUMENT["paths"]["/sql"]["post"]["responses"]
    assert set(responses) == {"200"} | {str(row.status) for row in table()}
    for row in table():
        response = responses[str(row.status)]
        assert f"`{row.code}` · `{row.text}`: {row.when}" in response["description"]
        assert not row.retry_after or "Retry-After" in response["headers"]


def test_every_reference_of_openapi_resolves():
    references = set(re.findall(r"#/components/schemas/(\w+)", openapi.DOCUMENT.decode()))
    assert references == set(DOCUMENT["components"]["schemas"]) - {"Unused"}


@pytest.mark.parametrize("path", ["/sql", "/healthz", "/readyz", "/livez", "/openapi.json"])
def test_every_route_is_in_both_documents(path):
    assert path in DOCUMENT["paths"]
    assert path in API


def test_the_documented_limits_are_the_defaults():
    documented = dict(re.findall(r"^\| .*? \| `([\d,.]+)` .*?\| `(MAYFLY_[A-Z_]+)` \|$", API, re.MULTILINE))
    assert documented
    defaults = Settings()
    for value, name in documented.items():
        assert float(value.replace(",", "")) == float(getattr(defaults, name.removeprefix("MAYFLY_").lower())), name


def test_every_exposed_header_is_documented():
    for name in COMMON_HEADERS["Access-Control-Expose-Headers"].split(", "):
        assert f"`{name}`" in API, name


def test_the_version_is_the_projects():
    assert tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["version"] == gateway.__version__

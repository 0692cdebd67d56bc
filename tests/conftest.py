"""Fixtures for tests against a whole deployment, and against a launcher alone. A failed test shows the operator's logs."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from . import corpus  # noqa: F401 -- takes the tests' own MAYFLY_ variables out of the environment, before Settings see them
from .deployment import FASTEST, Client, Deployment, client_of, deployed
from .launcher_harness import runner_image
from .moto_server import aws  # noqa: F401 -- a fixture
from .sealed import sealed_directory


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "engines(*names): those under which the test's deployment runs; else the fastest alone")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """HTTP, SQL and policy are the same under each engine, and a container of Docker's takes 40 times as long."""
    if "mayfly" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("engines")
        metafunc.parametrize("mayfly", marker.args if marker else (FASTEST,), indirect=True, scope="session")


@pytest.fixture(scope="session")
def mayfly(request: pytest.FixtureRequest) -> Iterator[Deployment]:
    with deployed(engine=request.param, queue_timeout_seconds="200") as deployment:
        yield deployment


@pytest.fixture
async def client(mayfly: Deployment) -> AsyncIterator[Client]:
    async with client_of(mayfly) as client:
        yield client


@pytest.fixture(scope="module")
def image() -> Iterator[str]:
    """The image whose runner does as it is told, for tests of the launcher alone."""
    with runner_image() as name:
        yield name


@pytest.fixture
def state(image: str) -> Iterator[Path]:
    """A sealed state folder for a launcher that runs `image`."""
    with sealed_directory() as folder:
        yield folder


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    deployment = getattr(item, "funcargs", {}).get("mayfly")
    if report.failed and isinstance(deployment, Deployment):
        report.sections.append(("operator's logs", deployment.logs()[-8000:]))
    return report


def eventually(true: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait until a fact of another process holds; fails after a bound that no healthy machine needs."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)

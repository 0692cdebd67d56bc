"""A host on which a layer is missing: the launcher says which and does not serve.

The launcher is a real process on a checkout of its own, in which the seccomp profile can be another; image, runner and Docker are
real.
"""

from __future__ import annotations

import asyncio
import errno
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.settings import Settings

from .containers import PROFILE, ROOT, probes_beside_the_runner, profile_with
from .launcher_harness import Launcher, containers_of
from .sealed import sealed_directory

FOREIGN = ["/usr/bin/python3.13", "-I", "-S", "-B", "/opt/mayfly/probes/foreign_machine.py"]


@pytest.fixture
def state() -> Iterator[Path]:
    with sealed_directory() as folder:
        yield folder


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The launcher's program and its profile; the working directory comes first where Python looks."""
    shutil.copytree(ROOT / "gateway", tmp_path / "gateway", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "infra").mkdir()
    (tmp_path / "infra" / "seccomp.json").write_text(PROFILE)
    return tmp_path


@pytest.fixture(scope="module")
def foreign_image() -> Iterator[str]:
    with probes_beside_the_runner() as probes:
        tag = f"{probes.image}-foreign"
        recipe = io.BytesIO(f"FROM {probes.image}\nENTRYPOINT {json.dumps(FOREIGN)}\n".encode())
        probes.client.images.build(fileobj=recipe, tag=tag, rm=True, network_mode="none")
        try:
            yield tag
        finally:
            probes.client.images.remove(tag, force=True)


async def refusal(state: Path, checkout: Path, **settings: Any) -> str:
    """The one line that the launcher ended with. Nothing is left, and nobody was served."""
    launcher = Launcher(state, image=settings.pop("image", Settings.from_environment().image), **settings)
    launcher.checkout = checkout
    assert await asyncio.to_thread(launcher.spawn().wait, 30) == 1
    assert not launcher.socket.exists()
    instances = state / "instances"
    assert not instances.exists() or not list(instances.iterdir())
    assert not (state / "launcher" / "deployment-id").exists() or containers_of(launcher.deployment) == []
    told = launcher.log.read_text().splitlines()
    assert told[-1].startswith("mayfly launcher: refused to serve: ")
    assert not any("Traceback" in line for line in told)
    return told[-1].removeprefix("mayfly launcher: refused to serve: ")


async def test_the_same_checkout_serves_on_a_host_that_has_every_layer(state: Path, checkout: Path) -> None:
    launcher = Launcher(state, image=Settings.from_environment().image)
    launcher.checkout = checkout
    try:
        await launcher.start()
        assert await launcher.stop() == 0
    finally:
        launcher.kill()


async def test_a_kernel_without_landlock_is_refused(state: Path, checkout: Path) -> None:
    without = profile_with(answered={"landlock_create_ruleset": errno.ENOSYS})
    (checkout / "infra" / "seccomp.json").write_text(without)
    told = await refusal(state, checkout)
    assert told == (
        "the runner cannot confine itself on this host: the kernel has no Landlock, and MAYFLY_MIN_LANDLOCK_ABI asks for 2"
    )


async def test_a_landlock_older_than_the_settings_ask_for_is_refused(state: Path, checkout: Path) -> None:
    told = await refusal(state, checkout, min_landlock_abi=999)
    assert told.startswith("the runner cannot confine itself on this host: the kernel has Landlock ABI ")
    assert told.endswith(", and MAYFLY_MIN_LANDLOCK_ABI asks for 999")


async def test_an_architecture_without_a_table_of_system_calls_is_refused(state: Path, checkout: Path, foreign_image: str) -> None:
    (checkout / "infra" / "seccomp.json").write_text(profile_with(added=("personality",)))
    told = await refusal(state, checkout, image=foreign_image)
    assert told.startswith("the runner cannot confine itself on this host: ")
    assert "no table of system calls for the architecture" in told


async def test_a_runner_that_may_not_install_its_filter_is_refused(state: Path, checkout: Path) -> None:
    (checkout / "infra" / "seccomp.json").write_text(profile_with(removed=("seccomp",)))
    assert (await refusal(state, checkout)).startswith("the runner cannot confine itself on this host: seccomp: ")


def missing(path: Path) -> None:
    path.unlink()


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def cut_short(path: Path) -> None:
    path.write_text(PROFILE[: len(PROFILE) // 2])


@pytest.mark.parametrize("spoil", [missing, a_folder, cut_short], ids=lambda spoil: spoil.__name__)
async def test_an_unreadable_seccomp_profile_is_refused(state: Path, checkout: Path, spoil: Callable[[Path], None]) -> None:
    path = checkout / "infra" / "seccomp.json"
    spoil(path)
    assert (await refusal(state, checkout)).startswith(f"cannot read the seccomp profile {path}: ")


@pytest.mark.parametrize("action", ["SCMP_ACT_ALLOW", "SCMP_ACT_LOG", None])
async def test_a_profile_that_does_not_deny_by_default_is_refused(state: Path, checkout: Path, action: str | None) -> None:
    path = checkout / "infra" / "seccomp.json"
    path.write_text(json.dumps(json.loads(PROFILE) | {"defaultAction": action}))
    assert await refusal(state, checkout) == f"{path} is not a seccomp profile that denies by default"

"""Every attack meets at least three layers, and each of them refuses it alone: in a Docker container, and in a zygote's child.

An attack is first made where nothing stands in its way, and succeeds: root in a plain container of the image, no step of the
runner's confinement, none of its database's opening. Then once for each layer, with that layer put back and nothing else. A layer
that only helps another one is not in the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from runner import child, confine, database

from .engines import Contained, contained
from .weakened import OF_A_SLOT, OF_A_ZYGOTE, WEAKENINGS, Ground, ground


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    name: str
    refusal: Any
    """The attack's outcome where this layer stands alone."""
    container: tuple[str, ...] = ()
    """Names of WEAKENINGS that are left out."""
    steps: tuple[str, ...] = ()
    """Of runner.confine.STEPS."""
    opening: tuple[str, ...] = ()
    """Of runner.database.PREPARING and READING."""
    order: Mapping[str, Any] = field(default_factory=dict)
    mounts: tuple[str, ...] | None = None
    """Instead of the attack's."""
    image: str | None = None
    """Instead of the attack's."""
    launcher: Mapping[str, Any] | None = None
    """The container is a real launcher's, with these settings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    name: str
    order: Mapping[str, Any]
    success: Any
    """The outcome where nothing refuses."""
    layers: tuple[Layer, ...]
    container: tuple[str, ...] = ()
    """What even the control keeps, because a layer needs it and does not stop the attack."""
    mounts: tuple[str, ...] = ()
    image: str = "hardened"


LANDLOCK = {"steps": ("landlock",)}
SECOND_FILTER = {"steps": ("seccomp",), "refusal": "SIGSYS"}
PROFILE = {"container": ("profile",), "refusal": "EPERM"}
AUTHORIZER = {"opening": ("authorizer",)}

ENDLESS = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE running()) SELECT count(*) FROM c"
TWENTY_MEGABYTES = """
    CREATE TABLE t(a);
    WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c LIMIT 200) INSERT INTO t SELECT zeroblob(100000) FROM c;
    SELECT count(*) FROM t
"""
NO_SUCH_FUNCTION = "sql_error: no such function"

ON_THE_WAY_TO_AN_EXTENSION = (
    Layer(name="the authorizer", **AUTHORIZER, refusal="forbidden: load_extension"),
    Layer(name="the switch", opening=("switches",), refusal="sql_error: not authorized"),
    Layer(name="not compiled in", image="hardened", refusal=f"{NO_SUCH_FUNCTION}: load_extension"),
    Layer(
        name="Landlock",
        **LANDLOCK,
        refusal="sql_error: /data/extension.so: cannot open shared object file: Permission denied",
    ),
)

ATTACKS = (
    Attack(
        name="attaching a file of the host",
        order={
            "attack": "ask",
            "sql": "ATTACH '/host/secret.sqlite' AS host; SELECT a FROM host.secret",
            "configuration": {"sqlite_limits": {"ATTACHED": 1}},
        },
        mounts=("host's folder",),
        success=[["content"]],
        layers=(
            Layer(name="the authorizer", **AUTHORIZER, refusal="forbidden: ATTACH"),
            Layer(
                name="no attached databases",
                opening=("limits",),
                order={"configuration": {}},
                refusal="sql_error: too many attached databases - max 0",
            ),
            Layer(name="Landlock", **LANDLOCK, refusal="internal: CantOpenError"),
            Layer(name="the host's files are not mounted", mounts=(), refusal="internal: CantOpenError"),
            Layer(name="the runner's user", container=("user",), refusal="internal: CantOpenError"),
        ),
    ),
    Attack(
        name="loading an extension",
        # A library that is everywhere, by a function that takes anything and returns 0, SQLite's word for success.
        order={
            "attack": "ask",
            "sql": "SELECT load_extension('/data/extension', 'feclearexcept')",
            "extension": "/usr/lib/x86_64-linux-gnu/libm.so.6",
            "given": ["extensions"],
        },
        image="stock",
        success=[[None]],
        layers=(
            *ON_THE_WAY_TO_AN_EXTENSION,
            Layer(
                name="the volume is noexec",
                mounts=("own volume",),
                refusal="sql_error: /data/extension.so: failed to map segment from shared object",
            ),
            Layer(name="the second filter", **SECOND_FILTER),
        ),
    ),
    Attack(
        name="reading the host's passwd",
        # By a function that the command-line shell of SQLite has.
        order={"attack": "ask", "sql": "SELECT instr(readfile('/etc/passwd'), 'root:')", "given": ["readfile"]},
        mounts=("host's passwd",),
        success=[[1]],
        layers=(
            Layer(name="the authorizer", **AUTHORIZER, refusal="forbidden: readfile"),
            Layer(name="not compiled in", order={"given": []}, refusal=f"{NO_SUCH_FUNCTION}: readfile"),
            Layer(name="Landlock", **LANDLOCK, refusal="internal: PermissionError"),
            Layer(name="the host's files are not mounted", mounts=(), refusal="internal: FileNotFoundError"),
        ),
    ),
    Attack(
        name="reading another instance",
        order={"attack": "read", "path": "/instances/{other}/volume/db.sqlite"},
        mounts=("own volume", "instances"),
        success="content",
        layers=(
            Layer(name="one volume is mounted", mounts=("own volume",), refusal="ENOENT"),
            Layer(name="Landlock", **LANDLOCK, refusal="EACCES"),
            Layer(name="the folder of instances belongs to the launcher", container=("user",), refusal="EACCES"),
        ),
    ),
    Attack(
        name="reaching the network",
        order={"attack": "connect", "port": "{port}"},
        success="content",
        layers=(
            Layer(name="a network of its own", container=("network",), refusal="ECONNREFUSED"),
            Layer(name="Landlock", **LANDLOCK, refusal="EACCES"),
            Layer(name="the container's profile", **PROFILE),
            Layer(name="the second filter", **SECOND_FILTER),
        ),
    ),
    Attack(
        name="multiplying by fork",
        order={"attack": "multiply", "children": 64},
        container=("user",),  # RLIMIT_NPROC does not bind root
        success=64,
        layers=(
            Layer(name="the pids cgroup", container=("cgroup",), refusal="EAGAIN"),
            Layer(name="no further process", steps=("threads",), refusal="EAGAIN"),
            Layer(name="the container's profile", **PROFILE),
            Layer(name="the second filter", **SECOND_FILTER),
        ),
    ),
    Attack(
        name="executing a program of its own",
        order={"attack": "execute"},
        success="ran",
        layers=(
            Layer(name="the volume is noexec", mounts=("own volume",), refusal="EACCES"),
            Layer(name="Landlock", **LANDLOCK, refusal="EACCES"),
            Layer(name="the second filter", **SECOND_FILTER),
            Layer(name="the volume's files belong to the launcher", container=("user",), mounts=("own volume",), refusal="EPERM"),
        ),
    ),
    Attack(
        name="writing outside of the two files",
        order={"attack": "write", "path": "/opt/mayfly/runner/planted"},
        success=7,
        layers=(
            Layer(name="the read-only root", container=("read-only root",), refusal="EROFS"),
            Layer(name="Landlock", **LANDLOCK, refusal="EACCES"),
            Layer(name="the runner's user", container=("user",), refusal="EACCES"),
        ),
    ),
    Attack(
        name="filling the disk",
        order={"attack": "ask", "sql": TWENTY_MEGABYTES},
        success=[[200]],
        layers=(
            Layer(name="the database's quota of pages", opening=("pragmas",), refusal="storage_full"),
            Layer(name="the runner's limit on files", steps=("limits",), refusal="storage_full: IOError"),
            Layer(name="the container's limit on files", container=("ulimits",), refusal="storage_full: IOError"),
        ),
    ),
    Attack(
        name="outliving the deadline",
        # Ends by itself, after more processor time than the kernel's own deadline allows: whole seconds and a margin of two.
        order={
            "attack": "ask",
            "sql": ENDLESS,
            "given": ["end"],
            "cpu_seconds": 5,
            "configuration": {"deadline_ms": 300},
        },
        success="outlived",
        layers=(
            Layer(name="the progress handler", opening=("clock",), refusal="timeout"),
            Layer(name="the watchdog's interrupt", steps=("watchdog",), order={"interrupts": True}, refusal="timeout"),
            Layer(name="the watchdog's answer", steps=("watchdog",), order={"gives_up": True}, refusal="given up"),
            Layer(name="the limit on processor time", steps=("limits",), refusal="SIGKILL"),
            Layer(
                name="the launcher's kill",
                launcher={"deadline_seconds": 0.3, "grace_seconds": 0.2},
                refusal="DEADLINE",
            ),
        ),
    ),
)

EMPTY_ROOT = {"container": ("empty root",)}
SIGNALLED = {"steps": ("seccomp",), "refusal": "SIGNALLED"}

IN_A_CHILD: dict[str, tuple[Layer, ...]] = {
    "attaching a file of the host": (
        Layer(name="the authorizer", **AUTHORIZER, refusal="forbidden: ATTACH"),
        Layer(
            name="no attached databases",
            opening=("limits",),
            order={"configuration": {}},
            refusal="sql_error: too many attached databases - max 0",
        ),
        Layer(name="Landlock", **LANDLOCK, refusal="internal: CantOpenError"),
        Layer(name="the empty root", **EMPTY_ROOT, refusal="internal: CantOpenError"),
        Layer(name="the host's files are not mounted", mounts=(), refusal="internal: CantOpenError"),
    ),
    "loading an extension": (
        *ON_THE_WAY_TO_AN_EXTENSION,
        Layer(
            name="the volume is noexec",
            steps=("volume",),
            refusal="sql_error: /data/extension.so: failed to map segment from shared object",
        ),
        Layer(name="the second filter", **SIGNALLED),
    ),
    "reading the host's passwd": (
        Layer(name="the authorizer", **AUTHORIZER, refusal="forbidden: readfile"),
        Layer(name="not compiled in", order={"given": []}, refusal=f"{NO_SUCH_FUNCTION}: readfile"),
        Layer(name="Landlock", **LANDLOCK, refusal="internal: PermissionError"),
        Layer(name="the empty root", **EMPTY_ROOT, refusal="internal: FileNotFoundError"),
        Layer(name="the host's files are not mounted", mounts=(), refusal="internal: FileNotFoundError"),
    ),
    "reading another instance": (
        Layer(name="no other volume is mounted", mounts=(), refusal="ENOENT"),
        Layer(name="the empty root", **EMPTY_ROOT, refusal="ENOENT"),
        Layer(name="Landlock", **LANDLOCK, refusal="EACCES"),
    ),
    "reaching the network": (
        Layer(name="a network of its own", container=("network",), refusal="ECONNREFUSED"),
        Layer(name="Landlock", **LANDLOCK, refusal="EACCES"),
        Layer(name="the slot's profile", **PROFILE),
        Layer(name="the second filter", **SIGNALLED),
    ),
    "multiplying by fork": (
        Layer(name="the pids cgroup", container=("cgroup",), refusal="EAGAIN"),
        Layer(name="no further process", steps=("limits",), refusal="EAGAIN"),
        Layer(name="the second filter", **SIGNALLED),
    ),
    "executing a program of its own": (
        Layer(name="the volume is noexec", steps=("volume",), refusal="EACCES"),
        Layer(name="the empty root", **EMPTY_ROOT, refusal="ENOENT"),
        Layer(name="Landlock", **LANDLOCK, refusal="EACCES"),
        Layer(name="the second filter", **SIGNALLED),
    ),
    "filling the disk": (
        Layer(name="the database's quota of pages", opening=("pragmas",), refusal="storage_full"),
        Layer(name="the zygote's limit on files", container=("limits",), refusal="storage_full: IOError"),
        Layer(name="the slot's limit on files", container=("ulimits",), refusal="storage_full: IOError"),
    ),
    "outliving the deadline": (
        Layer(name="the progress handler", opening=("clock",), refusal="timeout"),
        Layer(name="the limit on processor time", steps=("limits",), refusal="SIGNALLED"),
        Layer(name="the launcher's kill", launcher={"grace_seconds": 0.2}, refusal="DEADLINE"),
    ),
}
"""The layers of a zygote's child. `steps` are of runner.child.STEPS; `container` names what the slot or its zygote is to keep.

The one attack that is missing writes below the root: tests/test_zygote_child.py has it, as there is nothing below this one's."""
IN_A_CHILD_PAIRS = [
    pytest.param(attack, layer, id=f"{attack.name}-{layer.name}") for attack in ATTACKS for layer in IN_A_CHILD.get(attack.name, ())
]

PAIRS = [pytest.param(attack, layer, id=f"{attack.name}-{layer.name}") for attack in ATTACKS for layer in attack.layers]


@pytest.fixture(scope="module")
def scene() -> Iterator[Ground]:
    with ground() as found:
        yield found


def order_of(scene: Ground, attack: Attack, layer: Layer | None) -> dict[str, Any]:
    order = {**attack.order, **(layer.order if layer else {})}
    order |= {"steps": layer.steps if layer else (), "opening": layer.opening if layer else ()}
    if "path" in order:
        order["path"] = order["path"].format(other=scene.other)
    if "port" in order:
        order["port"] = scene.port
    return order


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_it_succeeds_where_no_layer_stands(scene: Ground, attack: Attack) -> None:
    assert scene.run(attack.image, order_of(scene, attack, None), attack.container, attack.mounts) == attack.success


@pytest.mark.parametrize(("attack", "layer"), PAIRS)
async def test_W9_it_is_refused_by_one_layer_alone(scene: Ground, attack: Attack, layer: Layer) -> None:
    order = order_of(scene, attack, layer)
    if layer.launcher is not None:
        outcome = await scene.launch(order, **layer.launcher)
    else:
        mounts = attack.mounts if layer.mounts is None else layer.mounts
        outcome = scene.run(layer.image or attack.image, order, (*attack.container, *layer.container), mounts)
    assert outcome == layer.refusal


@pytest.mark.parametrize("table", [{attack.name: attack.layers for attack in ATTACKS}, IN_A_CHILD], ids=["docker", "zygote"])
def test_W9_every_attack_meets_three_layers_or_more(table: Mapping[str, tuple[Layer, ...]]) -> None:
    for attack in ATTACKS:
        layers = table.get(attack.name, attack.layers)
        assert len({layer.name for layer in layers}) == len(layers) >= 3, attack.name
        assert attack.success not in [layer.refusal for layer in layers], attack.name


def test_every_layer_is_one_that_production_has() -> None:
    openings = (*database.PREPARING, *database.READING)
    confinement, opening, child_steps = ({name for name, _ in steps} for steps in (confine.STEPS, openings, child.STEPS))
    for attack in ATTACKS:
        for layer in attack.layers:
            assert {*layer.container} <= WEAKENINGS.keys()
            assert {*layer.steps} <= confinement
            assert {*layer.opening} <= opening
        for layer in IN_A_CHILD.get(attack.name, ()):
            assert {*layer.container} <= {*OF_A_SLOT, *OF_A_ZYGOTE}
            assert {*layer.steps} <= child_steps
            assert {*layer.opening} <= opening


# --- the same in a zygote's child


@pytest.fixture(scope="module")
def here() -> Iterator[Contained]:
    with contained("zygote") as (found, _):
        yield found


async def in_a_child(scene: Ground, here: Contained, attack: Attack, layer: Layer | None) -> Any:
    order = order_of(scene, attack, layer)
    mounts, image, keeps, settings = attack.mounts, attack.image, (), {}
    if "cpu_seconds" in order:  # the limit on processor time follows from the deadline that the zygote knows
        settings = {"deadline_seconds": 0.3, "grace_seconds": 60.0}
    if layer is not None:
        mounts, image, keeps = (mounts if layer.mounts is None else layer.mounts), layer.image or image, layer.container
        settings |= layer.launcher or {}
    return await scene.run_in_a_child(here, image, order, keeps, [name for name in mounts if name != "own volume"], **settings)


@pytest.mark.parametrize("attack", [attack for attack in ATTACKS if attack.name in IN_A_CHILD], ids=lambda attack: attack.name)
async def test_it_succeeds_in_a_child_where_no_layer_stands(scene: Ground, here: Contained, attack: Attack) -> None:
    assert await in_a_child(scene, here, attack, None) == attack.success


@pytest.mark.parametrize(("attack", "layer"), IN_A_CHILD_PAIRS)
async def test_W9_it_is_refused_in_a_child_by_one_layer_alone(scene: Ground, here: Contained, attack: Attack, layer: Layer) -> None:
    assert await in_a_child(scene, here, attack, layer) == layer.refusal

"""`python -m gateway.launcher`: checks the host, wires the parts, serves until SIGTERM, leaves no container behind."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path
from typing import get_args

import uvloop

from .. import operator_log
from ..settings import Settings, SettingsError
from . import state
from .caps import Caps
from .engines import Engine, kill_after_seconds
from .engines.auto import AutoEngine
from .engines.docker import DockerEngine
from .engines.slot_containers import SlotContainers
from .engines.zygote import ZygoteEngine
from .errors import EngineDownError, ImageMissingError, LauncherError, RefusedError
from .footprint import Footprint
from .leases import Leases
from .metrics import Metrics
from .readiness import Readiness
from .reaper import Reaper
from .registry import Registry
from .server import Server
from .service import Service
from .specification import Command
from .warmth import Warmth

log = logging.getLogger("gateway.launcher")

_INFRA = Path(__file__).resolve().parents[2] / "infra"
SECCOMP_PROFILE = _INFRA / "seccomp.json"
SLOT_SECCOMP_PROFILE = _INFRA / "seccomp-slot.json"
_IN_FLIGHT_MARGIN = 64  # creates, finds and health checks beside the runs


def read_seccomp_profile(path: Path = SECCOMP_PROFILE) -> str:
    """The profile's JSON, compact; raises RefusedError unless it denies by default."""
    try:
        profile = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RefusedError(f"cannot read the seccomp profile {path}: {error}") from error
    if not isinstance(profile, dict) or profile.get("defaultAction") in (None, "SCMP_ACT_ALLOW", "SCMP_ACT_LOG"):
        raise RefusedError(f"{path} is not a seccomp profile that denies by default")
    return json.dumps(profile, separators=(",", ":"))


def make_engine(settings: Settings, deployment: str, registry: Registry) -> Engine:
    """The one that MAYFLY_ENGINE names; nothing is asked or started yet."""
    docker = DockerEngine(settings, deployment, read_seccomp_profile())
    if settings.engine == docker.name:
        return docker
    zygote = ZygoteEngine(settings, SlotContainers(settings, deployment, read_seccomp_profile(SLOT_SECCOMP_PROFILE)))
    return zygote if settings.engine == zygote.name else AutoEngine(zygote, docker, registry)


async def serve(settings: Settings) -> None:
    """Until SIGTERM or SIGINT; raises LauncherError when it must not serve."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    state.prepare_folders(settings.state_dir)
    async with AsyncExitStack() as stack:
        stack.callback(os.close, state.lock(settings.state_dir))
        deployment = state.deployment_id(settings.state_dir)
        registry = Registry(
            settings.state_dir / "instances",
            ttl_seconds=settings.ttl_seconds,
            min_free_bytes=settings.min_free_bytes,
            max_life_seconds=settings.max_life_seconds,
            caps=Caps(settings.instances, settings.most_instances_per_address),
        )
        stack.callback(registry.close)
        if leftovers := registry.sweep_leftovers():
            log.info("%d leftovers of an earlier launcher removed", leftovers)
        engine = make_engine(settings, deployment, registry)
        stack.push_async_callback(engine.close)
        disk = stack.enter_context(ThreadPoolExecutor(1, "disk"))
        leases = Leases()
        readiness = Readiness(engine, registry)
        warmth = Warmth(settings, registry, leases, engine, readiness, disk)
        service = Service(settings, registry, leases, engine, readiness, warmth, disk, lambda: metrics.text())
        reaper = Reaper(registry, leases, engine, warmth, disk, settings.reap_interval_seconds)
        footprint = Footprint(settings.state_dir / "instances", settings.reap_interval_seconds)
        metrics = Metrics(settings, registry, engine, readiness, warmth, service, reaper, footprint)
        try:
            await readiness.prepare()
        except EngineDownError as error:
            log.warning("the engine is down; runs are refused until it answers: %s", error)
        uid = os.getuid() if settings.web_uid == -1 else settings.web_uid
        server = Server(
            settings.state_dir / "run" / "launcher.sock",
            uid,
            service,
            max_in_flight=settings.slots + settings.queue_length + _IN_FLIGHT_MARGIN,
        )
        # What has been made so far stays: without this a full collection, with its 30,000 objects, holds every run up for 5 ms.
        gc.collect()
        gc.freeze()
        server.listen()
        log.info("serving user=%d state=%s instances=%d deployment=%s", uid, settings.state_dir, registry.count, deployment)
        warming = asyncio.create_task(warmth.run())
        background = [warming, *(asyncio.create_task(part) for part in (readiness.watch(), reaper.run(), footprint.run()))]
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait((stopping, *background), return_when=asyncio.FIRST_COMPLETED)
        finally:
            log.info("stopping")
            warming.cancel()
            longest_run = max(kill_after_seconds(settings, command) for command in get_args(Command))
            await server.close(longest_run, settings.start_timeout_seconds)
            for task in (stopping, *background):
                task.cancel()
            results = await asyncio.gather(*background, return_exceptions=True)
            await warmth.close()
        for result in results:
            if isinstance(result, Exception):
                raise result


def main() -> int:
    try:
        settings = Settings.from_environment()
    except SettingsError as error:
        print(f"mayfly launcher: {error}", file=sys.stderr)
        return 2
    operator_log.configure(settings, "launcher")
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(settings))
    except RefusedError as error:
        operator_log.last_words(settings, "launcher", f"refused to serve: {error}")
        return 1
    except ImageMissingError as error:
        operator_log.last_words(settings, "launcher", f"refused to serve: {error}; infra/up builds it")
        return 1
    except LauncherError as error:
        operator_log.last_words(settings, "launcher", f"refused to serve: {type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m gateway.launcher`: checks the host, wires the parts, serves until SIGTERM, leaves no container behind."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path

from ..settings import Settings, SettingsError
from . import state
from .engines.docker import DockerEngine
from .errors import EngineDownError, ImageMissingError, LauncherError, RefusedError
from .leases import Leases
from .readiness import Readiness
from .reaper import Reaper
from .registry import Registry
from .server import Server
from .service import Service
from .warmth import Warmth

log = logging.getLogger(__name__)

SECCOMP_PROFILE = Path(__file__).resolve().parents[2] / "infra" / "seccomp.json"
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


async def serve(settings: Settings) -> None:
    """Until SIGTERM or SIGINT; raises LauncherError when it must not serve."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    profile = read_seccomp_profile()
    state.prepare_folders(settings.state_dir)
    async with AsyncExitStack() as stack:
        stack.callback(os.close, state.lock(settings.state_dir))
        deployment = state.deployment_id(settings.state_dir)
        registry = Registry(
            settings.state_dir / "instances", ttl_seconds=settings.ttl_seconds, min_free_bytes=settings.min_free_bytes
        )
        stack.callback(registry.close)
        if leftovers := registry.sweep_leftovers():
            log.info("%d leftovers of an earlier launcher removed", leftovers)
        engine = DockerEngine(settings, deployment, profile)
        stack.push_async_callback(engine.close)
        disk = stack.enter_context(ThreadPoolExecutor(1, "disk"))
        leases = Leases()
        readiness = Readiness(engine, registry)
        warmth = Warmth(settings, registry, leases, engine, readiness, disk)
        service = Service(settings, registry, leases, engine, readiness, warmth, disk)
        reaper = Reaper(registry, leases, engine, warmth, disk, settings.reap_interval_seconds)
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
        server.listen()
        log.info("serving user=%d state=%s instances=%d deployment=%s", uid, settings.state_dir, registry.count, deployment)
        warming = asyncio.create_task(warmth.run())
        background = [warming, asyncio.create_task(readiness.watch()), asyncio.create_task(reaper.run())]
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait((stopping, *background), return_when=asyncio.FIRST_COMPLETED)
        finally:
            log.info("stopping")
            warming.cancel()
            await server.close(settings.deadline_seconds + settings.grace_seconds, settings.start_timeout_seconds)
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
    logging.basicConfig(stream=sys.stderr, level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        asyncio.run(serve(settings))
    except RefusedError as error:
        print(f"mayfly launcher: refused to serve: {error}", file=sys.stderr)
        return 1
    except ImageMissingError as error:
        print(f"mayfly launcher: refused to serve: {error}; infra/up builds it", file=sys.stderr)
        return 1
    except LauncherError as error:
        print(f"mayfly launcher: refused to serve: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

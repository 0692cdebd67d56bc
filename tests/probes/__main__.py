"""Runs inside a container, in the place of the runner: applies chosen steps of the real confinement, then tries things.

The order is one JSON object in argv[1]; the report is one JSON object on standard output.

    attempts   names from attempts.py, tried in turn
    steps      names from runner.confine.STEPS to apply before; absent means all
    kind       what it is confined for, as for runner.configuration.Kind
    fork       true: each attempt has a child of its own, which applies the steps and then tries; the container's profile must
               allow fork. The report holds an outcome for each attempt: "done", an errno's name, a signal's name, another
               exception's traceback, or "refused: …" when a step raised.
               false: this process applies the steps and tries, and a signal shows in the container's exit code.
    configuration, volume, threads, personality
               what the process finds: settings that differ, what lies in /data, threads that run, the execution domain
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import signal
import sys
import threading
import traceback
from types import SimpleNamespace

sys.path.append("/opt/mayfly")

from attempts import ATTEMPTS, Scene

from runner import confine
from runner.configuration import Kind

CONFIGURATION = {"instance_bytes": 10 << 20, "nofile": 64, "min_landlock_abi": 3, "deadline_ms": 2000, "bulk_deadline_ms": 9000}


def lay_out(volume: str) -> None:
    """Put the two files where the launcher would have put them, or something else in the database's place."""
    if volume == "empty":
        return
    database, journal = confine.FILES
    open(journal, "w").close()
    if volume == "directory":
        os.mkdir(database)
    elif volume == "symlink":
        os.symlink(journal, database)
    elif volume == "two links":
        open(database, "w").close()
        os.link(database, database + "-link")
    else:
        open(database, "w").close()


def apply(order: dict, scene: Scene) -> confine.Facts:
    wanted = order.get("steps")
    steps = [step for step in confine.STEPS if wanted is None or step[0] in wanted]
    configuration = SimpleNamespace(**CONFIGURATION | order.get("configuration", {}))
    return confine.apply(steps, confine.Order(configuration, scene.start_thread, Kind(**order.get("kind", {}))))


def try_one(name: str, scene: Scene) -> str:
    try:
        ATTEMPTS[name](scene)
    except OSError as error:
        return errno.errorcode[error.errno]
    except RuntimeError:  # threading's word for it
        return "EAGAIN"
    except Exception:  # told here, because standard error may be closed by now
        return traceback.format_exc()
    return "done"


def in_child(name: str, order: dict) -> str:
    note = mmap.mmap(-1, 4096)  # shared memory: a confined child can still write its outcome, whatever it may no longer call
    child = os.fork()
    if child == 0:
        scene = Scene()
        try:
            apply(order, scene)
            note.write(try_one(name, scene).encode())
        except confine.UnconfinedError as error:
            note.write(f"refused: {error}".encode())
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return note[:].rstrip(b"\0").decode()


def main() -> None:
    order = json.loads(sys.argv[1])
    lay_out(order.get("volume", "files"))
    if "personality" in order:
        ctypes.CDLL(None).personality(order["personality"])
    for _ in range(order.get("threads", 0)):
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    if order.get("fork"):
        print(json.dumps({name: in_child(name, order) for name in order["attempts"]}))
        return
    scene = Scene()
    try:
        facts = apply(order, scene)
    except confine.UnconfinedError as error:
        print(json.dumps({"refused": str(error)}))
        sys.exit(1)
    report = {"steps": facts.steps, "landlock_abi": facts.landlock_abi, "seccomp_syscalls": facts.seccomp_syscalls}
    report |= {"rlimits": facts.rlimits, "outcomes": {name: try_one(name, scene) for name in order.get("attempts", ())}}
    print(json.dumps(report | {"told": scene.told}))


main()

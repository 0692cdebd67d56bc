"""Runs inside a container, in the place of the runner: serves thousands of requests, each by the runner in a process of its own.

/cases/cases.jsonl has a case a line: {"database": base64, "journal": base64, "frames": [base64, …]}. argv[1] is {"runs": times each
case runs, "seconds": after which a child that has not ended is killed}. For each run the volume is laid anew. For each request a
child is forked from this process, which has only imported, and calls runner.main.main() as the image's entry point does: the real
configuration, confinement, frames, watchdog and end. Only the container is shared.

Standard output is one record a request: milliseconds from the request to the end of the stream, the child's wait status, length of
what it wrote, and that.
"""

from __future__ import annotations

import base64
import json
import os
import select
import signal
import struct
import sys
from time import monotonic

sys.path.append("/opt/mayfly")

from runner.confine import FILES
from runner.main import main

RECORD = struct.Struct("!IiI")
ORDER = json.loads(sys.argv[1])
MAX_BYTES = 16 << 20


def serve(request: int, reply: int) -> None:
    os.dup2(request, 0)
    os.dup2(reply, 1)
    sys.argv = ["/opt/mayfly", "serve"]
    main()


def ask(frame: bytes) -> bytes:
    to_child, from_child = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        serve(to_child[0], from_child[1])
    os.close(to_child[0])
    os.close(from_child[1])
    try:
        rest = memoryview(frame)
        while rest:
            rest = rest[os.write(to_child[1], rest) :]
    except BrokenPipeError:  # it may answer without reading
        pass
    os.close(to_child[1])
    started, output = monotonic(), bytearray()
    waiting = select.poll()
    waiting.register(from_child[0])
    while len(output) < MAX_BYTES:
        left = started + ORDER["seconds"] - monotonic()
        if left <= 0 or not waiting.poll(left * 1000):
            break
        piece = os.read(from_child[0], 1 << 16)
        if not piece:
            break
        output += piece
    took = monotonic() - started
    if took >= ORDER["seconds"] or len(output) >= MAX_BYTES:
        os.kill(child, signal.SIGKILL)
    os.close(from_child[0])
    return RECORD.pack(round(took * 1000), os.waitpid(child, 0)[1], len(output)) + output


def lay_out(case: dict[str, str]) -> None:
    for path, content in zip(FILES, (case["database"], case["journal"]), strict=True):
        with open(path, "r+b") as file:
            file.truncate(0)
            file.write(base64.b64decode(content))


with open("/cases/cases.jsonl", encoding="utf-8") as lines, os.fdopen(os.dup(1), "wb") as records:
    for line in lines:
        case = json.loads(line)
        for _ in range(ORDER["runs"]):
            lay_out(case)
            for frame in case["frames"]:
                records.write(ask(base64.b64decode(frame)))
                records.flush()

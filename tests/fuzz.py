"""Coverage-guided fuzzing of every parser that runs outside the runner: `python -m tests.fuzz TARGET [SECONDS]`.

A target gets bytes and may raise what its parser documents; anything else ends the run with the bytes that did it. It needs atheris
(`pip install .[fuzz]`), and a process of its own: atheris never returns.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["gateway"]):
    from multidict import CIMultiDict

    from gateway.protocol import MalformedPacketError, Reply, Request
    from gateway.settings import Settings
    from gateway.uuid7 import uuid7
    from gateway.web import batch, body, parameters, ranges, runner
    from gateway.web.callers import Callers
    from gateway.web.errors import BadParameterError, CallerError, ReplyInvalidError
    from gateway.web.keys import FileSource, KeyRing
    from gateway.web.rates import read_address
    from gateway.web.secret import Secret
    from gateway.web.tokens import Tokens

Target = Callable[[bytes], None]

CAP = Settings().max_request_frame_bytes
TAG = '"' + "ab" * 32 + '"'
STEPS = [body.Step("A", None, None), body.Step("B", None, "changed")]
ORDERS = [
    *(runner.rows_order(body.Statement("A", None, int64), CAP) for int64 in ("number", "string")),
    *(runner.batch_order(STEPS, int64, CAP) for int64 in ("number", "string")),
    runner.schema_order(),
    runner.export_order(),
    runner.import_order(b"", table="t", format="csv", columns=None, header=True, delimiter=",", null=None, cap=CAP),
    runner.accept_order(b""),
    runner.verify_order(),
    runner.salvage_order(),
]
RING = KeyRing(FileSource(Path(tempfile.mkdtemp()) / "keys"), 86_400)
RING.open()
TOKENS = Tokens(RING)
GOOD = TOKENS.issue(uuid7()).reveal()
CALLERS = Callers("10.0.0.0/8,fd00::/8")


def sql(raw: bytes) -> None:
    """What passes is a request frame that is the same when it is read again."""
    with suppress(CallerError):
        statement = body.parse(raw)
        frame = runner.request_frame(statement, 1 << 30)[4:]
        keys = {name: value for name, value in body.msgspec.json.decode(frame).items() if name != "v"}
        again = body.parse(body.msgspec.json.encode(keys))
        if repr(again) != repr(statement):
            raise AssertionError(f"{again} is not {statement}")


def batches(raw: bytes) -> None:
    with suppress(CallerError):
        runner.batch_order(batch.parse(raw).steps, "number", CAP)


def queries(raw: bytes) -> None:
    text, kind = raw.decode("utf-8", "surrogateescape"), ["", "text/csv", "application/json", "application/x-ndjson"][len(raw) % 4]
    header = raw.decode("latin-1")
    headers = CIMultiDict([(parameters.ON_DAMAGE, header), (parameters.IDEMPOTENCY_KEY, header)])
    parameters.wants_lines([header])
    for read in (
        lambda: runner.import_order(b"", **parameters.read_import(text, kind), cap=CAP),
        lambda: parameters.read_on_damage(text),
        lambda: parameters.read_query(text),
        lambda: parameters.on_damage_header(headers, creates=True),
        lambda: parameters.idempotency_key(headers),
    ):
        with suppress(BadParameterError):
            read()


def range_headers(raw: bytes) -> None:
    """What is sent is a part of the file, and the tag of the file itself is always known again."""
    size, _, rest = raw.partition(b"\n")
    lines = [line.decode("utf-8", "surrogateescape") for line in rest.split(b"\n")]
    third = len(lines) // 3
    found = ranges.decide(len(size), TAG, if_none_match=lines[:third], if_range=lines[third : 2 * third], ranges=lines[2 * third :])
    if isinstance(found, ranges.Part) and not 0 <= found.first <= found.last < len(size):
        raise AssertionError(found)
    if ranges.decide(len(size), TAG, if_none_match=[*lines[:0], TAG], if_range=[], ranges=lines) != ranges.Unchanged():
        raise AssertionError(lines)


def replies(raw: bytes) -> None:
    """The first byte says to what; what passes can be sent on."""
    if not raw:
        return
    which, payload = raw[0] % (len(ORDERS) + 3), raw[1:]
    with suppress(ReplyInvalidError):
        if which < len(ORDERS):
            body.msgspec.json.encode(runner.read_reply(payload, ORDERS[which]))
        elif which == len(ORDERS):
            body.msgspec.json.encode(runner.decode_reply(payload, "string"))
        elif which == len(ORDERS) + 1:
            body.msgspec.json.encode(runner.read_rows(payload, ["a", "b"], "number"))
        else:
            runner.read_end(payload, 1)


def packets(raw: bytes) -> None:
    """What passes is the same packet when it is packed again."""
    for kind in (Request, Reply):
        with suppress(MalformedPacketError):
            if kind.unpack(raw).pack() != raw:
                raise AssertionError(kind.unpack(raw))


def forwarded(raw: bytes) -> None:
    """Whoever is named is an address, and the peer itself unless that is trusted."""
    lines = raw.decode("latin-1").split("\n")
    if CALLERS.of("192.0.2.1", lines) != "192.0.2.1" or read_address(CALLERS.of("10.0.0.1", lines)) is None:
        raise AssertionError(lines)


def tokens(raw: bytes) -> None:
    text = raw.decode("utf-8", "surrogateescape")
    for presented in (text, "wkn_" + text, GOOD[: len(text)] + text, text + GOOD[len(text) :]):
        if TOKENS.resolve(Secret(presented)).verified and presented != GOOD:
            raise AssertionError("a token that was not issued")


TARGETS: dict[str, Target] = {
    "sql": sql,
    "batch": batches,
    "parameters": queries,
    "ranges": range_headers,
    "replies": replies,
    "packets": packets,
    "forwarded": forwarded,
    "tokens": tokens,
}
SEEDS: dict[str, list[bytes]] = {
    "sql": [
        b'{"sql":"SELECT ?","args":[1,1.5,"a",null,true,{"$blob":"AA=="},{"$int":"1"}],"int64":"string"}',
        b'{"sql":"A","args":{"a":1}}',
    ],
    "batch": [b'{"statements":[{"sql":"A","args":[1]},{"sql":"B","if":"changed"}],"int64":"number"}'],
    "parameters": [
        b"table=t&format=csv&column=a:TEXT&column=b&header=no&delimiter=%3B&null=x",
        b"on_damage=salvage",
        b"application/x-ndjson;q=0",
    ],
    "ranges": [b"aaaaaaaa\n*\n" + TAG.encode() + b"\nbytes=0-5", b'aaaa\n"x"\n"x"\nbytes=-2'],
    "packets": [bytes([3, 1]) + bytes(66), bytes([3, 0]) + bytes(34)],
    "forwarded": [b"1.2.3.4, [2001:db8::1]:80\n10.0.0.2"],
    "tokens": [b"A" * 107],
}


def main(target: str, seconds: str = "60") -> None:
    golden = Path(__file__).parent / "golden"
    seeds = SEEDS.get(target) or [
        bytes([which]) + path.read_bytes() for path in golden.glob("*reply*.json") for which in range(len(ORDERS) + 3)
    ]
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(seeds):
            (Path(corpus) / str(number)).write_bytes(seed)
        options = [
            f"-max_total_time={seconds}",
            "-max_len=4096",
            "-timeout=10",
            f"-artifact_prefix={tempfile.gettempdir()}/",
            corpus,
        ]
        atheris.Setup([sys.argv[0], *options], TARGETS[target])
        atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])

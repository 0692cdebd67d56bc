"""Runs of more than one frame each way: uploads, files, rows in frames, and several runs in one turn."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import random
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.protocol import NO_TAG, Status, Verb, Verdict
from gateway.uuid7 import uuid7
from gateway.web import runs as runs_module
from gateway.web.body import Statement, Step
from gateway.web.channel import Streams
from gateway.web.dialogue import FRAME_BYTES, CutShortError, Dialogue, RowStream, Share
from gateway.web.errors import (
    ApiError,
    DatabaseDamagedError,
    FileRefusedError,
    ImportInvalidError,
    InstanceNotFoundError,
    InternalError,
    InvalidSqlError,
    MemoryLimitError,
    OverloadedError,
    QueryTimeoutError,
    ReplyInvalidError,
    RunnerFailedError,
)
from gateway.web.launcher import Launcher, RepeatedError
from gateway.web.room import Loan, Room
from gateway.web.runner import (
    Accepted,
    Batch,
    Imported,
    Order,
    Reported,
    Schema,
    accept_order,
    batch_order,
    export_order,
    import_order,
    request_frame,
    rows_order,
    salvage_order,
    schema_order,
    verify_order,
)
from gateway.web.runs import Runs, Turn

from .fake_launcher import (
    FINDING,
    GOLDEN,
    TEST_SETTINGS,
    FakeLauncher,
    FakeRun,
    answering,
    file_reply,
    frame,
    ok,
    report,
    rows_reply,
    until,
    verdict,
)

ADDRESS = "192.0.2.1"
CAP = 1 << 20
SELECT = request_frame(Statement("SELECT 1", None, "number"), CAP)
ROWS = rows_order(Statement("SELECT 1", None, "number"), CAP)
# Far more than the socket between the processes holds.
LARGE = random.Random(1).randbytes(3 << 20)


class Stage:
    """What stands between a handler and a container: the client, leases and slots, on a fake launcher."""

    def __init__(self, peer: FakeLauncher, runs: Runs, launcher: Launcher) -> None:
        self.peer = peer
        self.runs = runs
        self.launcher = launcher
        self.room = Room()

    @contextlib.asynccontextmanager
    async def turn(self, *, known: bool = True) -> AsyncIterator[Turn]:
        instance = uuid7()
        self.peer.instances[instance] = 1 << 31
        if known:
            self.runs.extended(instance, 1 << 31)
        with self.runs.ticket(ADDRESS, creates=False) as ticket:
            async with self.runs.turn(ticket, instance, bytes(16)) as turn:
                yield turn

    @property
    def idle(self) -> bool:
        return self.runs.leases.held == 0 and self.room.free == Room().free


@pytest.fixture
async def stage(tmp_path, monkeypatch):
    monkeypatch.setattr(runs_module, "_CHANNEL_SECONDS", 0.2)
    peer = FakeLauncher(tmp_path / "run" / "launcher.sock")
    await peer.start()
    launcher = Launcher(peer.path)
    runs = Runs(replace(TEST_SETTINGS, slots=1, bulk_deadline_seconds=60.0), launcher)
    runs.open()
    async with asyncio.timeout(20):
        yield Stage(peer, runs, launcher)
        await runs.close()
    assert runs.leases.held == 0
    launcher.close()
    await peer.stop()


def loan(stage: Stage) -> Loan:
    return stage.room.loan(ADDRESS)


async def read_all(stream: RowStream) -> list[list[object]]:
    return [row async for rows in stream for row in rows]


# ── one frame each way, and uploads ──────────────────────────────────────────────────────────────────────────────────

ACCEPTED = {"size": 10, "sha256": "0" * 64, "converted": []}
SCHEMA = json.loads((GOLDEN / "op-reply-schema.json").read_bytes())
BATCH = batch_order([Step("SELECT 1", None), Step("SELECT 2", None, "rows")], "number", CAP)
RESULT = {"columns": None, "rows": [], "rows_affected": 0, "truncated": False, "skipped": False}


def load(upload: bytes) -> Order:
    how = {"table": "t", "columns": None, "header": True, "delimiter": ",", "null": None}
    return import_order(upload, format="csv", cap=CAP, **how)


@pytest.mark.parametrize(
    ("order", "reply", "kind"),
    [
        (BATCH, verdict("batch", results=[RESULT, RESULT]), Batch),
        (schema_order(), frame(SCHEMA), Schema),
        (load(LARGE), verdict("imported", table="t", created=True, columns=[["a", "TEXT"]], rows=2), Imported),
        (accept_order(LARGE), verdict("accepted", **ACCEPTED), Accepted),
        (accept_order(b""), verdict("report", report=report(ok=False, findings=[FINDING])), Reported),
        (verify_order(), verdict("report", report=report()), Reported),
        (salvage_order(), verdict("report", report=report("salvage", ok=False)), Reported),
    ],
    ids=lambda value: value.op if isinstance(value, Order) else "",
)
@pytest.mark.parametrize("known", [True, False])
async def test_every_operation_has_its_frame_its_upload_its_flags_and_its_reply(stage, order, reply, kind, known):
    stage.peer.script = answering({order.op: reply})
    async with stage.turn(known=known) as turn:
        assert isinstance(await turn.perform(order), kind)
        assert turn.expires_at == 1 << 31
    [run] = stage.peer.runs
    assert (run.read_only, run.bulk, run.tag, run.quiet) == (order.read_only, order.bulk, NO_TAG, known)
    assert stage.peer.frames == [order.frame]
    assert stage.peer.uploads == [order.upload]


@pytest.mark.parametrize(
    ("order", "reply", "error", "extra"),
    [
        (
            BATCH,
            verdict("step_failed", step=1, failure={"verdict": "sql_error", "message": "x"}),
            InvalidSqlError,
            {"statement": 1},
        ),
        (
            BATCH,
            verdict("step_failed", step=0, failure={"verdict": "damaged", "message": ""}),
            DatabaseDamagedError,
            {"statement": 0},
        ),
        (load(b"a"), verdict("import_invalid", line=3, message="x"), ImportInvalidError, {"line": 3}),
        (load(b"a"), verdict("import_invalid", line=None, message="x"), ImportInvalidError, {"line": None}),
        (accept_order(b"a"), verdict("file_refused", message="x"), FileRefusedError, {}),
        (accept_order(LARGE), verdict("timeout"), QueryTimeoutError, {}),
        (schema_order(), verdict("damaged", message="x"), DatabaseDamagedError, {}),
        (schema_order(read_only=False), verdict("unsettled"), InternalError, {}),
        (schema_order(), verdict("timeout") + b"x", ReplyInvalidError, {}),
        (schema_order(), frame(SCHEMA) + b"x", ReplyInvalidError, {}),
        (schema_order(), ok(), ReplyInvalidError, {}),
        (schema_order(), frame(SCHEMA)[:-1], ReplyInvalidError, {}),
        (schema_order(), b"", RunnerFailedError, {}),
        (ROWS, frame(b"x" * (3 << 20)), ReplyInvalidError, {}),
    ],
)
async def test_what_is_no_success_is_its_error_and_the_slot_is_free_again(stage, order, reply, error, extra):
    stage.peer.script = answering({order.op: reply})
    async with stage.turn() as turn:
        with pytest.raises(error) as raised:
            await turn.perform(order)
        assert raised.value.extra == extra
    await until(lambda: stage.idle)


async def test_a_runner_that_answers_without_reading_its_upload_is_heard(stage):
    async def script(run: FakeRun) -> None:
        run.started()
        await run.send(verdict("file_refused", message="x"))
        run.ended()

    stage.peer.script = script
    async with stage.turn() as turn:
        with pytest.raises(FileRefusedError):
            await turn.perform(accept_order(LARGE))


async def test_a_caller_that_leaves_while_its_upload_is_sent_ends_the_run(stage):
    async def script(run: FakeRun) -> None:
        run.started()
        await run.hung_up()
        run.ended(Verdict.CANCELLED)

    stage.peer.script = script

    async def work() -> None:
        async with stage.turn() as turn:
            await turn.perform(accept_order(LARGE))

    caller = asyncio.ensure_future(work())
    await until(lambda: bool(stage.peer.runs))
    caller.cancel()
    await asyncio.wait((caller,))
    await until(lambda: stage.idle)


async def test_a_bulk_run_has_more_time_than_a_plain_one(stage):
    finish = asyncio.Event()

    async def script(run: FakeRun) -> None:
        run.started()
        await run.read_request()
        await finish.wait()
        with contextlib.suppress(ConnectionError):
            await run.send(verdict("report", report=report()))
        run.ended()

    stage.peer.script = script
    stage.runs = Runs(replace(TEST_SETTINGS, slots=2, bulk_deadline_seconds=60.0), stage.launcher)
    stage.runs.open()
    async with stage.turn() as bulk, stage.turn(known=False) as plain:
        verified = asyncio.ensure_future(bulk.perform(verify_order()))
        with pytest.raises(QueryTimeoutError):
            await plain.perform(schema_order())
        assert not verified.done()
        finish.set()
        assert isinstance(await verified, Reported)
    await stage.runs.close()


# ── several runs in a turn ───────────────────────────────────────────────────────────────────────────────────────────


async def test_the_next_run_of_a_turn_begins_when_the_container_of_the_last_is_gone(stage):
    gone = asyncio.Event()

    async def script(run: FakeRun) -> None:
        run.started()
        request = await run.read_request()
        await run.send(ok(["a"], [[1]]) if "op" not in request else verdict("report", report=report()))
        await gone.wait()
        run.ended()

    stage.peer.script = script
    async with stage.turn() as turn:
        await turn.run(SELECT, "number")
        second = asyncio.ensure_future(turn.perform(verify_order()))
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(stage.peer.runs) == 1
        gone.set()
        await second
        await turn.run(SELECT, "number")
    await until(lambda: stage.idle)
    assert (len(stage.peer.runs), stage.peer.most_running) == (3, 1)
    assert not stage.runs._under_way


async def test_a_run_may_be_on_another_instance_of_which_nobody_else_knows(stage):
    stage.peer.script = answering({"verify": verdict("report", report=report()), "export": file_reply(b"x")})
    async with stage.turn() as turn:
        copy, _ = await stage.launcher.fork(turn._instance, bytes(16), bytes(16))
        stage.peer.instances[copy] = 5
        await turn.perform(verify_order(), on=copy)
        await turn.fetch(export_order(), loan(stage), on=copy)
        assert turn.expires_at is None
    assert [run.instance for run in stage.peer.runs] == [copy, copy]


async def test_a_turn_that_is_over_runs_nothing(stage):
    async with stage.turn() as turn:
        pass
    for work in (turn.run(SELECT, "number"), turn.perform(schema_order())):
        with pytest.raises(ValueError, match="over"):
            await work


@pytest.mark.parametrize("kind", ["run", "perform", "fetch", "rows"])
async def test_a_read_only_run_that_finds_a_killed_ones_transaction_is_run_again_behind_one_that_rolls_it_back(stage, kind):
    unsettled = True

    async def script(run: FakeRun) -> None:
        nonlocal unsettled
        run.started()
        request = await run.read_request()
        replies = {"": ok(["a"], [[1]]), "schema": frame(SCHEMA), "export": file_reply(b"x"), "rows": rows_reply(["a"], [[1]])}
        await run.send(verdict("unsettled") if run.read_only and unsettled else replies[request.get("op", "")])
        unsettled = unsettled and run.read_only
        run.ended()

    stage.peer.script = script
    async with stage.turn() as turn:
        with loan(stage) as held:
            match kind:
                case "run":
                    await turn.run(SELECT, "number", read_only=True)
                case "perform":
                    await turn.perform(schema_order())
                case "fetch":
                    await turn.fetch(export_order(), held)
                case "rows":
                    await read_all(await turn.rows(replace(ROWS, read_only=True), held))
    assert [run.read_only for run in stage.peer.runs] == [True, False, True]
    assert stage.peer.requests[1]["sql"] == "SELECT 1"


async def test_a_run_that_stays_unsettled_is_a_defect_of_ours(stage):
    stage.peer.script = answering({"": ok(["1"], [[1]]), "schema": verdict("unsettled")})
    async with stage.turn() as turn:
        with pytest.raises(InternalError):
            await turn.perform(schema_order())
    assert len(stage.peer.runs) == 3


async def test_a_write_that_was_begun_before_is_told_apart_and_is_not_run_again(stage):
    stage.peer.script = answering({"": ok(), "batch": verdict("batch", results=[RESULT, RESULT])})
    tag = b"the same request"
    async with stage.turn() as turn:
        await turn.run(SELECT, "number", tag=tag)
        with pytest.raises(RepeatedError):
            await turn.run(SELECT, "number", tag=tag)
        with pytest.raises(RepeatedError):
            await turn.perform(replace(BATCH, tag=tag))
        await turn.perform(replace(BATCH, tag=b"another request."))
    assert len(stage.peer.runs) == 2


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("content", [b"", b"x", LARGE])
async def test_a_file_is_had_whole_with_the_digest_that_was_computed_here(stage, content):
    stage.peer.script = answering({"export": file_reply(content)})
    with loan(stage) as held:
        async with stage.turn() as turn:
            file = await turn.fetch(export_order(), held)
        assert file.content == content
        assert file.sha256 == hashlib.sha256(content).hexdigest()
        assert held.size == len(content)
    await until(lambda: stage.idle)


TOO_LARGE = TEST_SETTINGS.instance_bytes + 1


@pytest.mark.parametrize(
    ("stream", "ended", "error"),
    [
        (file_reply(b"abc", sha256=hashlib.sha256(b"abd").hexdigest()), Verdict.EXITED, ReplyInvalidError),
        (file_reply(b"abc", sha256=hashlib.sha256(b"abc").hexdigest().upper()), Verdict.EXITED, ReplyInvalidError),
        (file_reply(b"abc", sha256=hashlib.sha256(b"abc").hexdigest()[:-1] + "\n"), Verdict.EXITED, ReplyInvalidError),
        (file_reply(b"abc") + b"d", Verdict.EXITED, ReplyInvalidError),
        (file_reply(b"", size=TOO_LARGE), Verdict.EXITED, ReplyInvalidError),
        (file_reply(b"", size=-1), Verdict.EXITED, ReplyInvalidError),
        (file_reply(b"abc", size=4), Verdict.EXITED, RunnerFailedError),
        (file_reply(b"abc", size=4), Verdict.DEADLINE, QueryTimeoutError),
        (file_reply(b"abc", size=4), Verdict.OUT_OF_MEMORY, MemoryLimitError),
    ],
)
async def test_D3_a_file_that_is_not_what_was_announced_is_never_passed_on(stage, stream, ended, error):
    async def script(run: FakeRun) -> None:
        run.started()
        await run.read_request()
        await run.send(stream)
        run.ended(ended)

    stage.peer.script = script
    with loan(stage) as held:
        async with stage.turn() as turn:
            with pytest.raises(error):
                await turn.fetch(export_order(), held)
        assert held.size == 0
    await until(lambda: stage.idle)


async def test_a_file_without_room_for_it_is_refused_and_its_run_ended(stage):
    async def script(run: FakeRun) -> None:
        run.started()
        await run.read_request()
        await run.send(file_reply(b"", size=1000))
        await run.hung_up()
        run.ended(Verdict.CANCELLED)

    stage.peer.script = script
    stage.room = Room(1999, share=1)
    with loan(stage) as held:
        async with stage.turn() as turn:
            with pytest.raises(OverloadedError):
                await turn.fetch(export_order(), held)
    await until(lambda: stage.runs.leases.held == 0)


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

WIDE = "x" * 1000
FRAMES = [[[number, WIDE] for number in range(100)] for _ in range(20)]  # 2 MB


async def test_rows_come_in_their_frames_and_the_end_says_how_many(stage):
    stage.peer.script = answering({"rows": rows_reply(["a", "b"], [[1, "x"]], [[2, None], [3, {"$blob": "AA=="}]], affected=3)})
    with loan(stage) as held:
        async with stage.turn(known=False) as turn:
            stream = await turn.rows(ROWS, held)
            assert turn.expires_at == 1 << 31
            assert stream.columns == ["a", "b"]
            assert [rows async for rows in stream] == [[[1, "x"]], [[2, None], [3, {"$blob": "AA=="}]]]
            assert stream.end is not None
            assert (stream.end.rows, stream.end.rows_affected, stream.end.stopped, stream.end.message) == (3, 3, None, None)
            assert held.size == 0
            await stream.aclose()
    await until(lambda: stage.idle)


async def test_a_runner_that_has_said_everything_leaves_its_slot_while_its_caller_has_read_nothing(stage):
    stage.peer.script = answering({"rows": rows_reply(["a", "b"], *FRAMES), "": ok()})
    with loan(stage) as held:
        async with stage.turn() as turn:
            stream = await turn.rows(ROWS, held)
            with pytest.raises(ValueError, match="over"):
                await turn.run(SELECT, "number")
            await until(lambda: stage.runs.leases.held == 0)  # and the turn is not even left
        async with stage.turn() as another:
            await another.run(SELECT, "number")
        assert held.size >= 2_000_000
        assert await read_all(stream) == [row for rows in FRAMES for row in rows]
    await until(lambda: stage.idle)


async def test_M9_without_room_the_runner_waits_for_the_reader_and_what_is_held_is_the_loan(stage):
    stage.peer.script = answering({"rows": rows_reply(["a", "b"], *FRAMES)})
    stage.room = Room(2_000_000, share=1)
    with loan(stage) as held:
        async with stage.turn() as turn:
            stream = await turn.rows(ROWS, held)
        await until(lambda: not stream._dialogue._watched)
        assert stream._dialogue.waiting <= held.size <= 1_000_000
        assert stage.peer.running == 1
        most = 0
        seen = 0
        async for rows in stream:
            seen += len(rows)
            most = max(most, held.size, stream._dialogue.waiting)
        assert seen == 2000
        assert most <= 1_000_000
    await until(lambda: stage.runs.leases.held == 0)


async def test_a_stream_has_its_reserve_before_anything_runs_or_is_refused(stage):
    stage.room = Room(2 * FRAME_BYTES, share=1)
    with loan(stage) as held:
        async with stage.turn() as turn:
            with pytest.raises(OverloadedError):
                await turn.rows(ROWS, held)
    assert not stage.peer.runs


async def test_a_row_that_there_is_no_room_for_ends_the_stream(stage):
    stage.peer.script = answering({"rows": rows_reply(["a"], [["x" * 1_500_000]])})
    stage.room = Room(2_000_000, share=1)
    with loan(stage) as held:
        async with stage.turn() as turn:
            stream = await turn.rows(ROWS, held)
        with pytest.raises(OverloadedError):
            await read_all(stream)
        assert held.size == 0
    await until(lambda: stage.runs.leases.held == 0)


async def test_a_caller_that_leaves_in_the_middle_ends_the_run(stage):
    left = asyncio.Event()

    async def script(run: FakeRun) -> None:
        run.started()
        await run.read_request()
        await run.send(rows_reply(["a"], [[1]], [[2]])[:-10])
        await run.hung_up()
        left.set()
        run.ended(Verdict.CANCELLED)

    stage.peer.script = script
    with loan(stage) as held:
        async with stage.turn() as turn:
            stream = await turn.rows(ROWS, held)
        assert await anext(stream) == [[1]]
        await stream.aclose()
        await stream.aclose()
        await left.wait()
    await until(lambda: stage.idle)


async def test_a_run_that_is_whole_is_not_hung_up_on(stage):
    async def script(run: FakeRun) -> None:
        run.started()
        await run.read_request()
        await run.send(rows_reply(["a"], [[1]]))
        await finish.wait()
        assert not run.sees_a_hang_up()
        run.ended()

    finish = asyncio.Event()
    stage.peer.script = script
    with loan(stage) as held:
        async with stage.turn() as turn:
            stream = await turn.rows(ROWS, held)
            await read_all(stream)
            await stream.aclose()
        finish.set()
    await until(lambda: stage.idle)


@pytest.mark.parametrize(
    ("ended", "error"),
    [
        (Verdict.DEADLINE, QueryTimeoutError),
        (Verdict.OUT_OF_MEMORY, MemoryLimitError),
        (Verdict.EXITED, RunnerFailedError),
    ],
)
async def test_rows_that_are_cut_short_are_handed_over_and_then_it_is_said_why_there_are_no_more(stage, ended, error):
    async def script(run: FakeRun) -> None:
        run.started()
        await run.read_request()
        await run.send(rows_reply(["a"], [[1]], [[2]])[:-10])
        run.ended(ended)

    stage.peer.script = script
    with loan(stage) as held:
        async with stage.turn() as turn:
            stream = await turn.rows(ROWS, held)
        assert [await anext(stream), await anext(stream)] == [[[1]], [[2]]]
        with pytest.raises(error):
            await anext(stream)
    await until(lambda: stage.idle)


async def test_a_runner_that_stops_in_the_middle_is_waited_for_as_long_as_any_run(stage):
    async def script(run: FakeRun) -> None:
        run.started()
        await run.read_request()
        await run.send(rows_reply(["a"], [[1]])[:-10])
        await run.hung_up()
        run.ended(Verdict.CANCELLED)

    stage.peer.script = script
    with loan(stage) as held:
        async with stage.turn(known=False) as turn:
            stream = await turn.rows(ROWS, held)
            with pytest.raises(QueryTimeoutError):
                await read_all(stream)
    await until(lambda: stage.idle)


async def test_a_launcher_that_is_lost_in_the_middle_is_what_went_wrong(stage):
    async def script(run: FakeRun) -> None:
        run.started()
        await run.read_request()
        await run.send(rows_reply(["a"], [[1]])[:-10])
        run.stream.close()
        run.launcher.drop_connections()

    stage.peer.script = script
    with loan(stage) as held:
        async with stage.turn() as turn:
            stream = await turn.rows(ROWS, held)
            with pytest.raises(ApiError) as raised:
                await read_all(stream)
            assert raised.value.code == "launcher_unavailable"


async def test_an_instance_that_is_gone_is_not_found_by_a_stream_either(stage):
    stage.peer.refusals[Verb.RUN] = Status.UNKNOWN
    with loan(stage) as held:
        async with stage.turn() as turn:
            with pytest.raises(InstanceNotFoundError):
                await turn.rows(ROWS, held)
    await until(lambda: stage.idle)


# ── hostile streams ──────────────────────────────────────────────────────────────────────────────────────────────────

LIMIT = 1 << 20


async def heard(raw: bytes, order: Order, most_bytes: int = LIMIT, pieces: list[int] | None = None) -> object:
    """What a dialogue makes of these bytes, with nobody but the runner at its other end: rows and end, or a file."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    streams, first = Streams(), asyncio.Event()
    dialogue = Dialogue(streams, ours, order, LIMIT, first.set)

    async def send() -> None:
        rest = memoryview(raw)
        with contextlib.suppress(ConnectionError):
            for size in [*(pieces or ()), len(raw)]:
                await asyncio.get_running_loop().sock_sendall(theirs, rest[:size])
                rest = rest[size:]
                await asyncio.sleep(0)
        theirs.close()

    sending = asyncio.ensure_future(send())
    try:
        await first.wait()
        if not isinstance(dialogue.reply, bytes):
            raise dialogue.reply or RunnerFailedError()
        reply = runs_module.read_reply(dialogue.reply, order)
        with Room().loan(ADDRESS) as held:
            if order.op == "export":
                file = await dialogue.file(reply.size)
                return file.content
            if order.op != "rows" or not hasattr(reply, "columns"):
                dialogue.finish()
                return reply
            stream = RowStream(dialogue, reply.columns, order.int64, Share(held), most_bytes, LIMIT, cut_short, dialogue.close)
            return await read_all(stream), stream.end
    finally:
        dialogue.close()
        dialogue.close()
        await sending
        streams.close()


async def cut_short() -> ApiError:
    return RunnerFailedError()


STREAMS = sorted(path.name for path in GOLDEN.glob("op-frame-reply-*.bin"))


@pytest.mark.parametrize("name", [name for name in STREAMS if "invalid" not in name])
async def test_every_golden_stream_is_read(name):
    raw = (GOLDEN / name).read_bytes()
    if "file" in name:
        (length,) = struct.unpack_from("!I", raw)
        assert await heard(raw, export_order()) == raw[4 + length :]
        return
    rows, end = await heard(raw, ROWS)
    frames, at = [], 0
    while at < len(raw):
        (length,) = struct.unpack_from("!I", raw, at)
        frames.append(json.loads(raw[at + 4 : at + 4 + length]))
        at += 4 + length
    assert repr(rows) == repr([row for frame in frames[1:-1] for row in frame])
    assert {name: getattr(end, name) for name in frames[-1]} == frames[-1]


@pytest.mark.parametrize("name", [name for name in STREAMS if "invalid" in name])
async def test_every_golden_stream_of_a_runner_taken_over_is_refused(name):
    with pytest.raises((ReplyInvalidError, RunnerFailedError, CutShortError)):
        await heard((GOLDEN / name).read_bytes(), export_order() if "file" in name else ROWS)


HEAD = verdict("rows", columns=["a"])
END = {"rows": 1, "rows_affected": 0, "stopped": None, "message": None}


def row_frame(size: int, rows: int = 1) -> bytes:
    """Rows that take so many bytes, each with its separator."""
    first = [["x" * (size - 5 - 4 * (rows - 1))]]
    payload = json.dumps([*first, *[[1]] * (rows - 1)], separators=(",", ":")).encode()
    assert len(payload) == size + 1
    return frame(payload)


@pytest.mark.parametrize(
    ("raw", "most_bytes"),
    [
        (HEAD + row_frame(FRAME_BYTES) + frame(END), FRAME_BYTES),
        (HEAD + row_frame(FRAME_BYTES, 2) + frame({**END, "rows": 2}), FRAME_BYTES),
        (HEAD + row_frame(FRAME_BYTES + 1) + frame(END), LIMIT),
        (HEAD + row_frame(LIMIT) + frame(END), LIMIT),
        (HEAD + row_frame(500) + row_frame(500) + frame({**END, "rows": 2}), 1000),
        (HEAD + frame(b"[[1]]") * 4 + frame({**END, "rows": 4}), 1000),
    ],
)
async def test_rows_up_to_every_bound_are_believed(raw, most_bytes):
    _, end = await heard(raw, ROWS, most_bytes)
    assert end.stopped is None


@pytest.mark.parametrize(
    ("raw", "most_bytes"),
    [
        (HEAD + row_frame(FRAME_BYTES) + frame(END), FRAME_BYTES - 1),
        (HEAD + row_frame(FRAME_BYTES + 1, 2) + frame({**END, "rows": 2}), LIMIT),
        (HEAD + row_frame(LIMIT + 1) + frame(END), 2 * LIMIT),
        (HEAD + row_frame(500) + row_frame(501) + frame({**END, "rows": 2}), 1000),
        (HEAD + frame(b"[[1]]") * 5 + frame({**END, "rows": 5}), 1000),
        (HEAD + frame(b"[]") + frame({**END, "rows": 0}), LIMIT),
        (HEAD + frame(b"1"), LIMIT),
        (HEAD + frame(b" [[1]]") + frame(END), LIMIT),
        (HEAD + b"\0\0\0\0" + frame(END), LIMIT),
        (HEAD + frame(b'{"rows":0,"rows_affected":0,"stopped":null,"message":null,"x":1}'), LIMIT),
        (HEAD + frame({**END, "rows": 0, "message": "x"}), LIMIT),
        (HEAD + frame({**END, "rows": 0, "stopped": "error"}), LIMIT),
        (HEAD + frame({**END, "rows": 0, "rows_affected": -1}), LIMIT),
        (HEAD + frame({**END, "rows": 0}) + frame([[1]].__repr__().encode()), LIMIT),
        (HEAD + frame(b'[["\xff"]]') + frame(END), LIMIT),
        (HEAD + frame(b"[[NaN]]") + frame(END), LIMIT),
        (HEAD + frame(b"[[9223372036854775808]]") + frame(END), LIMIT),
        (HEAD + frame(b'[[{"$int":"1"}]]') + frame(END), LIMIT),
        (HEAD + frame(b"[" * 100_000), LIMIT),
        (HEAD + struct.pack("!I", 0xFFFFFFFF) + b"[", LIMIT),
        (verdict("rows", columns=[]) + frame({**END, "rows": 0}), LIMIT),
    ],
)
async def test_M9_rows_beyond_a_bound_or_out_of_order_are_invalid(raw, most_bytes):
    with pytest.raises(ReplyInvalidError):
        await heard(raw, ROWS, most_bytes)


async def test_an_integer_as_a_number_is_invalid_in_a_stream_where_strings_were_asked_for():
    with pytest.raises(ReplyInvalidError):
        await heard(rows_reply(["a"], [[1]]), replace(ROWS, int64="string"))


VALID = rows_reply(["a", "b"], [[1, "one"], [2, None]], [[3, {"$text": "/w=="}]], [[4, 0.5]] * 3, affected=2)


@settings(max_examples=150, deadline=None)
@given(
    place=st.integers(0, len(VALID) - 1),
    put=st.binary(max_size=6),
    cut=st.integers(0, 6),
    pieces=st.lists(st.integers(1, 40), max_size=12),
    order=st.sampled_from([ROWS, export_order(), schema_order()]),
)
def test_no_stream_raises_anything_but_an_error_of_ours_or_hands_over_what_was_not_sent(place, put, cut, pieces, order):
    raw = VALID[:place] + put + VALID[place + cut :]

    async def one() -> None:
        async with asyncio.timeout(10):
            with contextlib.suppress(ApiError, CutShortError):
                rows, end = await heard(raw, order, pieces=pieces)
                assert len(rows) == end.rows

    asyncio.run(one())

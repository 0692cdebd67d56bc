"""What a child does with the time in which it waits: it takes the pages that its request is going to write.

A clone has its parent's memory and gets a page of its own when it first writes to one. Most of a request for SELECT 1 is that: it
takes 180 faults after its request has come, and, because a frozen zygote never changes, every child takes them in the same places.
Where these are the zygote finds out once, by a rehearsal: a child answers a request of the zygote's own, on an empty file, and
while it stands still the kernel says which pages the zygote no longer shares with it. From then on each child has those copied, by
one system call, before it waits.

A request that is there already does not wait for that: under load there is no time that would be free.

This is speed and no layer. Where the kernel cannot (process_madvise takes MADV_POPULATE_WRITE from Linux 6.13 on) or may not,
children wait as if this were not here. No tenant teaches it: it looks at the zygote alone, before there is any tenant.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct

from .child import HEADER, Inbox
from .confine import DATA, FILES
from .frames import framed
from .syscalls import prepare

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import NoReturn, Protocol

    Reply = Callable[[], bytes | None]

    class Stage(Protocol):
        """Where a child is cloned that calls `play`, and killed at the end."""

        def begin(self, play: Callable[[Reply], NoReturn]) -> None: ...

        def end(self) -> None: ...


_MSG_DONTWAIT = 0x40
_PIDFD_SELF = -10000
_MADV_POPULATE_WRITE = 23
_PAGE_BYTES = 4096
_ENTRY_BYTES = 8
_PRESENT_AND_EXCLUSIVE = 0x81
"""In the highest byte of an entry of pagemap, bits 63 and 56."""
_VECTOR = struct.Struct("@NN")  # struct iovec
_MOST_VECTORS = 512
_REQUEST = framed(b'{"v":1,"sql":"SELECT 1","args":null,"int64":"number"}')
_REPLY_BYTES = 128
_OK = b'"ok"'
# The first leaves the heap as the second finds it, and as it stays.
_ROUNDS = 2
_MS_BIND = 0x1000
_AT_FDCWD = -100
_VOLUME = f"{DATA}{DATA}"
_STANDARD_ERROR = 2


class WaitingInbox(Inbox):
    """Looks first; what it does when no packet is there yet can be set."""

    def __init__(self, socket: int) -> None:
        super().__init__(socket)
        look = prepare("recvmsg", socket, self._message, _MSG_DONTWAIT)
        self.wait: Callable[[], int] = self.receive
        """Gives what `receive` is to give."""

        def receive() -> int:
            came = look()
            return self.wait() if came < 0 else came

        self.receive = receive


class Pages:
    """Some of this process's memory, for a call that has each page copied that is still shared."""

    def __init__(self) -> None:
        self._vectors = ctypes.create_string_buffer(_VECTOR.size * _MOST_VECTORS)
        self._count = ctypes.c_int()
        self.populate = prepare("process_madvise", _PIDFD_SELF, self._vectors, self._count, _MADV_POPULATE_WRITE, 0)
        """Gives their bytes, or -1."""

    def become(self, addresses: Iterable[int]) -> None:
        """Those of the pages; what is too much is left out."""
        spans: list[list[int]] = []
        for address in sorted(addresses):
            if spans and sum(spans[-1]) == address:
                spans[-1][1] += _PAGE_BYTES
            else:
                spans.append([address, _PAGE_BYTES])
        self._count.value = min(len(spans), _MOST_VECTORS)
        for place, (address, length) in enumerate(spans[:_MOST_VECTORS]):
            _VECTOR.pack_into(self._vectors, place * _VECTOR.size, address, length)

    def can_be_populated(self) -> bool:
        """Whether the kernel does that, tried on one page."""
        self.become([ctypes.addressof(self._vectors) // _PAGE_BYTES * _PAGE_BYTES])
        return self.populate() == _PAGE_BYTES


class Memory:
    """The zygote's own, as the kernel tells of it by two files of /proc."""

    def __init__(self, lowest_descriptor: int) -> None:
        """To be made before the process is closed to looks. Raises OSError."""
        self._maps, self._pagemap = (_open_at_least(lowest_descriptor, f"/proc/self/{name}") for name in ("maps", "pagemap"))
        self._entries: list[tuple[int, ctypes.Array[ctypes.c_char]]] = []

    def prepare_a_look(self) -> list[Callable[[], int]]:
        """At all that can be written as it is mapped now."""
        self._entries, acts = [], []
        for start, end in self._writable():
            entries = ctypes.create_string_buffer((end - start) // _PAGE_BYTES * _ENTRY_BYTES)
            offset = ctypes.c_long(start // _PAGE_BYTES * _ENTRY_BYTES)
            self._entries.append((start, entries))
            acts.append(prepare("pread64", self._pagemap, entries, len(entries), offset))
        return acts

    def exclusive(self) -> set[int]:
        """Addresses of the pages that no other process shared when the acts were done, but for those that the acts wrote to."""
        found: set[int] = set()
        written: set[int] = set()
        for start, entries in self._entries:
            for page, flags in enumerate(entries.raw[_ENTRY_BYTES - 1 :: _ENTRY_BYTES]):
                if flags & _PRESENT_AND_EXCLUSIVE == _PRESENT_AND_EXCLUSIVE:
                    found.add(start + page * _PAGE_BYTES)
            room = ctypes.addressof(entries)
            written.update(range(room // _PAGE_BYTES * _PAGE_BYTES, room + len(entries), _PAGE_BYTES))
        return found - written

    def _writable(self) -> list[tuple[int, int]]:
        text = b""
        while chunk := os.pread(self._maps, 1 << 16, len(text)):
            text += chunk
        found = []
        for line in text.decode().splitlines():
            span, flags = line.split()[:2]
            if flags == "rw-p":
                start, end = (int(address, 16) for address in span.split("-"))
                found.append((start, end))
        return found

    def close(self) -> None:
        os.close(self._maps)
        os.close(self._pagemap)


def _open_at_least(lowest: int, path: str) -> int:
    opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return fcntl.fcntl(opened, fcntl.F_DUPFD_CLOEXEC, lowest)
    finally:
        os.close(opened)


class Rehearsal:
    """Of a child's whole way, in which all but the packet is real."""

    @classmethod
    def of(cls, work: int, lowest_descriptor: int) -> Rehearsal | None:
        """To be called before the process is closed to looks; None where the kernel cannot, or may not."""
        pages = Pages()
        try:
            return cls(WaitingInbox(work), Memory(lowest_descriptor), pages) if pages.can_be_populated() else None
        except OSError:
            return None

    def __init__(self, inbox: WaitingInbox, memory: Memory, pages: Pages) -> None:
        self.inbox = inbox
        """For the children's plan."""
        self._memory, self._pages = memory, pages
        place = f"{_VOLUME}\0".encode()
        # A mount that can be moved as if it were attached nowhere; the last act gives its descriptor.
        self._volume = (
            prepare("mount", place, place, None, _MS_BIND, None),
            prepare("openat", _AT_FDCWD, place, os.O_PATH | os.O_CLOEXEC),
        )
        self._asked = self._told = -1
        self._heard = ctypes.create_string_buffer(_REPLY_BYTES)
        populate, wait = pages.populate, inbox.wait

        def take_pages_and_wait() -> int:
            populate()
            return wait()

        self._wait, self._take_pages_and_wait = wait, take_pages_and_wait

    def learn(self, stage: Stage) -> None:
        """Which pages they are. If all goes well each child takes them, from then on, before it waits.

        Needs a file system at the volume's place that can be written to, for as long as this takes.
        """
        self.inbox.wait = self._arrive
        pages: set[int] = set()
        try:
            os.mkdir(_VOLUME)
            for path in FILES:
                os.close(os.open(path.replace(DATA, _VOLUME, 1), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            looks = self._memory.prepare_a_look()
            for _ in range(_ROUNDS):
                pages = self._look(stage, looks)
        except OSError:
            pages = set()
        self._pages.become(pages)
        self.inbox.wait = self._take_pages_and_wait if pages else self._wait
        self._memory.close()

    def _look(self, stage: Stage, looks: Iterable[Callable[[], int]]) -> set[int]:
        """What the zygote no longer shares with a child that has answered; nothing if that has failed."""
        self._asked, asking = os.pipe2(os.O_CLOEXEC)
        listening, self._told = os.pipe2(os.O_CLOEXEC)
        os.write(asking, _REQUEST)
        stop_telling = prepare("close", self._told)
        hear = prepare("read", listening, self._heard, _REPLY_BYTES)
        stage.begin(self._play)
        # Only what is ready: each page written to here while the child shares it is taken for the child's.
        stop_telling()
        heard = hear()
        for look in looks:
            look()
        stage.end()
        self.inbox.clear()
        for descriptor in (self._asked, asking, listening):
            os.close(descriptor)
        return self._memory.exclusive() if _OK in self._heard[: max(heard, 0)] else set()

    # --- in the child

    def _play(self, reply: Reply) -> NoReturn:
        """And stand still to be looked at, until the end."""
        os.write(_STANDARD_ERROR, reply() or b"")
        while True:
            os.read(0, 1)

    def _arrive(self) -> int:
        """As if a packet had come: with the request, and with a volume that is this child's own."""
        os.dup2(self._told, _STANDARD_ERROR)  # which stays open
        self.inbox.first.value = self._asked
        for act in self._volume:
            self.inbox.second.value = act()
        HEADER.pack_into(self.inbox.packet, 0, 0, 0, 0)
        return HEADER.size

"""What a hostile runner would try, and what an honest one must still be able to do. Each attempt raises OSError or returns."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

from runner import confine, landlock, syscalls

DATABASE, JOURNAL = confine.FILES
ELSEWHERE = "/scratch/file"  # on a writable tmpfs that tests add, so that nothing but the confinement protects it

MACHINE = syscalls.machine()

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.syscall.restype = ctypes.c_long


class Scene:
    """What attempts need from before the confinement: a thread, descriptors, machine code."""

    def __init__(self) -> None:
        self.told: dict[str, object] = {}
        self.wake, self.outcome = threading.Event(), threading.Event()
        self.error: OSError | None = None
        self.thread = threading.Thread(target=self._follow, daemon=True)
        with open(ELSEWHERE, "w") as file:
            file.write("content")
        self.secret = os.open(ELSEWHERE, os.O_RDONLY)
        self.address = f"\0mayfly-{os.getpid()}"
        self.listener: socket.socket | None = None
        with suppress(PermissionError):  # the container's profile has no socket
            self.listener = socket.socket(socket.AF_UNIX)
            self.listener.bind(self.address)
            self.listener.listen()
        self.code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        # push rbx; mov eax, 20 (getpid for i386); int 0x80; pop rbx; ret
        self.code.write(b"\x53\xb8\x14\x00\x00\x00\xcd\x80\x5b\xc3")

    def start_thread(self) -> None:
        self.thread.start()

    def _follow(self) -> None:
        self.wake.wait()
        try:
            socket.socket().close()
        except OSError as error:
            self.error = error
        self.outcome.set()


def call(number: int, *arguments: int | bytes) -> int:
    """A system call that libc has no function for. Numbers above 423 are the same on every architecture."""
    passed = (ctypes.c_long(value) if isinstance(value, int) else value for value in arguments)
    result = libc.syscall(ctypes.c_long(number), *passed)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"system call {number}")
    return result


def on_x86_64_alone(attempt: Callable[[Scene], None]) -> Callable[[Scene], None]:
    """An attempt that needs x86 machine code or x86 numbers; elsewhere there is nothing of the kind to attack."""

    def tried(scene: Scene) -> None:
        if MACHINE != "x86_64":
            os.kill(os.getpid(), signal.SIGSYS)
        attempt(scene)

    return tried


# --- honest work


def read_write_and_truncate_both_files(scene: Scene) -> None:
    for path in confine.FILES:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        os.pwrite(descriptor, b"x" * 100, 0)
        os.fdatasync(descriptor)
        os.pread(descriptor, 100, 0)
        os.ftruncate(descriptor, 0)
        os.close(descriptor)


def write_the_database(scene: Scene) -> None:
    write_by_path(confine.FILES[0])


def write_the_journal(scene: Scene) -> None:
    write_by_path(confine.FILES[1])


def write_by_path(path: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    os.write(descriptor, b"written")
    os.close(descriptor)


def read_both_files(scene: Scene) -> None:
    for path in confine.FILES:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        os.read(descriptor, 100)
        os.close(descriptor)


# --- the file system


def read_elsewhere(scene: Scene) -> None:
    os.close(os.open(sys.executable, os.O_RDONLY | os.O_CLOEXEC))


def write_elsewhere(scene: Scene) -> None:
    os.close(os.open(ELSEWHERE, os.O_WRONLY | os.O_CLOEXEC))


def list_the_volume(scene: Scene) -> None:
    os.listdir("/data")


def list_the_root(scene: Scene) -> None:
    os.listdir("/")


def create_in_the_volume(scene: Scene) -> None:
    os.close(os.open("/data/further", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))


def unlink_the_journal(scene: Scene) -> None:
    try:
        os.unlink(JOURNAL)
    finally:
        if not os.path.exists(JOURNAL):
            open(JOURNAL, "w").close()


def truncate_elsewhere(scene: Scene) -> None:
    os.truncate(ELSEWHERE, 0)


def symlink_in_the_volume(scene: Scene) -> None:
    os.symlink("/etc", "/data/link")
    os.unlink("/data/link")


def link_elsewhere(scene: Scene) -> None:
    os.link(ELSEWHERE, "/scratch/link")
    os.unlink("/scratch/link")


def rename_in_the_volume(scene: Scene) -> None:
    os.rename(JOURNAL, JOURNAL + "2")
    os.rename(JOURNAL + "2", JOURNAL)


def make_a_folder(scene: Scene) -> None:
    os.mkdir("/data/folder")
    os.rmdir("/data/folder")


def write_own_memory(scene: Scene) -> None:
    os.close(os.open("/proc/self/mem", os.O_RDWR | os.O_CLOEXEC))


def restrict_at_every_abi(scene: Scene) -> None:
    """Landlock again, once for each ABI that a kernel may offer, in a child each: each alone must stop the listing."""
    for abi in range(1, landlock.abi() + 1):
        child = os.fork()
        if child == 0:
            syscalls.invoke("prctl", 38, 1, 0, 0, 0)
            landlock.restriction(confine.FILES, abi)()
            read_write_and_truncate_both_files(scene)
            try:
                os.listdir("/data")
            except PermissionError:
                os._exit(0)
            os._exit(1)
        if os.waitpid(child, 0)[1]:
            raise OSError(95, f"ABI {abi}")


# --- the network and other processes


def bind_tcp(scene: Scene) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))


def connect_tcp(scene: Scene) -> None:
    with socket.socket() as client:
        try:
            client.connect(("127.0.0.1", 9))
        except ConnectionRefusedError:
            return  # the network answered


def connect_to_an_abstract_socket(scene: Scene) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(scene.address)


def signal_the_parent(scene: Scene) -> None:
    os.kill(os.getppid(), 0)


# --- system calls


def open_a_socket(scene: Scene) -> None:
    socket.socket().close()


def fork(scene: Scene) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


def start_a_thread(scene: Scene) -> None:
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()


def execute(scene: Scene) -> None:
    os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", "import ctypes; ctypes.string_at(0)"])  # proves itself by SIGSEGV


def make_anonymous_file(scene: Scene) -> None:
    os.close(os.memfd_create("code"))


def trace(scene: Scene) -> None:
    if libc.ptrace(0, 0, 0, 0):  # PTRACE_TRACEME
        raise OSError(ctypes.get_errno(), "ptrace")


def set_up_io_uring(scene: Scene) -> None:
    os.close(call(425, 1, bytes(120)))


def signal_itself(scene: Scene) -> None:
    os.kill(os.getpid(), 0)


def map_executable(scene: Scene) -> None:
    mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_EXEC).close()


def map_shared(scene: Scene) -> None:
    mmap.mmap(-1, 4096, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS).close()


def make_executable(scene: Scene) -> None:
    address = libc.mmap(None, ctypes.c_size_t(4096), 3, 0x22, -1, ctypes.c_size_t(0))
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(4096), 5):
        raise OSError(ctypes.get_errno(), "mprotect")


def merge_pages(scene: Scene) -> None:
    address = libc.mmap(None, ctypes.c_size_t(4096), 3, 0x22, -1, ctypes.c_size_t(0))
    if libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(4096), 20):  # MADV_COLD; MADV_MERGEABLE is not in every kernel
        raise OSError(ctypes.get_errno(), "madvise")


def requeue_with_priority_inheritance(scene: Scene) -> None:
    word = ctypes.create_string_buffer(8)
    if libc.syscall(ctypes.c_long(syscalls.number("futex", MACHINE) or -1), word, 6, 0, None, None, 0) < 0:  # LOCK_PI
        raise OSError(ctypes.get_errno(), "futex")


def move_memory(scene: Scene) -> None:
    address = libc.mmap(None, ctypes.c_size_t(4096), 3, 0x22, -1, ctypes.c_size_t(0))
    call(syscalls.number("mremap", MACHINE) or -1, address, 4096, 4096, 1 | 4, 0)  # MREMAP_DONTUNMAP


def duplicate_a_descriptor(scene: Scene) -> None:
    os.close(fcntl.fcntl(1, fcntl.F_DUPFD_CLOEXEC, 5))


def open_a_path_handle(scene: Scene) -> None:
    os.close(os.open("/", os.O_PATH | os.O_CLOEXEC))


def open_beside_a_descriptor(scene: Scene) -> None:
    os.close(os.open("self", os.O_RDONLY | os.O_CLOEXEC, dir_fd=1000))


@on_x86_64_alone
def call_as_i386(scene: Scene) -> None:
    ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(scene.code)))()


@on_x86_64_alone
def call_as_x32(scene: Scene) -> None:
    if libc.syscall(ctypes.c_long(0x40000000 | 39)) < 0:
        raise OSError(ctypes.get_errno(), "getpid")


def open_a_socket_in_the_thread(scene: Scene) -> None:
    if scene.thread.ident is None:
        scene.start_thread()
    scene.wake.set()
    scene.outcome.wait()
    if scene.error:
        raise scene.error


# --- what a process holds


def read_an_inherited_descriptor(scene: Scene) -> None:
    os.pread(scene.secret, 1, 0)


def reach_standard_error(scene: Scene) -> None:
    """Done if whatever was descriptor 2 is still there."""
    here, null = os.fstat(2), os.stat("/dev/null")
    if (here.st_dev, here.st_ino) == (null.st_dev, null.st_ino):
        raise OSError(9, "standard error leads nowhere")


def grow_the_database_past_its_cap(scene: Scene) -> None:
    descriptor = os.open(DATABASE, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.ftruncate(descriptor, (10 << 20) + 1)
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def open_hundred_descriptors(scene: Scene) -> None:
    held = []
    try:
        for _ in range(100):
            held.append(os.dup(1))
    finally:
        for descriptor in held:
            os.close(descriptor)


def lock_memory(scene: Scene) -> None:
    if libc.mlock(ctypes.c_void_p(ctypes.addressof(ctypes.create_string_buffer(4096))), ctypes.c_size_t(4096)):
        raise OSError(ctypes.get_errno(), "mlock")


def tell_limits(scene: Scene) -> None:
    names = ("FSIZE", "NOFILE", "CPU", "CORE", "MEMLOCK", "MSGQUEUE", "NPROC")
    scene.told["rlimits"] = {name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}")) for name in names}


def tell_privileges(scene: Scene) -> None:
    scene.told["dumpable"] = syscalls.invoke("prctl", 3, 0, 0, 0, 0)
    scene.told["no_new_privs"] = syscalls.invoke("prctl", 39, 0, 0, 0, 0)


def all_attempts() -> dict[str, Callable[[Scene], None]]:
    from workload import run_the_workload

    here = sys.modules[__name__]
    outside = {"on_x86_64_alone", "all_attempts", "call"}
    found = {name: value for name, value in vars(here).items() if callable(value) and getattr(value, "__module__", "") == __name__}
    return {name: value for name, value in found.items() if name not in outside and name != "Scene"} | {
        "run_the_workload": run_the_workload
    }


ATTEMPTS = all_attempts()

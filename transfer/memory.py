"""Host memory that other processes of this host can map: anonymous files (memfd), which have no
name, so that nothing is left behind however a process ends.

The memory lives as long as its `HostMemory` or anything made from its `buffer`; the descriptor, by
which others open it, as long as the `HostMemory`. Its size is sealed: who has mapped it can touch
all of it at any time, also when its owner is gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import mmap
import os
import weakref

import msgspec
import numpy as np

from transfer.transport import PeerError

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_MADV_POPULATE_WRITE = 23  # Linux 5.14; Python has no name for it


@dataclasses.dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class HostMemory:
    """`size` bytes from `address` on, page-aligned, in file descriptor `fd`."""

    address: int
    size: int
    buffer: mmap.mmap
    fd: int


_allocated: weakref.WeakSet[HostMemory] = weakref.WeakSet()


def allocate_host(num_bytes: int, populate: bool = False) -> HostMemory:
    """Zeroed shared memory. `populate`: all of it is backed by RAM now, which takes as long as
    zeroing it; else each page is at its first use, which slows that down."""
    size = max(num_bytes, mmap.PAGESIZE)
    fd = os.memfd_create("pagerelay", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        buffer = _map(fd, size, populate)
    except BaseException:
        os.close(fd)
        raise
    memory = HostMemory(address_of(buffer), num_bytes, buffer, fd)
    weakref.finalize(memory, os.close, fd).atexit = False
    _allocated.add(memory)
    return memory


def find_host(address: int, num_bytes: int) -> tuple[HostMemory, int] | None:
    """The memory that holds all of these bytes, and the offset of the first."""
    for memory in _allocated:
        offset = address - memory.address
        if offset >= 0 and offset + num_bytes <= memory.size:
            return memory, offset
    return None


def address_of(buffer: mmap.mmap) -> int:
    return int(np.frombuffer(buffer, np.uint8).ctypes.data)


class MemoryFile(msgspec.Struct, frozen=True):
    """What another process needs to open some memory and to know that it is the right one."""

    fd: int
    inode: int
    size: int


class Process(msgspec.Struct, frozen=True):
    """One process, and no later one with its number."""

    host: str
    """The kernel's boot id."""
    pid_namespace: str
    pid: int
    started: str
    """In clock ticks after boot."""


def describe_process() -> Process:
    return Process(_host(), _pid_namespace(), os.getpid(), _started(os.getpid()))


def describe_memory(memory: HostMemory) -> MemoryFile:
    return MemoryFile(memory.fd, os.fstat(memory.fd).st_ino, len(memory.buffer))


def open_process(process: Process) -> int:
    """A pidfd, readable when the process has ended. Raises PeerError when it is out of reach or
    has ended already."""
    for what, theirs, ours in (
        ("host (boot id)", process.host, _host()),
        ("pid namespace", process.pid_namespace, _pid_namespace()),
    ):
        if theirs != ours:
            raise PeerError(f"it is in another {what}, where memory cannot be shared: {theirs}")
    try:
        pidfd = os.pidfd_open(process.pid)
    except OSError as error:
        raise PeerError(f"process {process.pid} is gone: {error}") from error
    try:
        # Checked with the pidfd open: it does not come to mean another process.
        if _started(process.pid) != process.started:
            raise PeerError(f"process {process.pid} is gone, and another one has its number")
    except OSError as error:
        os.close(pidfd)
        raise PeerError(f"process {process.pid} is gone: {error}") from error
    except PeerError:
        os.close(pidfd)
        raise
    return pidfd


def map_memory(process: Process, file: MemoryFile) -> mmap.mmap:
    """Another process's memory, from here on ours as well, also when that process ends. Raises
    PeerError when it is not there or not accessible."""
    try:
        fd = os.open(f"/proc/{process.pid}/fd/{file.fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            status = os.fstat(fd)
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            if (status.st_ino, status.st_size, seals) != (file.inode, file.size, _SEALS):
                raise PeerError(f"process {process.pid} has not the memory that it described")
            # The pages are there but not in our page table: now is better than at first use.
            return _map(fd, file.size, populate=True)
        finally:
            os.close(fd)
    except (OSError, ValueError) as error:
        raise PeerError(f"cannot map memory of process {process.pid}: {error}") from error


def _map(fd: int, size: int, populate: bool) -> mmap.mmap:
    buffer = mmap.mmap(fd, size)
    # Advice only: some kernels have no huge pages here, those before 5.14 cannot populate.
    with contextlib.suppress(OSError):
        buffer.madvise(mmap.MADV_HUGEPAGE)
    if populate:
        with contextlib.suppress(OSError):
            buffer.madvise(_MADV_POPULATE_WRITE)
    return buffer


def _host() -> str:
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def _pid_namespace() -> str:
    return os.readlink("/proc/self/ns/pid")


def _started(pid: int) -> str:
    """Field 22 of proc_pid_stat(5), counted after the name, which may have spaces."""
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[19]

"""Numbers that either of two processes of a host draws, each one once: a pipe that both read.

The one that made the pipe puts numbers in; the other opens it through /proc, as with memory in
`transfer/memory.py`. Who draws first has it, without asking the other one, which may be busy,
stopped or dead.
"""

from __future__ import annotations

import os

import msgspec

from transfer.memory import Process, describe_process, open_process
from transfer.transport import PeerError

_NUMBER_BYTES = 8
"""Written and read at once: far below what a pipe keeps in one piece."""


class TicketFile(msgspec.Struct, frozen=True):
    """What another process needs to open tickets and to know that they are the right ones."""

    process: Process
    fd: int
    inode: int


class Tickets:
    """Made without arguments, or from what `describe` gave in another process: raises PeerError
    where that one's are out of reach."""

    def __init__(self, file: TicketFile | None = None) -> None:
        self._write_fd = -1
        if file is None:
            self._read_fd, self._write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        else:
            self._read_fd = _open(file)

    def describe(self) -> TicketFile:
        return TicketFile(describe_process(), self._read_fd, os.fstat(self._read_fd).st_ino)

    def put(self, number: int) -> bool:
        """Whether there was room."""
        try:
            os.write(self._write_fd, number.to_bytes(_NUMBER_BYTES, "little"))
        except OSError:
            return False
        return True

    def draw(self) -> int | None:
        """None when there is none left."""
        try:
            data = os.read(self._read_fd, _NUMBER_BYTES)
        except OSError:
            return None
        return int.from_bytes(data, "little") if len(data) == _NUMBER_BYTES else None

    def close(self) -> None:
        for fd in (self._read_fd, self._write_fd):
            if fd >= 0:
                os.close(fd)
        self._read_fd = self._write_fd = -1


def _open(file: TicketFile) -> int:
    try:
        # Kept open meanwhile, so that the number does not come to mean another process.
        pidfd = open_process(file.process)
    except OverflowError as error:
        raise PeerError(f"{file.process.pid} is no process: {error}") from error
    try:
        fd = os.open(
            f"/proc/{file.process.pid}/fd/{file.fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
        )
    except (OSError, ValueError) as error:
        raise PeerError(f"cannot open a pipe of process {file.process.pid}: {error}") from error
    finally:
        os.close(pidfd)
    if os.fstat(fd).st_ino != file.inode:
        os.close(fd)
        raise PeerError(f"process {file.process.pid} has not the pipe that it described")
    return fd

"""The CUDA driver, as far as moving pages needs it: memory shared between processes, streams,
events, kernels, and many copies in one call. ctypes on libcuda, which every machine with a GPU
driver has; a call costs a microsecond or two.

Everything works in the device's primary context, which torch uses as well, so addresses are common.
A `Device` may be used by one thread at a time.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

_IPC_HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1
_NON_BLOCKING = 1
_NO_TIMING = 2
_IN_STREAM_ORDER = 1
_NOT_READY = 600
_PEER_ACCESS_ALREADY_ENABLED = 704


class CudaError(RuntimeError):
    """What the driver says went wrong."""


class _IpcHandle(ctypes.Structure):
    _fields_ = (("data", ctypes.c_byte * _IPC_HANDLE_BYTES),)


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _CopyAttributes(ctypes.Structure):
    _fields_ = (
        ("order", ctypes.c_int),
        ("source_hint", _Location),
        ("target_hint", _Location),
        ("flags", ctypes.c_uint),
    )


@functools.cache
def _driver() -> Any:
    driver = ctypes.CDLL("libcuda.so.1")
    if driver.cuInit(0):
        raise OSError("the CUDA driver does not start")
    pointer, number = ctypes.c_void_p, ctypes.c_uint
    driver.cuLaunchKernel.argtypes = [pointer, *[number] * 7, pointer, pointer, pointer]
    return driver


def num_devices() -> int:
    """0 where there is no driver."""
    count = ctypes.c_int()
    try:
        _call("cuDeviceGetCount", ctypes.byref(count))
    except (OSError, CudaError):
        return 0
    return count.value


def _call(name: str, *arguments: Any) -> None:
    code = getattr(_driver(), name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorName(code, ctypes.byref(text))
        raise CudaError(f"{name}: {(text.value or b'unknown error').decode()}")


class Event:
    """A point in a stream."""

    def __init__(self, device: Device, stream: Stream) -> None:
        self._device = device
        self._handle = ctypes.c_void_p()
        _call("cuEventCreate", ctypes.byref(self._handle), ctypes.c_uint(_NO_TIMING))
        _call("cuEventRecord", self._handle, stream.handle)

    def is_done(self) -> bool:
        """Raises CudaError when the device failed."""
        code = _driver().cuEventQuery(self._handle)
        if code not in (0, _NOT_READY):
            raise CudaError(f"the device reports error {code}")
        return bool(code == 0)

    def wait(self) -> None:
        self._device.use()
        _call("cuEventSynchronize", self._handle)

    def __del__(self) -> None:
        _driver().cuEventDestroy_v2(self._handle)


class Stream:
    def __init__(self) -> None:
        self.handle = ctypes.c_void_p()
        _call("cuStreamCreate", ctypes.byref(self.handle), ctypes.c_uint(_NON_BLOCKING))


class Device:
    """Every method makes the device current on the calling thread."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._handle = ctypes.c_int()
        self._context = ctypes.c_void_p()
        _call("cuDeviceGet", ctypes.byref(self._handle), ctypes.c_int(number))
        _call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._handle)

    def use(self) -> None:
        _call("cuCtxSetCurrent", self._context)

    def make_stream(self) -> Stream:
        self.use()
        return Stream()

    def record(self, stream: Stream) -> Event:
        self.use()
        return Event(self, stream)

    def allocate(self, num_bytes: int, zero: bool = False) -> int:
        self.use()
        address = ctypes.c_uint64()
        _call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(num_bytes))
        if zero:
            _call("cuMemsetD8_v2", address, ctypes.c_ubyte(0), ctypes.c_size_t(num_bytes))
            _call("cuCtxSynchronize")
        return address.value

    def free(self, address: int) -> None:
        self.use()
        _call("cuMemFree_v2", ctypes.c_uint64(address))

    def allocate_pinned(self, num_bytes: int) -> int:
        """Host memory that kernels can read at the same address; it stays for the process's
        life."""
        self.use()
        address = ctypes.c_void_p()
        _call("cuMemAllocHost_v2", ctypes.byref(address), ctypes.c_size_t(num_bytes))
        return address.value or 0

    def load(self, image: bytes, names: list[str]) -> list[Any]:
        """Kernels of a PTX image."""
        self.use()
        module = ctypes.c_void_p()
        _call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(image))
        functions = []
        for name in names:
            function = ctypes.c_void_p()
            _call(
                "cuModuleGetFunction",
                ctypes.byref(function),
                module,
                ctypes.c_char_p(name.encode()),
            )
            functions.append(function)
        return functions

    def launch(
        self, function: Any, blocks: int, threads: int, stream: Stream, pointers: Any
    ) -> None:
        """`pointers` from `argument_pointers`; the arguments are read before this returns."""
        self.use()
        _call(
            "cuLaunchKernel",
            *(function, blocks, 1, 1, threads, 1, 1, 0, stream.handle, pointers, None),
        )

    def copy_batch(
        self, targets: int, sources: int, lengths: int, count: int, stream: Stream
    ) -> None:
        """`count` copies by the copy engines. The first three are addresses of arrays of uint64 in
        host memory, which are read before this returns."""
        self.use()
        attributes = _CopyAttributes(order=_IN_STREAM_ORDER)
        _call(
            "cuMemcpyBatchAsync_v2",
            *(ctypes.c_void_p(targets), ctypes.c_void_p(sources), ctypes.c_void_p(lengths)),
            ctypes.c_size_t(count),
            *(ctypes.byref(attributes), (ctypes.c_size_t * 1)(0), ctypes.c_size_t(1)),
            stream.handle,
        )

    def export_memory(self, address: int) -> tuple[bytes, int]:
        """(handle of the allocation around `address`, offset within it), for other processes."""
        self.use()
        base, size, handle = ctypes.c_uint64(), ctypes.c_size_t(), _IpcHandle()
        _call(
            "cuMemGetAddressRange_v2",
            ctypes.byref(base),
            ctypes.byref(size),
            ctypes.c_uint64(address),
        )
        _call("cuIpcGetMemHandle", ctypes.byref(handle), base)
        return bytes(handle), address - base.value

    def open_memory(self, handle: bytes) -> int:
        """Map another process's allocation; returns its address here."""
        self.use()
        base = ctypes.c_uint64()
        opened = _IpcHandle.from_buffer_copy(handle)
        _call("cuIpcOpenMemHandle_v2", ctypes.byref(base), opened, ctypes.c_uint(_LAZY_PEER_ACCESS))
        return base.value

    def close_memory(self, address: int) -> None:
        self.use()
        _call("cuIpcCloseMemHandle", ctypes.c_uint64(address))

    def enable_peer_access(self, peer: int) -> None:
        """Let this device's kernels reach memory that this process has on another one."""
        other = Device(peer)
        self.use()
        code = _driver().cuCtxEnablePeerAccess(other._context, ctypes.c_uint(0))
        if code not in (0, _PEER_ACCESS_ALREADY_ENABLED):
            raise CudaError(f"GPU {self.number} cannot reach GPU {peer}: error {code}")


def argument_pointers(arguments: ctypes.Structure) -> Any:
    """Where a kernel's arguments lie: the fields of a structure, which may change from launch to
    launch."""
    base = ctypes.addressof(arguments)
    offsets = [getattr(type(arguments), field[0]).offset for field in arguments._fields_]
    return (ctypes.c_void_p * len(offsets))(*(base + offset for offset in offsets))


def has_copy_batch() -> bool:
    """CUDA 13."""
    return hasattr(_driver(), "cuMemcpyBatchAsync_v2")

"""NCCL through its C API: the collectives of `CudaCommunicator` for messages too large for peer memory.

Calls go to torch's current stream and nothing else: no process group, no watchdog thread, no events between streams, so
that a captured CUDA graph contains the collective alone. Reference: NCCL's API documentation.
"""

import ctypes
import functools
import os
from typing import Any

import torch

from minisgl.errors import ConfigError, EngineError

SUM = 0  # ncclRedOp_t
# ncclDataType_t
DTYPES = {torch.int32: 2, torch.int64: 4, torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}


class UniqueId(ctypes.Structure):
    """ncclUniqueId, passed by value."""

    _fields_ = [("internal", ctypes.c_byte * 128)]


_PTR, _INT, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
_SIGNATURES: dict[str, list[Any]] = {
    "ncclGetUniqueId": [ctypes.POINTER(UniqueId)],
    "ncclCommInitRank": [ctypes.POINTER(_PTR), _INT, UniqueId, _INT],
    "ncclAllReduce": [_PTR, _PTR, _SIZE, _INT, _INT, _PTR, _PTR],  # send, receive, count, dtype, op, comm, stream
    "ncclBroadcast": [_PTR, _PTR, _SIZE, _INT, _INT, _PTR, _PTR],  # send, receive, count, dtype, root, comm, stream
    "ncclSend": [_PTR, _SIZE, _INT, _INT, _PTR, _PTR],  # buffer, count, dtype, peer, comm, stream
    "ncclRecv": [_PTR, _SIZE, _INT, _INT, _PTR, _PTR],
    "ncclGroupStart": [],
    "ncclGroupEnd": [],
    "ncclCommAbort": [_PTR],
}


def avoid_multicast() -> None:
    """NVLink multicast buys NCCL bandwidth at sizes that peer memory serves here, and a fault in it can take the NVLink
    fabric of the whole host down. Whoever wants it sets the variable."""
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")


@functools.cache
def load_nccl() -> Any:
    """The library, with its functions' signatures. Raises: ConfigError when there is none."""
    avoid_multicast()
    try:
        library = ctypes.CDLL("libnccl.so.2")  # that torch has loaded already, or the system's
    except OSError as error:
        raise ConfigError(f"there is no NCCL, which --disable-pynccl does without: {error}") from None
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, _INT
    library.ncclGetErrorString.argtypes, library.ncclGetErrorString.restype = [_INT], ctypes.c_char_p
    library.ncclGetLastError.argtypes, library.ncclGetLastError.restype = [_PTR], ctypes.c_char_p
    return library


def _call(name: str, *arguments: Any) -> None:
    """Raises: EngineError with NCCL's words."""
    nccl = load_nccl()
    if (status := getattr(nccl, name)(*arguments)) != 0:
        detail = (nccl.ncclGetLastError(None) or b"").decode(errors="replace").strip()
        text = nccl.ncclGetErrorString(status).decode()
        raise EngineError(f"{name}: {text}" + (f" ({detail})" if detail else "") + "; NCCL_DEBUG=WARN says more")


def unique_id() -> bytes:
    """128 bytes by which ranks find one another: made by rank 0, given to all."""
    result = UniqueId()
    _call("ncclGetUniqueId", ctypes.byref(result))
    return bytes(result)


class PyNccl:
    """One rank's NCCL communicator, on the device that is current when it is made. Tensors are contiguous.

    Raises: EngineError with NCCL's words, from any method.
    """

    def __init__(self, rank: int, size: int, identity: bytes) -> None:
        self.rank, self.size = rank, size
        self._comm = ctypes.c_void_p()
        _call("ncclCommInitRank", ctypes.byref(self._comm), size, UniqueId.from_buffer_copy(identity), rank)

    def all_reduce(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """out: like x, may be x."""
        assert out.shape == x.shape, (x.shape, out.shape)
        count, dtype, stream = _message(x, out)
        _call("ncclAllReduce", x.data_ptr(), out.data_ptr(), count, dtype, SUM, self._comm, stream)

    def broadcast(self, x: torch.Tensor) -> None:
        """Rank 0's x, in place."""
        count, dtype, stream = _message(x)
        _call("ncclBroadcast", x.data_ptr(), x.data_ptr(), count, dtype, 0, self._comm, stream)

    def gather(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """out: [size, *x.shape], filled on rank 0."""
        count, dtype, stream = _message(x, out)
        if self.rank == 0:
            out[0].copy_(x)
        _call("ncclGroupStart")
        if self.rank == 0:
            for peer in range(1, self.size):
                _call("ncclRecv", out[peer].data_ptr(), count, dtype, peer, self._comm, stream)
        else:
            _call("ncclSend", x.data_ptr(), count, dtype, 0, self._comm, stream)
        _call("ncclGroupEnd")

    def close(self) -> None:
        """Abort rather than destroy: destroying waits for the other ranks, which may be gone."""
        if self._comm:
            _call("ncclCommAbort", self._comm)
            self._comm = ctypes.c_void_p()


def _message(x: torch.Tensor, *others: torch.Tensor) -> tuple[int, int, int]:
    """How many elements, NCCL's number of their type, and the current stream."""
    assert not (strides := [one.stride() for one in (x, *others) if not one.is_contiguous()]), strides
    return x.numel(), DTYPES[x.dtype], torch.cuda.current_stream(x.device).cuda_stream

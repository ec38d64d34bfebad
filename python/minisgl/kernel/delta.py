"""Gated delta nets on NVIDIA GPUs: single tokens by `csrc/src/delta.cu`, products of chunks by `triton/delta.py`."""

import functools
from importlib.util import find_spec
from typing import Any

import torch

from minisgl.kernel.jit import load_kernel
from minisgl.kernel.state import DeltaState, DeltaWeights, StateOps, StateSequences, Tensor

_DTYPES = {torch.bfloat16: "__nv_bfloat16", torch.float16: "__half", torch.float32: "float"}
_CONVOLVE, _FINISH, _TOKENS, _DRAFTS = range(4)  # `Stage` in the source


def takes(k_dim: int, v_dim: int) -> bool:
    """Whether there are kernels for heads of these sizes."""
    return v_dim % 4 == 0 and max(k_dim, v_dim) <= 256 and find_spec("triton") is not None


@functools.cache
def _kernel(
    device: torch.device, dtype: torch.dtype, channels: int, width: int, num_v: int, k_dim: int, v_dim: int
) -> Any:
    """For one shape, compiled on first use."""
    shape = {"DIM_K": k_dim, "NUM_K": (channels - num_v * v_dim) // (2 * k_dim), "NUM_V": num_v, "DIM_V": v_dim}
    defines = {f"DELTA_{name}": n for name, n in (shape | {"WIDTH": width, "DTYPE": _DTYPES[dtype]}).items()}
    return load_kernel("delta", torch.cuda.get_device_capability(device), **defines).delta


class DeltaOps(StateOps):
    """With our kernels, where they take a shape."""

    def gated_delta_net(
        self, qkvz: Tensor, ba: Tensor, weights: DeltaWeights, state: DeltaState, seqs: StateSequences
    ) -> Tensor:
        """ba and qkvz: their rows may be parts of wider ones."""
        channels, num_tokens, (_, num_v, k_dim, v_dim) = len(weights.conv), len(qkvz), state.memory.shape
        if not takes(k_dim, v_dim):
            return super().gated_delta_net(qkvz, ba, weights, state, seqs)
        kernel = _kernel(qkvz.device, qkvz.dtype, *weights.conv.shape, num_v, k_dim, v_dim)
        is_captured = torch.cuda.is_current_stream_capturing()
        has_chunks = num_tokens > len(seqs.slots) and not (is_captured and seqs.held is not None)
        out, qkv = qkvz.new_empty(num_tokens, num_v * v_dim), qkvz.new_empty(num_tokens * has_chunks, channels)
        gates = qkvz.new_empty(2, num_tokens * has_chunks, num_v, dtype=torch.float32)
        args = qkvz, ba, *weights[:4], *state, *seqs, out, qkv, gates, weights.eps, is_captured
        if seqs.held is not None:
            kernel(_DRAFTS, *args)
        if has_chunks:
            from minisgl.kernel.triton.delta import delta_chunks

            kernel(_CONVOLVE, *args)
            delta_chunks(qkv, gates, state.memory, seqs, out)
            kernel(_FINISH, *args)
        kernel(_TOKENS, *args)
        return out

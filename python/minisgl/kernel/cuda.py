"""The operations on NVIDIA GPUs: our kernels where they apply, torch (cuBLAS) elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from minisgl.kernel.jit import load_kernel
from minisgl.kernel.ops import KVSlots, RopeAngles, TorchOps
from minisgl.kernel.sampling_reference import sample_reference

Tensor = torch.Tensor

KERNELS = ("elementwise", "sampling", "step")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_VOCAB = 1 << 19  # of the sampling kernel's fixed-point masses


def _whole_vectors(*tensors: Tensor) -> bool:
    """Whether each tensor's rows (its last dimension) can be read as aligned 16-byte vectors."""
    return all(
        t.dtype in DTYPES
        and t.stride(-1) == 1
        and t.shape[-1] * t.itemsize % 16 == 0
        and t.data_ptr() % 16 == 0
        and all(s * t.itemsize % 16 == 0 for s in t.stride()[:-1])
        for t in tensors
    )


@dataclass(frozen=True, slots=True)
class PreparedTokens:
    """What `CudaOps.prepare` writes for n tokens: static buffers of a captured graph."""

    input_ids: Tensor  # [n] int64
    positions: Tensor  # [n] int64
    slots: Tensor  # [n] int64
    seq_lens: Tensor | None  # [n] int32: position + 1; for decode batches, where a token is a sequence
    cos: Tensor  # [n, 1, head_dim] float32
    sin: Tensor  # [n, 1, head_dim] float32


class CudaOps(TorchOps):
    """For one GPU of compute capability `arch`. Compiles its kernels when it is made, on first use of the cache.

    Everything can be captured in a CUDA graph. Raises: ConfigError where the kernels cannot be compiled.
    """

    def __init__(self, arch: tuple[int, int]) -> None:
        self._elementwise, self._sampling, self._step = (load_kernel(name, arch) for name in KERNELS)

    def embedding(self, ids: Tensor, weight: Tensor, first: int = 0) -> Tensor:
        """Ids outside [first, first + len(weight)) belong to other ranks and give zeros."""
        if (
            not _whole_vectors(weight)
            or ids.dtype != torch.int64
            or not (ids.is_contiguous() and weight.is_contiguous())
        ):
            if first == 0:
                return super().embedding(ids, weight)
            local = ids - first
            here = (local >= 0) & (local < len(weight))
            return super().embedding(local.where(here, 0), weight).mul_(here[:, None])
        out = weight.new_empty(len(ids), weight.shape[1])
        self._elementwise.embedding(ids, weight, first, len(weight), out)
        return out

    def _norm_fits(self, x: Tensor, weight: Tensor) -> bool:
        fits = x.dim() == 2 and weight.dim() == 1 and weight.dtype == x.dtype and _whole_vectors(x, weight)
        return fits and x.shape[1] * x.itemsize <= 1 << 16

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if not self._norm_fits(x, weight):
            return super().rms_norm(x, weight, eps)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        self._elementwise.rms_norm(x, weight, eps, out)
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """residual += x in place → norm of the sum. For sums that come out of an all-reduce."""
        if not (self._norm_fits(x, weight) and residual.dtype == x.dtype and _whole_vectors(residual)):
            return super().rms_norm(residual.add_(x), weight, eps)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        self._elementwise.add_rms_norm(x, residual, weight, eps, out)
        return out

    def linear_add(self, x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor | None = None) -> Tensor:
        """cuBLAS adds the product to `residual` itself."""
        residual.addmm_(x, weight.T)
        return residual if bias is None else residual.add_(bias)

    def qk_norm_rope_store(
        self, qkv: Tensor, norm: Tensor | None, eps: float, rope: RopeAngles, cache: KVSlots
    ) -> Tensor:
        """→ a view of `qkv`, whose queries are rotated in place; its keys and values stay as they are."""
        num_kv, head_dim = cache.k.shape[1:]
        num_q = qkv.shape[1] - 2 * num_kv
        fits = head_dim % 8 == 0 and head_dim <= 256 and qkv.is_contiguous() and _whole_vectors(qkv, cache.k, cache.v)
        fits = fits and cache.k.dtype == cache.v.dtype == qkv.dtype and (norm is None or norm.dtype == qkv.dtype)
        if not fits:
            return super().qk_norm_rope_store(qkv, norm, eps, rope, cache)
        norm = None if norm is None else norm.contiguous()
        cos, sin = rope.cos.contiguous(), rope.sin.contiguous()
        self._elementwise.qk_norm_rope_store(
            qkv, num_q, num_kv, norm, eps, cos, sin, cache.k, cache.v, cache.slots.contiguous()
        )
        return qkv[:, :num_q]

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        inner = gate_up.shape[-1] // 2
        if gate_up.dim() != 2 or inner * gate_up.itemsize % 16 or not _whole_vectors(gate_up):
            return super().silu_and_mul(gate_up)
        out = torch.empty((len(gate_up), inner), dtype=gate_up.dtype, device=gate_up.device)
        self._elementwise.silu_and_mul(gate_up, out)
        return out

    def sample(
        self,
        logits: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        seed: Tensor,
        position: Tensor,
        out: Tensor,
        token_ids: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """As `sample_reference`, whose arguments these are; masses are rounded to 2^-44 of the largest."""
        sample = self._sampling.sample
        if logits.dtype not in DTYPES or logits.stride(-1) != 1 or logits.shape[-1] > MAX_VOCAB:
            sample = sample_reference
        sample(logits, temperature, top_k, top_p, min_p, seed, position, out, token_ids, rows)
        return out

    def prepare(
        self,
        rows: Tensor,
        positions: Tensor,
        token_ids: Tensor,
        page_table: Tensor,
        page_size: int,
        cos_sin: Tensor,
        out: PreparedTokens,
    ) -> None:
        """A step's ids, slots and angles, from the tables.

        rows, positions: [n] int32 of the tokens to compute; token_ids: [num_rows, max_len] int32; page_table:
        [num_rows, max_pages] int32; cos_sin: [max_positions, 2 * head_dim] float32, cos first, head_dim a multiple of 4.
        """
        self._step.prepare(
            rows,
            positions,
            token_ids,
            page_table,
            page_size,
            cos_sin,
            out.input_ids,
            out.positions,
            out.slots,
            out.seq_lens,
            out.cos,
            out.sin,
        )

    def scatter(self, target: Tensor, index: Tensor, value: Tensor) -> None:
        """target.view(-1)[index] = value; target and value: int32, index: [m] int32 or int64, negative ones skipped."""
        self._step.scatter(target, index, value)

    def apply_updates(
        self, page_table: Tensor, token_ids: Tensor, buffer: Tensor, num_pages: int, num_tokens: int
    ) -> None:
        """Update both tables from one staging buffer.

        buffer: int32, four lists one after the other: `num_pages` flat indices into page_table and as many values,
        `num_tokens` flat indices into token_ids and as many values. Negative indices are skipped, so that a buffer of
        fixed size can be part of a CUDA graph.
        """
        self._step.apply_updates(page_table, token_ids, buffer, num_pages, num_tokens)

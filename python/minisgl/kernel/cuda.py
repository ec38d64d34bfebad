"""The operations on NVIDIA GPUs: our kernels where they apply, torch (cuBLAS) elsewhere."""

import functools
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from minisgl.config.model import MoE
from minisgl.config.states import DeltaNet, State
from minisgl.errors import ConfigError
from minisgl.kernel import decode_gemm, delta, float8, packed_gemm, skinny
from minisgl.kernel.jit import load_kernel, side_by_side
from minisgl.kernel.ops import Around, Biases, Experts, KVSlots, Matrix, RopeAngles, Stacked, TorchMatrix, TorchOps
from minisgl.kernel.packed import Float8, Packed
from minisgl.kernel.sampling import SamplingColumns, TokenStore

logger = logging.getLogger(__name__)

Tensor = torch.Tensor

KERNELS = ("elementwise", "sampling", "logprobs", "step", "draft", "routing")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PACKED_WEIGHTS = 8 << 20  # to read so few takes a Hopper GPU less than what else a kernel does: they stay in 16 bits
SKINNY_TOKENS = 8  # of a large weight; up to twice as many of one whose reading takes less than a launch
TINY_WEIGHTS = 15 << 17  # and four times of one with so few elements
FEW_OUTPUTS = 1024  # of a router and all tokens, each by a block of its own; and what Hopper finds with choices:
ROUTED = 512, 32, 3072  # tokens, experts and features at most
MAX_VOCAB = 1 << 19  # of the sampling kernel's fixed-point masses


def _whole_vectors(*tensors: Tensor) -> bool:
    """Whether each tensor's rows (its last dimension) can be read as aligned 16-byte vectors."""
    for t in tensors:
        sizes = (t.shape[-1], *t.stride()[:-1])
        if t.dtype not in DTYPES or t.stride(-1) != 1 or t.data_ptr() % 16 or any(n * t.itemsize % 16 for n in sizes):
            return False
    return True


def tensor_at(
    address: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, strides: Sequence[int] = (1,)
) -> Tensor:
    """A tensor in a GPU's memory, which it does not keep. strides: in elements."""
    size = dtype.itemsize
    kind = {"version": 2, "typestr": f"<i{size}", "strides": tuple(stride * size for stride in strides)}  # no bfloat16
    interface = {**kind, "data": (address, False), "shape": shape}
    return torch.as_tensor(SimpleNamespace(__cuda_array_interface__=interface), device=device).view(dtype)


class CudaMatrix(TorchMatrix):
    """With the kernels for few tokens and for decode batches; cuBLAS where these do not fit, or are slower."""

    _ops: "CudaOps"

    def fused(self, x: Tensor, around: Around) -> Tensor | None:
        if around.gated and (around.bias is not None or self._activation != "silu"):
            return None
        (m, k), n, size = x.shape, around.num_out(len(self.weight)), self.weight.numel()
        few = SKINNY_TOKENS * (4 if size <= TINY_WEIGHTS else 2 if size <= decode_gemm.SMALL_WEIGHTS else 1)
        if m <= few and self.weight.is_contiguous() and skinny.takes(x, n, around.norm is not None):
            return skinny.linear(x, self.weight, around)
        if around.norm is None:  # otherwise it is asked again, with what is normalised
            fits = decode_gemm.supports(m, n, k, x.dtype) and decode_gemm.is_available(x.device)
            both = around.bias is not None and around.residual is not None
            if fits and self.weight.is_contiguous() and (found := decode_gemm.choose(m, n, k, around.gated, both)):
                return decode_gemm.linear(x, self.weight, around, found)
        if around.residual is None:
            return None
        around.residual.addmm_(x, self.weight.T)  # cuBLAS adds it by itself
        return around.residual if around.bias is None else around.residual.add_(around.bias)

    def norm_and_apply(self, x: Tensor, norm: Tensor, around: Around, spec: MoE | None = None) -> tuple[Tensor, Any]:
        (n, k), num = x.shape, len(self.weight)
        few, fits = n * num <= FEW_OUTPUTS and k * x.itemsize <= 1 << 14, _whole_vectors(x, norm, self.weight)
        routes = spec is not None and n <= ROUTED[0] and num <= ROUTED[1] and k <= ROUTED[2] and x.itemsize == 2
        fits = fits and (few or (routes and decode_gemm.is_available(x.device)))
        if not fits or x.dtype != norm.dtype or not self.weight.is_contiguous():
            return super().norm_and_apply(x, norm, around)
        inputs = x, norm, around.eps, self.weight, around.bias, torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if few or spec is None:
            self._ops.elementwise.norm_linear(*inputs, out := x.new_empty(n, num))
            return inputs[-1], out
        weights = x.new_empty(n, spec.num_experts_per_tok, dtype=torch.float32)
        experts = torch.empty_like(weights, dtype=torch.int32)
        kernel = load_kernel("norm_router", (9, 0), MINISGL_FP16=int(x.dtype == torch.float16))
        kernel.norm_router(*inputs, weights, experts, spec.sums_to_1)
        return inputs[-1], (weights, experts)

    def rows(self, ids: Tensor, first: int = 0) -> Tensor:
        if not (_whole_vectors(self.weight) and self.weight.is_contiguous()):
            return super().rows(ids, first)
        out = self.weight.new_empty(len(ids), self.weight.shape[1])
        self._ops.elementwise.embedding(ids, self.weight, first, len(self.weight), out)
        return out


class TritonOps(TorchOps):
    """Torch's operations, but for the mixture of experts, which torch cannot compute without waiting for the device."""

    def __init__(self, moe_backend: str = "triton", arch: tuple[int, int] = (0, 0)) -> None:
        """moe_backend: "triton" or "torch". arch: of a GPU with kernels in CUDA; (0, 0): there are none."""
        self._moe_backend, self._arch = moe_backend, arch

    def experts(self, stacks: Sequence[Stacked | None], spec: MoE, biases: Biases) -> Experts | None:
        found = [stack for stack in stacks if stack is not None]
        if len(found) < 2 or self._moe_backend == "torch" or spec.activation not in ("silu", "clamped_swiglu"):
            return None
        from minisgl.kernel.triton.grouped_gemm import fused_moe, stack_of

        made = (stack_of(stack, gated, self._arch) for stack, gated in zip(found, (True, False), strict=True))
        first, second = (replace(stack, bias=bias) for stack, bias in zip(made, biases or (None, None), strict=True))
        kind = spec.num_experts_per_tok, spec.sums_to_1, None, spec.activation == "clamped_swiglu", self._arch
        return lambda x, logits, residual=None: fused_moe(x, logits, first, second, *kind, residual)


class CudaOps(delta.DeltaOps, TritonOps):
    """For GPUs of compute capability `arch`. Compiles its kernels when it is made, on first use of the cache.

    Everything can be captured in a CUDA graph. Raises: ConfigError where the kernels cannot be compiled."""

    def __init__(self, arch: tuple[int, int], moe_backend: str = "triton") -> None:
        super().__init__(moe_backend, arch)
        loaded = [load_kernel(name, arch) for name in KERNELS]
        self.elementwise, self._sampling, self._logprobs, self._step, self.draft, _ = loaded
        self.most_ruled, self.late_from = self._sampling.most_ruled(torch.cuda.current_device()), 64
        self.scatter, self.store_ids = self._step.scatter, self._step.store_ids  # type: ignore[method-assign]

    def captures_chunks(self, kinds: Sequence[State]) -> bool:
        return all(isinstance(kind, DeltaNet) and delta.takes(kind.k_dim, kind.v_dim) for kind in kinds)

    def matrix(self, weight: Tensor, activation: str | None = None) -> Matrix:
        return CudaMatrix(self, weight, activation)

    def packed_matrix(self, parts: Sequence[Packed], dtype: torch.dtype, activation: str | None = None) -> Matrix:
        """Kept packed where there are kernels for all parts in one matrix, and they are worth it."""
        is_small = self._arch == (9, 0) and sum(math.prod(part.shape) for part in parts) <= PACKED_WEIGHTS
        if dtype == torch.float32 or is_small:
            return super().packed_matrix(parts, dtype, activation)
        if (codes := packed_gemm.codes_of(parts)) is not None:
            return packed_gemm.PackedMatrix(self, self._arch, codes, dtype, activation)
        floats = [part for part in parts if isinstance(part, Float8)]
        if len(floats) == len(parts) and (weight := float8.merge(floats)) is not None:
            known = [part.input_scale for part in floats if part.input_scale is not None]
            input_scale = max(known) if len(known) == len(parts) else None
            return float8.Float8Matrix(self, weight, dtype, input_scale, activation)
        return super().packed_matrix(parts, dtype, activation)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, late: Tensor | None = None) -> Tensor:
        fits = x.dim() == 2 and weight.dim() == 1 and weight.dtype == x.dtype and _whole_vectors(x, weight)
        if not fits or x.shape[1] * x.itemsize > 1 << 16:
            return super().rms_norm(x, weight, eps, late)
        self.elementwise.rms_norm(x, weight, eps, out := torch.empty(x.shape, dtype=x.dtype, device=x.device), late)
        return out

    def norm_rope_store(self, qkv: Tensor, norm: Tensor | None, eps: float, rope: RopeAngles, cache: KVSlots) -> Tensor:
        """→ a view of `qkv`, whose queries are rotated in place; its keys and values stay as they are."""
        num_kv, head_dim = cache.k.shape[1:]
        num_q = qkv.shape[1] - 2 * num_kv
        fits = head_dim % 8 == 0 and head_dim <= 256 and qkv.stride(1) == head_dim and _whole_vectors(qkv)
        fits = fits and all(x.is_contiguous() and x.dtype in (qkv.dtype, torch.uint8) for x in (cache.k, cache.v))
        if not fits or (norm is not None and norm.dtype != qkv.dtype):
            return super().norm_rope_store(qkv, norm, eps, rope, cache)
        norm = None if norm is None else norm.contiguous()
        cos, sin, slots = (tensor.contiguous() for tensor in (rope.cos, rope.sin, cache.slots))
        self.elementwise.qk_norm_rope_store(qkv, num_q, num_kv, norm, eps, cos, sin, cache.k, cache.v, slots)
        return qkv[:, :num_q]

    def act_and_mul(self, gate_up: Tensor, activation: str = "silu") -> Tensor:
        inner = gate_up.shape[-1] // 2
        fits = gate_up.dim() == 2 and inner * gate_up.itemsize % 16 == 0 and _whole_vectors(gate_up)
        if not fits or activation != "silu":
            return super().act_and_mul(gate_up, activation)
        self.elementwise.silu_and_mul(gate_up, out := gate_up.new_empty(len(gate_up), inner))
        return out

    def sample(self, logits: Tensor, columns: SamplingColumns, out: Tensor, store: TokenStore | None = None) -> Tensor:
        """Masses are rounded to 2^-44 of the largest."""
        if logits.dtype not in DTYPES or logits.stride(-1) != 1 or logits.shape[-1] > MAX_VOCAB:
            return super().sample(logits, columns, out, store)
        self._sampling.sample(logits, columns.words, out, *(store or (None,) * 3))
        return out

    def by_kernel(self, name: str, logits: Tensor, *others: Tensor | None) -> bool:
        if fits := name == "log_probabilities" and logits.dtype in DTYPES and logits.stride(-1) == 1:
            self._logprobs.log_probabilities(logits, *others)
        return fits

    def step_inputs(
        self, rows: Tensor, positions: Tensor, token_ids: Tensor, page_tables: Sequence[Tensor], page_size: int,
        angles: Sequence[Tensor],
    ) -> tuple[Tensor, list[Tensor], list[RopeAngles]]:  # fmt: skip
        num, ropes = len(rows), list[RopeAngles]()
        if any(table.shape[1] % 8 for table in angles):
            return super().step_inputs(rows, positions, token_ids, page_tables, page_size, angles)
        ids, *slots = (torch.empty(num, dtype=torch.int64, device=rows.device) for _ in range(1 + len(page_tables)))
        for i in range(max(len(angles), len(page_tables))):  # a launch writes again what there is less of
            table, last = angles[min(i, len(angles) - 1)], min(i, len(page_tables) - 1)
            cos, sin = (table.new_empty(num, 1, table.shape[1] // 2) for _ in range(2))
            tables = token_ids, page_tables[last], page_size, table
            self._step.prepare(rows, positions, *tables, ids, slots[last], cos, sin)
            ropes.append(RopeAngles(cos, sin))
        return ids, slots, ropes


def create_cuda_ops(device: torch.device, dtype: torch.dtype, moe_backend: str) -> TorchOps:
    """Our kernels where they can be compiled; torch's operations, with a warning, elsewhere."""
    try:
        compile_kernels(device, dtype)
        return CudaOps(torch.cuda.get_device_capability(device), moe_backend)
    except ConfigError as error:
        logger.warning("the fused kernels are not available, decoding will be slower: %s", error)
        return TritonOps(moe_backend)


def compile_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """Have what `CudaOps` and its products need for a dtype, compiled side by side. Raises: ConfigError."""
    tasks = [functools.partial(load_kernel, name, torch.cuda.get_device_capability(device)) for name in KERNELS]
    for module, is_there in ((skinny, skinny.shared_memory(device)), (decode_gemm, decode_gemm.is_available(device))):
        if dtype != torch.float32 and is_there:
            tasks += [functools.partial(module.prepare, device, dtype, tile) for tile in module.TOKEN_TILES]
    if dtype != torch.float32 and decode_gemm.is_available(device):
        tasks.append(functools.partial(load_kernel, "norm_router", (9, 0), MINISGL_FP16=int(dtype == torch.float16)))
    begin = time.perf_counter()
    side_by_side(tasks)
    logger.info("kernels ready after %.1f s", time.perf_counter() - begin)

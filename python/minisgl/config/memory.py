"""How many tokens' keys and values fit beside the weights, and what follows for the longest request."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from minisgl.config.args import ServerArgs
from minisgl.config.model import DTYPE_BYTES, ModelConfig
from minisgl.config.probe import Capabilities, Gpu
from minisgl.errors import ConfigError
from minisgl.utils.math import div_ceil

logger = logging.getLogger(__name__)

GIB = 2**30
_GPU_RESERVE = GIB  # bytes: CUDA's context, libraries' workspaces, captured graphs
_ESTIMATE = 0.9  # share of an estimated KV cache that is counted on, before the engine has measured


def cpu_pages(
    args: ServerArgs, model: ModelConfig, machine: Capabilities, dtype: str, kv_dtype: str, page_size: int, seq_len: int
) -> int:
    """dtype: of the weights, or "int8".

    Pages that fit the memory, and no more than all running requests could ever use. Memory is taken on first use."""
    tp_size = args.tensor_parallel_size
    budget = int(machine.memory * args.memory_ratio) // tp_size - model.weight_bytes(dtype, tp_size)
    budget -= args.max_running_requests * model.state_bytes_per_row(kv_dtype)
    affordable = budget // max(1, model.kv_bytes_per_token(kv_dtype, tp_size) * page_size)
    if affordable < 1:
        weights = model.weight_bytes(dtype, tp_size) * tp_size / GIB
        raise ConfigError(
            f"--memory-ratio {args.memory_ratio}: {machine.memory / GIB:.1f} GiB of memory are available, "
            f"the weights take {weights:.1f} GiB, and no room is left for the KV cache"
        )
    return min(affordable, args.max_running_requests * div_ceil(seq_len, page_size))


def gpu_budget(gpu: Gpu, ratio: float) -> int:
    """Bytes of a GPU that one rank may take: the share `ratio` of the whole, less what other programs hold."""
    return gpu.free_memory - int(gpu.total_memory * (1 - ratio))


def gpu_tokens(
    args: ServerArgs, model: ModelConfig, gpus: Sequence[Gpu], dtype: str, kv_dtype: str, page_size: int, step_len: int
) -> int:
    """Tokens that the KV cache will hold at least, by estimate: the engine measures what a step of `step_len` takes.

    Raises: ConfigError when the weights, or the pages that were asked for, do not fit.
    """
    tp_size, ratio = args.tensor_parallel_size, args.memory_ratio
    gpu = min(gpus, key=lambda gpu: gpu_budget(gpu, ratio))
    budget = gpu_budget(gpu, ratio) - args.max_running_requests * model.state_bytes_per_row(kv_dtype)
    weights, kv_bytes = model.weight_bytes(dtype, tp_size), max(1, model.kv_bytes_per_token(kv_dtype, tp_size))
    room = f"{gpu} has {gpu.free_memory / GIB:.1f} of {gpu.total_memory / GIB:.1f} GiB free"
    if args.num_pages is not None:
        kv = args.num_pages * page_size * kv_bytes
        if weights + kv > budget:
            raise ConfigError(
                f"--num-pages {args.num_pages}: {room}, the weights take {weights / GIB:.1f} GiB and the KV cache "
                f"{kv / GIB:.1f}; lower it, or raise --memory-ratio {ratio} or --tensor-parallel-size {tp_size}"
            )
        return args.num_pages * page_size
    step = _step_bytes(model, dtype, tp_size, step_len, args.max_running_requests)
    tokens = int((budget - weights - step - _GPU_RESERVE) / kv_bytes * _ESTIMATE)
    if tokens < page_size:
        raise ConfigError(
            f"--memory-ratio {ratio}: {room}, the weights take {weights / GIB:.1f} GiB, a step {step / GIB:.1f}, and "
            f"no room is left for the KV cache; raise --tensor-parallel-size {tp_size}, free the GPU, or lower "
            f"--max-prefill-length {step_len}"
        )
    return tokens // page_size * page_size


def _step_bytes(model: ModelConfig, dtype: str, tp_size: int, step_len: int, num_logits: int) -> int:
    """About what the activations of the largest step take: the widest of a layer, and logits with a float32 copy."""
    inner = max(layer.mlp.active_features for layer in model.layers)
    per_token = 4 * model.hidden_size + (3 * inner + 2 * model.num_qo_heads * model.head_dim) // tp_size
    return step_len * per_token * DTYPE_BYTES[dtype] + num_logits * model.vocab_size * (DTYPE_BYTES[dtype] + 4)


def fit_seq_len(args: ServerArgs, wanted: int, capacity: int) -> int:
    """One request must be able to run alone in a KV cache of `capacity` tokens."""
    if wanted <= capacity:
        return wanted
    if args.max_seq_len is not None:
        raise ConfigError(
            f"--max-seq-len {wanted}: the KV cache holds {capacity} tokens; see --num-pages and --memory-ratio"
        )
    if capacity < 2:
        raise ConfigError("--num-pages: the KV cache must hold at least 2 tokens")
    logger.warning("the KV cache holds %d tokens: --max-seq-len is lowered to that from %d", capacity, wanted)
    return capacity

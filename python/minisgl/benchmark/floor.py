"""The least time that a workload can take: what must be read and multiplied, over what the machine reaches.

A step of continuous batching reads all weights once and the KV cache of every decoding request, and reads and writes
its states; prompts cost their products. Each is divided by a ceiling that was measured, and nothing else is counted. It
is a bound for any engine, as the roofline model has it (Williams, Waterman and Patterson, "Roofline", CACM 2009).
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from minisgl.config.model import ModelConfig, MoE, PagedKV


@dataclass(frozen=True, slots=True)
class Machine:
    """Ceilings of one GPU: bandwidth in bytes/s, of copies; flops in FLOP/s, of large bf16 products.

    name: of the GPU, or where the figures come from. Default: an H200, as measured.
    """

    bandwidth: float = 4.3e12
    flops: float = 788e12
    name: str = "an H200's"

    def __str__(self) -> str:
        return f"{self.name}: {self.bandwidth / 1e12:.3g} TB/s, {self.flops / 1e12:.4g} TFLOP/s"


def measure_gpu(seconds: float = 1.0) -> Machine | None:
    """The ceilings of the first GPU, each measured for so long; None where there is none, or too little memory."""
    import torch

    if not torch.cuda.is_available():
        return None
    try:
        num_bytes, size = min(2**30, torch.cuda.mem_get_info()[0] // 4), 8192
        buffers = torch.empty(2, num_bytes, dtype=torch.uint8, device="cuda")
        copy = _best_seconds(lambda: buffers[0].copy_(buffers[1]), seconds)
        matrices = torch.randn(2, size, size, dtype=torch.bfloat16, device="cuda")
        product = _best_seconds(lambda: matrices[0] @ matrices[1], seconds)
    except torch.OutOfMemoryError:
        return None
    return Machine(2 * num_bytes / copy, 2 * size**3 / product, f"{torch.cuda.get_device_name()}, measured")


def _best_seconds(launch: Callable[[], object], seconds: float) -> float:
    """Of one launch, on the device: the best mean of ten in a row, over so many seconds."""
    import torch

    event: Any = torch.cuda.Event
    begin, end = event(enable_timing=True), event(enable_timing=True)
    best, deadline = math.inf, time.monotonic() + seconds
    while time.monotonic() < deadline:
        begin.record()
        for _ in range(10):
            launch()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / 1e4)
    return best


@dataclass(frozen=True, slots=True)
class Floor:
    """Seconds, by what they are spent on, over `num_steps` steps."""

    kv: float = 0.0
    weights: float = 0.0
    prefill: float = 0.0
    num_steps: int = 0

    @property
    def seconds(self) -> float:
        return self.kv + self.weights + self.prefill


def floor_of(
    model: ModelConfig, dtype: str, requests: Sequence[tuple[int, int, int]], machine: Machine, tp_size: int = 1,
    max_running: int = 256, kv_dtype: str | None = None,
) -> Floor:  # fmt: skip
    """The floor of requests (prompt tokens, output tokens, cached prompt tokens) that are all submitted at once.

    A waiting request is prefilled whole, in the step after one has ended; the step gives its first output token.
    dtype: what weights are held as (`config.device.kept_as`); products with fp8 run at twice the machine's rate.
    kv_dtype: None: dtype.
    """
    waiting = list(reversed(requests))
    running: list[list[int]] = []  # context length, tokens left
    kv_bytes = weight_bytes = flops = 0.0
    num_steps = 0
    while waiting or running:
        kv_bytes += kv_read(model, kv_dtype or dtype, [length for length, _ in running], tp_size)
        admitted = [waiting.pop() for _ in range(min(len(waiting), max_running - len(running)))]
        flops += sum(prefill_flops(model, num_prompt, num_cached) for num_prompt, _, num_cached in admitted) / tp_size
        running += [[num_prompt, num_output] for num_prompt, num_output, _ in admitted]
        num_tokens = len(running) - len(admitted) + sum(num_prompt for num_prompt, _, _ in admitted)
        weight_bytes += weights_read(model, dtype, num_tokens, tp_size)
        running = [[length + 1, left - 1] for length, left in running if left > 1]
        num_steps += 1
    has_fp8 = dtype == "fp8" or (model.quantization is not None and model.quantization.layout == "float8")
    seconds = flops / machine.flops / (1 + has_fp8)
    return Floor(kv_bytes / machine.bandwidth, weight_bytes / machine.bandwidth, seconds, num_steps)


def kv_read(model: ModelConfig, dtype: str, lengths: Sequence[int], tp_size: int = 1) -> float:
    """Bytes of KV that one rank reads to decode requests of these context lengths (the new token included), and of what
    delta nets remember, which it also writes."""
    windows = Counter(layer.attention.window for layer in model.layers if isinstance(layer.attention.cache, PagedKV))
    tokens = sum(count * sum(min(n, window or n) for n in lengths) for window, count in windows.items())
    remembered = sum(prod(shape) for state in model.states for shape in state.shapes(tp_size)[1:])
    per_token = model.kv_bytes_per_token(dtype, tp_size) / max(1, len(model.caches()))
    return per_token * tokens + 2 * 4 * remembered * len(lengths)


def weights_read(model: ModelConfig, dtype: str, num_tokens: int, tp_size: int = 1) -> float:
    """Bytes of weights that one rank reads in a step of `num_tokens`: all but the rows of the embedding that it does
    not look up, and the experts that no token is expected to choose."""
    num_bytes: float = model.weight_bytes(dtype, tp_size)
    each = num_bytes / model.weight_bytes("int8", tp_size)
    experts = [(layer.mlp, 3 * layer.mlp.intermediate_size) for layer in model.layers if isinstance(layer.mlp, MoE)]
    sizes = [(moe, features * model.hidden_size / tp_size) for moe, features in experts]
    if model.quantization is not None and model.quantization.layout == "mxfp4":  # of experts, and of nothing else
        each = 17 / 32
        num_bytes = 2.0 * model.weight_bytes("int8", tp_size)
        num_bytes -= sum(moe.num_experts * size for moe, size in sizes) * (2 - each)
    if not model.tie_word_embeddings:  # which checkpoints of few bits store in 16
        num_bytes -= model.vocab_size * model.hidden_size / tp_size * (2 if model.quantization else each)
    for moe, size in sizes:
        idle = (1 - moe.num_experts_per_tok / moe.num_experts) ** num_tokens
        num_bytes -= moe.num_experts * idle * size * each
    return num_bytes


def prefill_flops(model: ModelConfig, num_tokens: int, num_cached: int = 0) -> float:
    """Operations of one prompt on all ranks: products, causal attention, rules of states, and the head once."""
    queries, weights, pairs = model.num_qo_heads * model.head_dim, 0, 0.0
    for spec in (layer.attention for layer in model.layers):
        weights += model.attention_weights(spec)
        if isinstance(spec.cache, PagedKV):
            seen, known = (min(n, spec.window or n) for n in (num_tokens, num_cached))
            pairs += seen * (num_tokens - seen / 2) - known * (num_cached - known / 2)
        else:
            weights += 3 * sum(map(prod, spec.cache.shapes(1)[1:]))
    weights += sum(3 * layer.mlp.active_features * model.hidden_size for layer in model.layers)
    return 2 * ((num_tokens - num_cached) * weights + 2 * queries * pairs + model.vocab_size * model.hidden_size)

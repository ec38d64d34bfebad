"""How much KV cache fits a GPU: beside the weights, and what the largest step takes."""

import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from minisgl.config.runtime import EngineConfig
from minisgl.core import Admission, PageUpdate, SamplingParams, ScheduledReq, StepPlan
from minisgl.distributed.comm import Communicator
from minisgl.errors import ConfigError
from minisgl.utils.math import div_ceil

logger = logging.getLogger(__name__)
WARM_UP_TOKENS = (64, 512, 1024, 2048)
_GRAPH_RESERVE = 512 << 20  # bytes for graphs and library workspaces that the largest step did not show


def large_step(config: EngineConfig, num_tokens: int) -> StepPlan:
    """A step of so many tokens, of as many requests as there can be. All use the same pages: what they compute does not
    matter, and large pages for each would take more than there is."""
    num_reqs = min(config.max_running_requests, num_tokens)
    lengths, left = list[int](), num_tokens - num_reqs
    for _ in range(num_reqs):
        lengths.append(1 + min(left, config.max_seq_len - 2))
        left -= lengths[-1] - 1
    admissions, updates, reqs, params = [], [], [], SamplingParams(temperature=0.8, top_p=0.9, seed=0)
    for row, length in enumerate(reversed(lengths)):  # the shortest first: those of one token are decode
        admissions.append(Admission(row, np.zeros(length, np.int32), params))
        pages = tuple(range(div_ceil(length, config.page_size)))
        updates.append(PageUpdate(row, 0, pages, pages if config.window else ()))
        reqs.append(ScheduledReq(row, 0, length, 1))
    return StepPlan(0, tuple(admissions), tuple(updates), tuple(reqs), lengths.count(1))


def activation_bytes(config: EngineConfig, launch: Callable[[StepPlan], object]) -> int:
    """What the largest step takes: it is computed once to see it."""
    for num_tokens in WARM_UP_TOKENS:  # libraries load kernels by size, and Triton compiles some
        if num_tokens < config.max_prefill_length:
            launch(large_step(config, num_tokens))
    torch.cuda.reset_peak_memory_stats()
    launch(large_step(config, config.max_prefill_length))
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()


def pages_that_fit(config: EngineConfig, comm: Communicator, activations: int) -> tuple[int, int]:
    """How many pages the KV cache has, and layers whose windows slide, the same on every rank; one more of each, for
    padding, fits beside them.

    Raises: ConfigError where these are fewer than are asked for, or than one request may need."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    budget = free - int(total * (1 - config.memory_ratio)) - activations - _GRAPH_RESERVE
    budget = comm.all_reduce_min(budget) - config.state_bytes - config.kv_bytes(1, 1)
    pages, kv_bytes = config.pages_for(budget), config.kv_bytes(*config.pages_for(budget))
    needed = div_ceil(config.max_seq_len, config.page_size)
    if kv_bytes > budget or pages[0] < needed:
        affordable = max(0, replace(config, num_pages=0).pages_for(budget)[0])
        raise ConfigError(
            f"--memory-ratio {config.memory_ratio}: the KV cache would hold {affordable} pages of "
            f"{config.page_size} tokens, {max(config.num_pages, needed)} are needed; raise it, lower "
            "--max-seq-len, --num-pages or --max-prefill-length, or use more GPUs"
        )
    logger.info("KV cache: %.1f GiB, activations: %.2f GiB", kv_bytes / 2**30, activations / 2**30)
    # More than all running requests could ever use would only be cache, and that is welcome: nothing is cut off.
    return pages

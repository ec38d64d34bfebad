"""FlashInfer (arXiv 2501.01005), an optional package. What it computes is said in `config/cuda.py`.

It schedules a step on the host before the step runs. For decode that is the one thing that other backends do not have:
`plan_decode` before each step, before a capture too, which refills the buffers that a CUDA graph reads.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from minisgl.errors import ConfigError

Tensor = torch.Tensor
WORKSPACE_BYTES = 256 << 20  # partial results of split sequences; shared, as launches follow one another


class FlashInferBackend:
    """Same interface as `TritonBackend`, and `plan_decode`. `shape.windows` lists the windows that layers have; batches
    carry rows_cpu [n] and page_table_cpu, numpy arrays, too. Raises: ConfigError when FlashInfer cannot be imported."""

    def __init__(self, shape: Any, device: torch.device) -> None:
        try:
            self._library = importlib.import_module("flashinfer")
        except (ImportError, OSError) as error:
            problem = f"--attention-backend fi needs flashinfer ({error}): pip install flashinfer-python==0.6.14"
            raise ConfigError(problem) from error
        self._shape, self._device = shape, device
        self._windows: tuple[int | None, ...] = tuple(dict.fromkeys(shape.windows))
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._tensor_cores = shape.num_qo_heads // shape.num_kv_heads >= 4
        new_prefill = self._library.BatchPrefillWithPagedKVCacheWrapper
        self._prefills = {window: new_prefill(self._workspace, "NHD") for window in self._windows}
        self._decodes = {window: self._decode_wrapper(None) for window in self._windows}
        self._captured: dict[int, dict[int | None, Any]] = {}  # by batch size
        self._current = self._decodes
        self._planned: Any = None

    def prefill(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, window: int | None, batch: Any) -> Tensor:
        """q: [num_tokens, num_qo_heads, head_dim] → the same shape."""
        if batch is not self._planned:  # every layer gets the same object
            self._planned, offsets, pages = batch, _offsets(batch.num_new_cpu), list(_page_lists(batch))
            for planned, wrapper in self._prefills.items():
                wrapper.plan(offsets, *pages, *self._heads(batch), causal=True, **self._options(planned))
        return self._run(self._prefills[window], q, k_cache, v_cache, batch.page_size)

    def plan_decode(self, batch: Any, graph: bool = False) -> None:
        """Before each step that decodes, outside of any graph. With `graph` the step is captured, or replayed, for this
        batch's size, padding included: its buffers stay where they are."""
        self._current = self._decodes
        if graph:
            size = len(batch.rows_cpu)
            if size not in self._captured:
                self._captured[size] = {window: self._decode_wrapper(size) for window in self._windows}
            self._current = self._captured[size]
        pages = list(_page_lists(batch))
        for window, wrapper in self._current.items():
            wrapper.plan(*pages, *self._heads(batch), **self._options(window))

    def decode(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, window: int | None, batch: Any) -> Tensor:
        """As `prefill`, of one token per sequence, of the batch that was planned last."""
        return self._run(self._current[window], q, k_cache, v_cache, batch.page_size)

    def _decode_wrapper(self, batch_size: int | None) -> Any:
        """batch_size: of a graph; None outside of graphs, for any size."""
        options: dict[str, Any] = {"use_tensor_cores": self._tensor_cores}
        if batch_size is not None:
            max_pages = -(-self._shape.max_seq_len // self._shape.page_size)
            sizes = {"indptr": batch_size + 1, "indices": batch_size * max_pages, "last_page_len": batch_size}
            for key, size in sizes.items():
                options[f"paged_kv_{key}_buffer"] = torch.zeros(size, dtype=torch.int32, device=self._device)
            options["use_cuda_graph"] = True
        return self._library.BatchDecodeWithPagedKVCacheWrapper(self._workspace, "NHD", **options)

    def _heads(self, batch: Any) -> tuple[int, int, int, int]:
        return self._shape.num_qo_heads, self._shape.num_kv_heads, self._shape.head_dim, batch.page_size

    def _options(self, window: int | None) -> dict[str, Any]:
        """window_left counts the tokens before a position, which itself is not among them."""
        dtype = self._shape.dtype
        return {"window_left": window - 1 if window else -1, "q_data_type": dtype, "kv_data_type": dtype}

    def _run(self, wrapper: Any, q: Tensor, k_cache: Tensor, v_cache: Tensor, page_size: int) -> Tensor:
        shape = (-1, page_size, *k_cache.shape[1:])
        out: Tensor = wrapper.run(q.contiguous(), (k_cache.view(shape), v_cache.view(shape)))
        return out


def _page_lists(batch: Any) -> Iterator[Tensor]:
    """FlashInfer's three tensors, int32 on the host: offsets into the list of pages [n + 1], the list, and how many
    tokens each sequence's last page holds [n]."""
    seq_lens = batch.starts_cpu + batch.num_new_cpu
    counts = -(-seq_lens // batch.page_size)
    yield _offsets(counts)
    used = np.arange(int(counts.max(initial=0))) < counts[:, None]
    pages = batch.page_table_cpu[batch.rows_cpu, : used.shape[1]][used]
    yield torch.from_numpy(np.ascontiguousarray(pages, dtype=np.int32))
    yield torch.from_numpy(((seq_lens - 1) % batch.page_size + 1).astype(np.int32))


def _offsets(counts: npt.NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(np.concatenate(([0], np.cumsum(counts))).astype(np.int32))

"""FlashInfer (arXiv 2501.01005) and FlashAttention-3 (arXiv 2407.08608), of packages that `config.device` has found."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from minisgl.attention.base import AttentionBackend, AttentionShape, AttentionStep, IntArray, Tensor
from minisgl.config.model import AttentionSpec
from minisgl.core import MAX_COUNT
from minisgl.kernel.ops import PagedSequences
from minisgl.kvcache.pool import LayerCache

WORKSPACE_BYTES = 256 << 20  # partial results of split sequences; shared, as launches follow one another
Wrappers = dict[int | None, Any]  # FlashInfer's objects, which hold a plan, by the window of layers


class FlashInferBackend(AttentionBackend[Wrappers]):
    """It schedules a step on the host before it runs, and refills the buffers that a CUDA graph reads."""

    plans_captured = True

    def __init__(self, shape: AttentionShape, device: torch.device) -> None:
        import flashinfer

        self._library, self._shape, self._device = flashinfer, shape, device
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._tensor_cores = shape.num_qo_heads // shape.num_kv_heads >= 4
        new_prefill = self._library.BatchPrefillWithPagedKVCacheWrapper
        self._prefills: Wrappers = {window: new_prefill(self._workspace, "NHD") for window in shape.windows}
        self._decodes: dict[int | None, Wrappers] = {}  # by the batch size of a graph, padding included; None: of any

    def prepare(self, step: AttentionStep, captured: bool) -> Wrappers:
        shape, pages = self._shape, list(page_lists(step))
        heads = shape.num_qo_heads, shape.num_kv_heads, shape.head_dim, step.page_size
        options: dict[str, Any] = {"q_data_type": shape.dtype, "kv_data_type": shape.dtype}
        if step.is_decode:
            size = len(step.rows) if captured else None
            if size not in self._decodes:
                self._decodes[size] = {window: self._decode_wrapper(size) for window in shape.windows}
            wrappers = self._decodes[size]
        else:
            wrappers = self._prefills
            pages.insert(0, _int32(step.offsets))
            options["causal"] = True
        for window, wrapper in wrappers.items():  # window_left counts the tokens before a position, without itself
            if step.window in (None, window or 0):
                wrapper.plan(*pages, *heads, window_left=window - 1 if window else -1, **options)
        return wrappers

    def forward(self, q: Tensor, cache: LayerCache, spec: AttentionSpec, metadata: Wrappers, *_: object) -> Tensor:
        pages = tuple(x.unflatten(0, (-1, self._shape.page_size)) for x in cache)
        out: Tensor = metadata[spec.window].run(q.contiguous(), pages)
        return out

    def _decode_wrapper(self, batch_size: int | None) -> Any:
        """batch_size: of a graph, for which the buffers stay where they are; None: for any size, outside of graphs."""
        options: dict[str, Any] = {"use_tensor_cores": self._tensor_cores}
        if batch_size is not None:
            max_pages = -(-self._shape.max_seq_len // self._shape.page_size)
            sizes = {"indptr": batch_size + 1, "indices": batch_size * max_pages, "last_page_len": batch_size}
            for key, size in sizes.items():
                options[f"paged_kv_{key}_buffer"] = torch.zeros(size, dtype=torch.int32, device=self._device)
            options["use_cuda_graph"] = True
        return self._library.BatchDecodeWithPagedKVCacheWrapper(self._workspace, "NHD", **options)


def page_lists(step: AttentionStep) -> Iterator[Tensor]:
    """FlashInfer's tensors, int32 on the host: offsets into the list of pages [n + 1], it, tokens in last pages [n]."""
    seq_lens = step.seq_lens
    counts = -(-seq_lens // step.page_size)
    yield _int32(np.concatenate(([0], np.cumsum(counts))))
    index = np.arange(int(counts.max(initial=0)))
    first = np.maximum(0, step.starts - (step.window or MAX_COUNT) + 1) // step.page_size  # before it are others' pages
    pages = step.page_table[step.rows[:, None], np.maximum(index, first[:, None])]
    yield _int32(pages[index < counts[:, None]])
    yield _int32((seq_lens - 1) % step.page_size + 1)


def _int32(array: IntArray | npt.NDArray[np.int32]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32))


class FlashMetadata(NamedTuple):
    """pages: of each sequence, as from `gather_pages`; None: they are gathered by each layer, since what was gathered
    before a capture must not be frozen into the graph."""

    seqs: PagedSequences
    pages: Tensor | None
    max_q_len: int


class FlashAttentionBackend(AttentionBackend[FlashMetadata]):
    """FlashAttention-3, over whole pages."""

    def __init__(self, shape: AttentionShape, _device: torch.device) -> None:
        from sgl_kernel.flash_attn import flash_attn_with_kvcache

        self._attend, self._max_seq_len = flash_attn_with_kvcache, shape.max_seq_len

    def prepare(self, step: AttentionStep, captured: bool) -> FlashMetadata:
        seqs = step.on_device()
        pages = None if captured else gather_pages(seqs, int(step.seq_lens.max()), step.window or 0)
        return FlashMetadata(seqs, pages, int(step.num_new.max()))

    def forward(self, q: Tensor, cache: LayerCache, spec: AttentionSpec, metadata: FlashMetadata, *_: object) -> Tensor:
        seqs, pages, window = metadata.seqs, metadata.pages, spec.window
        out: Tensor = self._attend(
            q=q,
            k_cache=cache.k.unflatten(0, (-1, seqs.page_size)),
            v_cache=cache.v.unflatten(0, (-1, seqs.page_size)),
            cache_seqlens=seqs.seq_lens,
            page_table=gather_pages(seqs, self._max_seq_len, window or 0) if pages is None else pages,
            cu_seqlens_q=seqs.cu_q,
            max_seqlen_q=metadata.max_q_len,
            causal=True,
            window_size=(window - 1, 0) if window else (-1, -1),
        )
        return out


def gather_pages(seqs: PagedSequences, max_seq_len: int, window: int) -> Tensor:
    """[n, max pages]: each sequence's row of the page table. window: before it, the first page that is its own stands
    for others, since tiles at its edge read what is behind it, too; 0: all are its own."""
    max_pages = -(-max_seq_len // seqs.page_size)
    pages = seqs.page_table[:, :max_pages].index_select(0, seqs.rows)
    if not window:
        return pages
    starts = seqs.seq_lens - seqs.cu_q.diff()
    first = (starts - window + 1).clamp_(min=0) // seqs.page_size
    return pages.gather(1, torch.arange(max_pages, device=pages.device).maximum(first[:, None]))

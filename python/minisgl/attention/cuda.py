"""Decode attention by the kernels of `kernel/csrc/src/attention_decode.cu`. Prefill is left to another backend."""

import torch

from minisgl.attention.base import AttentionBackend, AttentionShape, AttentionStep, Tensor
from minisgl.config.model import AttentionSpec
from minisgl.kernel.jit import load_kernel
from minisgl.kernel.ops import PagedSequences
from minisgl.kvcache.pool import LayerCache

MAX_CLUSTER = 16  # blocks; what Hopper allows
CLUSTER_BLOCKS_PER_SM = 2  # up to this many, clusters beat the stream kernel
PLANS = {64: (8, 1), 128: (8, 1), 256: (4, 1)}  # by head_dim: warps of a block, blocks on an SM
MIN_COUNTERS = 1024  # sequences; a captured batch may be padded past max_running_requests
_DTYPES = {torch.bfloat16: "__nv_bfloat16", torch.float16: "__half"}


def cluster_size(num_seqs: int, num_kv_heads: int, num_sms: int) -> int:
    """Blocks that share a sequence's KV head, or 0: there are sequences enough for the stream kernel."""
    limit = CLUSTER_BLOCKS_PER_SM * num_sms // max(1, num_seqs * num_kv_heads)
    return min(MAX_CLUSTER, 1 << (limit.bit_length() - 1)) if limit else 0


class CudaBackend(AttentionBackend[PagedSequences]):
    """Decode for one shape, compiled on first use. Workspaces serve one launch at a time. `plan`: as in PLANS."""

    def __init__(self, shape: AttentionShape, device: torch.device, plan: tuple[int, int] | None = None) -> None:
        capability = torch.cuda.get_device_capability(device)
        self._shape = shape
        self._num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        warps, blocks_per_sm = plan or PLANS[shape.head_dim]
        self._num_blocks = blocks_per_sm * self._num_sms
        defines: dict[str, int | str] = {
            "ATTN_DTYPE": _DTYPES[shape.dtype],
            "ATTN_FP8": int(shape.has_float8),
            "ATTN_HEAD_DIM": shape.head_dim,
            "ATTN_NUM_KV": shape.num_kv_heads,
            "ATTN_GROUP": shape.num_qo_heads // shape.num_kv_heads,
            "ATTN_WARPS": warps,
            "ATTN_BLOCKS": blocks_per_sm,
        }
        self._kernel = load_kernel("attention_decode", capability, **defines)
        with torch.cuda.device(device):
            self._kernel.attention_decode_prepare()
        num_partial = self._kernel.attention_decode_workspace(self._num_blocks)
        self._partial = torch.empty(num_partial, dtype=torch.float32, device=device)
        num_counters = shape.num_kv_heads * max(shape.max_running_requests, MIN_COUNTERS)
        self._counters = torch.zeros(num_counters, dtype=torch.int32, device=device)

    def prepare(self, step: AttentionStep, captured: bool) -> PagedSequences:  # noqa: ARG002 (nothing to plan)
        return step.on_device()

    def forward(
        self, q: Tensor, cache: LayerCache, spec: AttentionSpec, metadata: PagedSequences, sinks: Tensor | None = None
    ) -> Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        cluster = cluster_size(q.shape[0], self._shape.num_kv_heads, self._num_sms)
        # A captured graph begins when all before it is done. Its first kernel, before whose end no other begins, alone
        # writes lengths, but for those of a head's passes (`HeadDrafter.propose`), and none the page table or older
        # tokens. Launched one by one, they may overlap one that does.
        fresh = metadata.fresh if torch.cuda.is_current_stream_capturing() else None
        self.launch(q, cache, spec.window or 0, metadata, out, cluster, fresh, sinks)
        return out

    def launch(
        self, q: Tensor, cache: LayerCache, window: int, seqs: PagedSequences, out: Tensor, cluster: int,
        fresh: Tensor | None, sinks: Tensor | None = None,
    ) -> None:  # fmt: skip
        """`forward` with the choices made. window 0: none; cluster: as from `cluster_size`; fresh: see the kernel."""
        inputs = q, cache.k, cache.v, seqs.page_table, seqs.rows, seqs.seq_lens
        sizes = seqs.page_size, window, sinks, cluster, self._num_blocks
        self._kernel.attention_decode(*inputs, out, self._partial, self._counters, *sizes, fresh)

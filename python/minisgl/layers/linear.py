"""Linear layers, sharded over tensor-parallel ranks (Megatron-LM, arXiv 1909.08053, section 3)."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from minisgl.errors import ConfigError
from minisgl.formats.base import Shape, Shard, Tensors, WeightFormat, WeightSlot
from minisgl.formats.float8 import BLOCK
from minisgl.kernel.ops import ALONE, Around, Matrix
from minisgl.layers.base import CpuSpec, Layer, LayerEnv, Tensor
from minisgl.utils.math import div_ceil

KV_HEADS = "KV heads"
_SHARED = 8  # rows of e4m3 that have one scale in kernels, for each block of columns


class Linear(Layer):
    """y = x Wᵀ + b, where W [out, in] holds this rank's shards of one or several linear layers of the checkpoint.

    shape: of W. shards: by what the names of those layers' tensors begin with; None: all of one layer, on every rank.
    activation: of `Matrix.gate_up`.
    """

    matrix: Matrix  # once it is packed
    apart = False  # of `Around`

    def __init__(
        self, env: LayerEnv, shape: Shape, shards: Mapping[str, Shard] | None = None, bias: bool = False,
        activation: str | None = None,
    ) -> None:  # fmt: skip
        self._ops, self._comm, self._format = env.ops, env.comm, env.format
        self.shards, self._activation = shards or {"": Shard(shape, (0, shape[0]))}, activation
        self._tensors = env.format.create(shape, env.dtype, env.device)
        self.bias = env.vector(shape[0]) if bias else None

    def weights(self, prefix: str) -> Iterator[WeightSlot]:
        for name, shard in self.shards.items():
            yield from slots_of(self._format, f"{prefix}{name}", self._tensors, shard, self.bias)

    def pack(self) -> None:
        self.matrix = self._format.matrix(self._ops, self._tensors, self._activation)
        self._tensors = {}

    def project(self, x: Tensor, norm: Tensor | None = None, eps: float = 0.0) -> Tensor:
        """x: [num_tokens, in], which `norm` normalises first → y, or activation(gate) * up of its two halves."""
        return self.matrix.apply(x, Around(self.bias, norm, eps, None, self._activation is not None, self.apart))

    def cpu_spec(self) -> CpuSpec | None:
        handle = self.matrix.cpu_handle
        return None if handle is None else CpuSpec(((handle, self.bias),))


class ColumnLinear(Linear):
    """Several layers in one matrix, of whose outputs ranks have a share each.

    heads: by the layers' names, how many units of outputs they have, which stay together, and the size of one. Those of
    `k_proj` and `v_proj` may be fewer than ranks: each is on all that hold its query heads. orders: of shards.
    """

    stored_as = ""

    def __init__(
        self, env: LayerEnv, in_features: int, heads: Mapping[str, tuple[int, int]], what: str, bias: bool = False,
        activation: str | None = None, orders: Mapping[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        shards, at = dict[str, Shard](), 0
        for name, (num, size) in heads.items():
            mine = env.share(num, KV_HEADS, True) if name in ("k_proj", "v_proj") else env.share(num, what)
            rows = mine.start * size, mine.stop * size
            shard = Shard((num * size, in_features), rows, at=at, order=(orders or {}).get(name))
            shards[f"{name}."], at = shard, at + shard.local[0]
        super().__init__(env, (at, in_features), shards, bias, activation)


def slots_of(form: WeightFormat, at: str, tensors: Tensors, shard: Shard, bias: Tensor | None) -> Iterator[WeightSlot]:
    """Of a linear layer of the checkpoint, whose names start with `at`, their rows in the shard's order. bias: of all
    rows that the rank has."""
    slots = [*form.slots(at, tensors, shard)]
    slots += [] if bias is None else [WeightSlot(f"{at}bias", shard.shape[:1], shard.of(bias), shard.rows)]
    for slot in slots:
        if shard.order is None or len(slot.target) == 1 or slot.name.endswith(".g_idx"):  # or one scale for all
            yield slot
        elif len(slot.target) == len(shard.order):
            yield replace(slot, order=shard.order)
        else:
            yield _scale_of_each_row(slot, tensors, shard.order)


def _scale_of_each_row(slot: WeightSlot, tensors: Tensors, order: Tensor) -> WeightSlot:
    """A slot of scales of blocks, which becomes one of scales of rows: `order` brings rows of several together.

    Raises: ConfigError where these are not at least as many in a row as share a scale in kernels.
    """
    num_rows = len(order)
    if bool((order[: num_rows // _SHARED * _SHARED].view(-1, _SHARED) // BLOCK).diff(dim=1).any()):
        raise ConfigError(f"{slot.name}: its blocks of {BLOCK} rows do not fit the order of this family's rows")
    (key,) = (key for key, scales in tensors.items() if scales.data_ptr() == slot.target.data_ptr())
    tensors[key] = target = slot.target.new_empty(num_rows, slot.target.shape[1])
    return replace(slot, target=target, transform=lambda part: part.repeat_interleave(BLOCK, 0), order=order)


class RowLinear(Linear):
    """Split by input columns; the sum over ranks is the result, and rank 0 adds the bias, once."""

    def __init__(self, env: LayerEnv, in_features: int, out_features: int, bias: bool, what: str) -> None:
        mine = env.share(in_features, what)
        shard = Shard((out_features, in_features), (0, out_features), (mine.start, mine.stop))
        super().__init__(env, (out_features, len(mine)), {"": shard}, bias)

    def forward(self, x: Tensor, residual: Tensor, norm: Tensor | None = None, eps: float = 0.0) -> Tensor:
        """residual + y, in place of `residual`: rank 0 adds it, and the bias, to its part of the sum over ranks. norm:
        of y, before it is added."""
        if norm is not None:
            part = self.matrix.apply(x, Around(self.bias if self._comm.rank == 0 else None))
            return residual.add_(self._ops.rms_norm(self._comm.all_reduce(part), norm, eps))
        around = ALONE if self._comm.rank > 0 else Around(self.bias, residual=residual, apart=self.apart)
        return self._comm.all_reduce(self.matrix.apply(x, around))


class VocabTable(Linear):
    """A row for each token: its embedding, or what the LM head multiplies with; or both, where they are tied.

    Rank r holds rows [r * share, (r + 1) * share) of the table; the last rank's share is padded.
    """

    def __init__(self, env: LayerEnv, vocab_size: int, hidden_size: int) -> None:
        share = div_ceil(vocab_size, env.comm.size)
        self._vocab_size, self._first = vocab_size, env.comm.rank * share
        end = max(self._first, min(self._first + share, vocab_size))
        shard = Shard((vocab_size, hidden_size), (self._first, end), padding=self._first + share - end)
        super().__init__(env, (share, hidden_size), {"": shard})
        for tensor in self._tensors.values():
            tensor[end - self._first :] = 0  # what is padding

    def forward(self, ids: Tensor) -> Tensor:
        """ids: [num_tokens] int64 → [num_tokens, hidden]."""
        return self._comm.all_reduce(self.matrix.rows(ids, self._first))

    def logits(self, x: Tensor, norm: Tensor, eps: float, matrix: Matrix | None = None) -> Tensor:
        """x: [n, hidden]; norm: [hidden]; matrix: in place of its own → [n, vocab_size], on rank 0, which samples."""
        return self._comm.gather((matrix or self.matrix).apply(x, Around(None, norm, eps)))[:, : self._vocab_size]

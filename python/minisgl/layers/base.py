"""What every layer is built from and how its parameters are filled."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from minisgl.distributed.comm import Communicator
from minisgl.errors import ConfigError
from minisgl.formats.base import DENSE, WeightFormat, WeightSlot
from minisgl.kernel.ops import LayerOps
from minisgl.kvcache.pool import KVPool

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class LayerEnv:
    """Where layers live and what they compute with; the same for all layers of a model."""

    comm: Communicator
    ops: LayerOps
    dtype: torch.dtype
    device: torch.device
    format: WeightFormat = DENSE

    def vector(self, *shape: int) -> Tensor:
        """An uninitialised norm or bias, in the type that the operations want."""
        return torch.empty(shape, dtype=self.ops.vector_dtype(self.dtype), device=self.device)

    def share(self, total: int, what: str, repeats: bool = False) -> range:
        """This rank's part of `total`; if `repeats`, and there are fewer than ranks, one that some ranks have. Raises:
        ConfigError when the ranks cannot share it evenly."""
        rank, size = self.comm.rank, self.comm.size
        if total % size and not (repeats and size % total == 0):
            raise ConfigError(f"--tensor-parallel-size {size} does not divide the model's {total} {what}")
        first = rank * total // size
        return range(first, first + max(1, total // size))


class Part(NamedTuple):
    """Some of a model's slots, and what is to be called once they are filled."""

    slots: Sequence[WeightSlot]
    finish: Callable[[], None]


@dataclass(frozen=True, slots=True)
class CpuSpec:
    """How the CPU engine that computes whole steps runs a layer, or the blocks of a decoder layer.

    A block is what adds to the residual stream. kind, numbers: of the function that adds it to the engine's model
    (`csrc/src/cpu_bindings.cc`); norms: before and after it.
    """

    matrices: tuple[tuple[int, Tensor | None], ...] = ()  # handles, each with its bias
    kind: str = ""
    numbers: tuple[Tensor | float | str | None, ...] = ()
    norms: tuple[Tensor | None, ...] = ()
    blocks: tuple["CpuSpec", ...] = ()

    def build(self, module: Any, model: int, index: int, kv: KVPool) -> None:
        """Add the blocks of decoder layer `index` to a model of the kernels."""
        caches: dict[str, Callable[[int], Iterable[Tensor]]] = {"attention": kv.layer, "mlp": lambda _: ()}
        for block in self.blocks:
            matrices = (value for matrix in block.matrices for value in matrix)
            cache = caches.get(block.kind, kv.states.layer)(index)
            module[f"add_{block.kind}"](model, *matrices, *block.norms, *block.numbers, *cache)


class Layer:
    """Tensors, or layers, and the method `forward` that computes with them."""

    stored_as: str | None = None  # what checkpoints call it; "": they have its parts in its place; None: as we do
    slots: Sequence[WeightSlot] = ()  # of vectors that are not public: ranks share them, or change them on the way
    cpu_block: tuple[str, tuple[Tensor | float | str | None, ...]] | None = None  # kind and numbers of its `CpuSpec`

    def __init_subclass__(cls, **options: Any) -> None:
        """Who overrides a `forward` says anew how the CPU engine computes it: what is inherited describes another."""
        super().__init_subclass__(**options)
        if "forward" in vars(cls) and "cpu_spec" not in vars(cls) and hasattr(super(cls, cls), "forward"):
            cls.cpu_spec = lambda _: None  # type: ignore[assignment, method-assign]

    def weights(self, prefix: str) -> Iterator[WeightSlot]:
        """The slots of this layer, whose checkpoint names start with `prefix`: of the layers in it, and of its vectors,
        of which every rank holds the public ones entirely."""
        for name, child in vars(self).items():
            if isinstance(child, Layer):
                at = name if child.stored_as is None else child.stored_as
                yield from child.weights(f"{prefix}{at}." if at else prefix)
            elif isinstance(child, Tensor) and not name.startswith("_"):
                yield whole(f"{prefix}{name}.weight", child)
        yield from (replace(slot, name=f"{prefix}{slot.name}") for slot in self.slots)

    def pack(self) -> None:
        """Called once all slots are filled: bring weights into the layout that the kernels like best."""
        for child in vars(self).values():
            if isinstance(child, Layer):
                child.pack()

    def cpu_spec(self) -> CpuSpec | None:
        """What computes the same as `forward` in the CPU engine; None: it cannot. Called after `pack`."""
        specs = [child.cpu_spec() for child in vars(self).values() if isinstance(child, Layer)]
        matrices = [matrix for spec in specs if spec is not None for matrix in spec.matrices]
        return None if self.cpu_block is None or None in specs else CpuSpec(tuple(matrices), *self.cpu_block)


def whole(name: str, target: Tensor, offset: float = 0.0, scale: float = 1.0) -> WeightSlot:
    """A vector that every rank holds entirely. offset, scale: what the checkpoint's is added to, then multiplied by."""
    changed = (lambda stored: (stored.float() + offset) * scale) if (offset, scale) != (0.0, 1.0) else None
    return WeightSlot(name, (target.shape[-1],), target, (0, target.shape[-1]), transform=changed)

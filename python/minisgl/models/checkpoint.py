"""Where a checkpoint has the tensors of a model: names differ between files, and some have several tensors in one. And
filling the parameters from them, or at random, without ever holding a second copy.

A model comes in parts, each of which packs its weights once it is filled. Each tensor is read in blocks of rows right
into its place, converted on the way; a rank reads only what it keeps.
"""

import logging
import re
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from minisgl.config.families import weight_files
from minisgl.config.locate import lfs_hint, listing
from minisgl.config.model import ModelConfig
from minisgl.config.rope import TABLE
from minisgl.errors import ConfigError
from minisgl.formats.base import FUSED, Header, WeightSlot
from minisgl.formats.gguf import open_slices
from minisgl.layers.base import Part

logger = logging.getLogger(__name__)

EMBEDDING, HEAD, OF_HEAD = "model.embed_tokens.weight", "lm_head.weight", "head."
BLOCK_BYTES = REOPEN_BYTES = 16 << 20  # files are mapped: what was read of one is resident until it is opened anew
_OUTER, _INNER, _LEFT_OUT, _PACKED = ("|".join(TABLE[key]) for key in ("outer", "inner", "left_out", "packed"))
_NAME = re.compile(rf"(?:(?:{_OUTER})\.)*(?:(lm_head\..*)|((?:{_INNER})\..*))")
_STACK = re.compile(r"^(.*\.experts)(\.(?:gate|up|down|gate_up)_proj)(|\.\w+|_bias|_scale(?:s|_inv)?|_blocks)$")
# What these end with: in the names of one expert's.
_ENDS = {"": ".weight", "_bias": ".bias", "_scale": ".weight_scale", "_scale_inv": ".weight_scale_inv"}
_IGNORED = re.compile(rf"(^|\.)({_LEFT_OUT})$|^mtp\.")  # the latter where they are not used
_QUANTIZED = re.compile(rf"\.({_PACKED})$")
_RENAMED: dict[str, str] = TABLE["tensors"]
_RENAMED_PARTS = re.compile(rf"(?<=\.)({'|'.join(map(re.escape, _RENAMED))})(?=\.|$)")
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # in safetensors


class WeightFile:
    """One file of a checkpoint: safetensors, GGUF or `torch.save`, of which nothing but tensors is unpickled. `close`
    gives its pages back."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors: dict[str, Any] | None = None  # or slices of safetensors
        self._num_bytes = 0
        self._is_mapped = True

    def stored(self) -> Iterator["Stored"]:
        """All tensors of the file. Raises: ConfigError when the file is not what its name says."""
        for name, tensor in self._opened().items():
            of_torch = isinstance(tensor, torch.Tensor)
            dtype = str(tensor.dtype).removeprefix("torch.") if of_torch else tensor.get_dtype()
            shape = tuple(tensor.shape if of_torch else tensor.get_shape())
            yield Stored(self, name, shape, _DTYPES.get(dtype, dtype))

    def _opened(self) -> dict[str, Any]:
        if self._tensors is None:
            try:
                self._tensors = self._open()
            except Exception as error:  # the libraries' own, and whatever broken data makes them stumble over
                reason = lfs_hint(self.path) or (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise ConfigError(f"cannot read {str(self.path)!r}: {reason}") from None
        return self._tensors

    def _open(self) -> dict[str, Any]:
        if self.path.suffix == ".gguf":
            self._is_mapped = False  # it gives its pages back itself
            return dict(open_slices(self.path))
        if self.path.suffix == ".safetensors":
            file: Any = safe_open(str(self.path), framework="pt")
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: part if part.get_shape() else part[...].view(1) for name, part in slices.items()}
        with self.path.open("rb") as head:
            self._is_mapped = head.read(2) == b"PK"  # older files are no archives, and are read as a whole
        content = torch.load(self.path, map_location="cpu", mmap=self._is_mapped, weights_only=True)
        return {name: tensor for name, tensor in content.items() if isinstance(tensor, torch.Tensor)}

    def read(self, name: str, index: tuple[int | slice, ...]) -> torch.Tensor:
        """A part of a tensor."""
        if self._is_mapped and self._num_bytes > REOPEN_BYTES:
            self.close()
        part: torch.Tensor = self._opened()[name][index]
        self._num_bytes += part.nbytes
        return part

    def close(self) -> None:
        self._tensors, self._num_bytes = None, 0


class Stored(NamedTuple):
    """A tensor in a file, or the part of it that is `at` an index, as an expert's in a stack; from row `first` on."""

    shard: WeightFile
    name: str
    shape: tuple[int, ...]
    dtype: str
    at: tuple[int, ...] = ()
    first: int = 0

    def read(self, begin: int, end: int) -> torch.Tensor:
        return self.shard.read(self.name, (*self.at, slice(self.first + begin, self.first + end)))


class Checkpoint:
    """The tensors of a model directory. Raises: ConfigError naming a file that is missing or cannot be read."""

    def __init__(self, model_dir: str | Path, model: ModelConfig | None = None) -> None:
        places = ({model.second[0]: OF_HEAD} if model and model.mtp and model.second else {}) | {str(model_dir): ""}
        self._source, self._stored = " and ".join(places), dict[str, Stored]()
        self._files = {WeightFile(path): prefix for at, prefix in places.items() for path in weight_files(Path(at))}
        for file, prefix in self._files.items():
            for stored in file.stored():
                ours = prefix + our_name(stored.name)
                if ours == stored.name or ours not in self._stored:
                    self._stored[ours] = stored
        for name, stored in [*self._stored.items()]:
            if all(stored.shape or [0]) and of_expert(name, 0) not in self._stored:  # a stack
                one = self._stored.pop(name)._replace(shape=stored.shape[1:])
                self._stored |= {of_expert(name, i): one._replace(at=(i,)) for i in range(stored.shape[0])}
        for index, layer in enumerate(() if model is None else model.layers):
            at = f"model.layers.{index}.self_attn."
            if layer.attention.values_are_keys:  # whatever else is stored
                of_keys = {name: stored for name, stored in self._stored.items() if name.startswith(f"{at}k_proj.")}
                self._stored |= {name.replace("k_proj", "v_proj"): of_keys[name] for name in of_keys}
            elif layer.attention.source is not None:  # another layer's are used in the place of what is stored
                unused = tuple(f"{at}{name}." for name in ("k_proj", "v_proj", "k_norm", "v_norm"))
                self._stored = {name: stored for name, stored in self._stored.items() if not name.startswith(unused)}

    def untied(self, model: ModelConfig) -> ModelConfig:
        """`model`, whose head is its own where the file has one that differs from the embedding, whatever the
        configuration says; as in transformers. Where a tied model's file has the head alone, it is both."""
        head = self._stored.get(HEAD)
        if head is None and model.pooling is not None:  # nobody asks for logits, unless they are the embedding's
            return replace(model, tie_word_embeddings=True)
        if not model.tie_word_embeddings or head is None:
            return model
        if _equal(head, self._stored.setdefault(EMBEDDING, head)):
            return model
        logger.warning("%s: tie_word_embeddings is not true of these weights, whose lm_head differs", self._source)
        return replace(model, tie_word_embeddings=False)

    def header(self) -> dict[str, Header]:
        """What the tensors are, by our layers' names."""
        return {name: Header(stored.dtype, stored.shape) for name, stored in self._stored.items()}

    def sources(self, slots: list[WeightSlot]) -> list[Stored]:
        """Where each slot's tensor is. Raises: ConfigError with all that is missing, left over or of another shape."""
        shapes = {slot.name: slot.shape for slot in slots}
        found, missing, wrong = list[Stored](), list[str](), dict[str, str]()
        used: dict[str, bool] = {}  # whether the slot takes nothing but floats
        for slot in slots:
            stored_as = places(slot.name, shapes)
            name, first, num_rows = next((place for place in stored_as if place[0] in self._stored), ("", 0, 0))
            if not name:
                missing.append(slot.name)
                continue
            stored, wanted = self._stored[name], (num_rows or slot.shape[0], *slot.shape[1:])
            if stored.shape != wanted:
                each = " for each expert" if stored.at else ""
                wrong[stored.name] = f"{stored.name} is {list(stored.shape)}, not {list(wanted)}{each}"
            is_value = slot.transform is None or slot.name.endswith(".weight")
            used[name] = is_value and slot.target.dtype.is_floating_point and slot.target.itemsize > 1
            found.append(stored._replace(first=first))
        self._check_rest(used, {_region(name) for name in shapes}, missing, list(wrong.values()))
        return found

    def _check_rest(self, used: dict[str, bool], regions: set[str], missing: list[str], wrong: list[str]) -> None:
        where = f"the weights in {self._source!r}"
        rest = [n for n in self._stored if n not in used and n != HEAD and not _IGNORED.search(n)]
        others = (n for n in rest if not n.endswith(("k_scale", "v_scale", "q_scale")))  # our KV caches have none
        added = [self._stored[n] for n in rest if f"{n.removesuffix('bias')}qweight" in self._stored]
        zeros = [one for one in added if not bool(one.read(0, prod(one.shape)).any())]  # AutoGPTQ's, of none
        unexpected = [n for n in others if _region(n) in regions and self._stored[n] not in zeros]  # they would count
        quantized = [n for n in unexpected if _QUANTIZED.search(n)]
        floats = [n for n in used if used[n]] + ([] if self._source.endswith(".gguf") else unexpected)
        for name in quantized + [n for n in floats if self._stored[n].dtype not in _DTYPES.values()]:
            kind = f"{self._stored[name].name} is {self._stored[name].dtype}"
            reason = "which config.json does not say; use an unquantized checkpoint"
            raise ConfigError(f"{where} are quantized ({kind}), {reason}")
        titled = (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong))
        if problems := [f"{title}: {listing(items)}" for title, items in titled if items]:
            raise ConfigError(f"{where} do not fit its configuration; " + "; ".join(problems))
        if rest:
            logger.warning("%s: tensors that are no part of the model are left out: %s", self._source, listing(rest, 4))

    def close(self) -> None:
        for file in self._files:
            file.close()


def our_name(name: str) -> str:
    """The name of a stored tensor as our layers have it; any other stays as it is."""
    match = _NAME.fullmatch(name.replace("midlayer.", "layers.0."))  # as heads of EAGLE name theirs
    if match is None:
        return name
    return _RENAMED_PARTS.sub(lambda part: _RENAMED[part[0]], match[1] or f"model.{match[2]}")


def of_expert(name: str, expert: int) -> str:
    """The name of one expert's tensor in a stack of this name; any other stays as it is."""
    return _STACK.sub(lambda match: f"{match[1]}.{expert}{match[2]}{_ENDS.get(match[3], match[3])}", name)


def places(name: str, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, int, int]]:
    """Names under which a tensor may be stored: with each, the first row in a fused tensor and its number of rows (0:
    it is not fused)."""
    yield name, 0, 0
    for fused, parts in FUSED.items():
        part = next((part for part in parts if f".{part}." in name), None)
        if part is not None:
            sizes = [shapes.get(name.replace(f".{part}.", f".{sibling}."), (0,))[0] for sibling in parts]
            yield name.replace(f".{part}.", f".{fused}."), sum(sizes[: parts.index(part)]), sum(sizes)


def _region(name: str) -> str:
    """The layer, or other part of the model, that a tensor belongs to."""
    depth = 3 if name.startswith("model.layers.") else 2 if name.startswith("model.") else 1
    return ".".join(name.split(".")[:depth])


def _equal(a: Stored, b: Stored) -> bool:
    if a is b or a.shape != b.shape:
        return a is b
    step = max(1, BLOCK_BYTES // (4 * a.shape[-1]))
    blocks = ((first, first + step) for first in range(0, a.shape[0], step))
    return all(bool((a.read(*rows) == b.read(*rows)).all()) for rows in blocks)


def load_weights(parts: Iterable[Part], checkpoint: Checkpoint) -> None:
    """Fill all parts from a checkpoint, one after the other.

    Raises: ConfigError naming the files or tensors that are missing, unexpected or of another shape.
    """
    waiting = deque(parts)
    sources = iter(checkpoint.sources([slot for slots, _ in waiting for slot in slots]))
    with torch.inference_mode():
        while waiting:
            slots, finish = waiting.popleft()
            for slot, source in zip(slots, sources, strict=False):
                (begin, end), step = slot.rows, _rows_at_once(slot)
                for first in range(begin, end, step):
                    block = source.read(first, min(first + step, end))
                    if len(slot.shape) == 1 and not bool(block.isfinite().all()):
                        raise ConfigError(f"{source.shard.path}: tensor {source.name}: it holds NaN or infinity")
                    _put(slot, block, first)
            del slots, slot  # which hold what packing frees
            finish()
    checkpoint.close()


def _rows_at_once(slot: WeightSlot) -> int:
    """Rows that are read or drawn at once: all of them, where they are changed."""
    is_changed = slot.transform is not None or slot.order is not None
    return max(1, slot.rows[1] if is_changed else BLOCK_BYTES // (4 * prod(slot.shape[1:])))


def _put(slot: WeightSlot, block: torch.Tensor, first: int) -> None:
    """Into the slot's target: rows of its tensor, from `first` on."""
    block = block if slot.cols is None else block[:, slice(*slot.cols)]
    block = block if slot.transform is None else slot.transform(block)
    if slot.order is not None:  # bytes, since not all types can be indexed
        block = block.view(torch.uint8)[slot.order].view(block.dtype) if block.itemsize == 1 else block[slot.order]
    target = slot.target if len(slot.shape) == 1 else slot.target[first - slot.rows[0] :][: len(block)]
    target.copy_(block)


def fill_random(parts: Iterable[Part], seed: int) -> None:
    """Seeded random weights of a sane scale: the same model whatever the number of ranks.

    Matrices have standard deviation 1 / sqrt(fan in), so that activations keep their scale; norms are one, biases zero.
    """
    with torch.inference_mode():
        for slots, finish in parts:
            for slot in slots:
                if len(slot.shape) == 1:
                    slot.target.fill_(0.0 if slot.name.endswith("bias") else 1.0)
                else:
                    _fill_matrix(slot, seed)
            del slots, slot  # which hold what packing frees
            finish()


def _fill_matrix(slot: WeightSlot, seed: int) -> None:
    device, (num_rows, *rest), step = slot.target.device, slot.shape, _rows_at_once(slot)
    generator = torch.Generator(device)
    begin, end = slot.rows
    for first in range(begin // step * step, end, step):  # blocks are aligned, so every rank draws the same ones
        generator.manual_seed((zlib.crc32(f"{seed}/{slot.name}/{first}".encode()) << 16) ^ seed)
        block = torch.empty(min(step, num_rows - first), *rest, device=device).uniform_(-1, 1, generator=generator)
        block *= (3.0 / prod(rest)) ** 0.5
        low, high = max(begin, first), min(end, first + step)
        _put(slot, block[low - first : high - first], low)

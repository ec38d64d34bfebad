"""GGUF files, read without trust, as model directories: their metadata, what config.json and other files would say, and
their tensors by the names that Hugging Face checkpoints have.

The `gguf` package's reader makes objects of every token before anybody asks (seconds for a large vocabulary), and goes
wherever a length points. Here nothing is read beyond the file, and lists stay in it until they are wanted.
"""

import math
import mmap
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from minisgl.core import DRAWING
from minisgl.errors import ConfigError
from minisgl.utils.fields import Fields

TEMPLATE = "tokenizer.chat_template"
NAMES: dict[str, Any] = msgspec.yaml.decode(Path(__file__).with_name("names.yaml").read_bytes())
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_TEXT, _LIST = 8, 9
_size_at = struct.Struct("<Q").unpack_from
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_PRIVATE = mmap.MAP_PRIVATE | 0x4000  # MAP_NORESERVE: torch wants memory that may be written, which nobody does
_BLOCK = re.compile(r"blk\.(\d{1,4})\.([\w.]+?)(?:\.(weight|bias))?")


class Kind(NamedTuple):
    """How a type of tensors lies in memory. values, num_bytes: of a block; scales: where in it float16 scales are."""

    name: str
    values: int
    num_bytes: int
    scales: tuple[int, ...] = ()

    def row_bytes(self, num_values: int) -> int:
        return num_values // self.values * self.num_bytes


KINDS = {i: Kind(name, values, size, tuple(at)) for i, (name, values, size, at) in NAMES["types"].items()}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """shape: as in torch, [out, in]; offset: in the file."""

    name: str
    file: "GgufFile"
    kind: Kind
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.kind.row_bytes(self.shape[-1])

    def wrong(self, reason: str) -> ConfigError:
        return self.file.wrong(f"tensor {self.name} {reason}")


class GgufFile:
    """data: the bytes of the file, mapped; metadata: by key, of lists their place in it; tensors: by name.

    Raises: ConfigError naming the file, and what it is or lacks.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._at = path, 4
        try:
            with path.open("rb") as file:
                self.data = mmap.mmap(file.fileno(), 0, flags=_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        except (OSError, ValueError) as error:  # the latter: it is empty
            raise ConfigError(f"cannot read {str(path)!r}: {error}") from None
        if self.data[:4] != b"GGUF":
            is_pointer = self.data[:19] == b"version https://git"
            raise self.wrong("it is a Git LFS pointer; run git lfs pull" if is_pointer else "it is no GGUF file")
        if (version := self._number("<I")) not in (2, 3):
            raise self.wrong(f"it is of version {version} of the format, or of another byte order (supported: 2, 3)")
        num_tensors, num_keys = self._number("<Q"), self._number("<Q")
        metadata = dict(self._entry() for _ in range(num_keys))
        self.metadata = Fields(metadata, str(path))
        self.tensors = self._placed([self._tensor() for _ in range(num_tensors)])

    def wrong(self, reason: str) -> ConfigError:
        return ConfigError(f"{self.path}: {reason}")

    def values(self, prefix: str = "") -> Fields:
        """The metadata whose keys begin so: numbers, texts, and lists of them."""
        found = {key: value for key, value in self.metadata.data.items() if key.startswith(prefix)}
        items = {key: self._items(*value) for key, value in found.items() if isinstance(value, tuple)}
        return Fields(found | items, str(self.path))

    def _items(self, kind: int, count: int, offset: int) -> list[Any]:
        if kind != _TEXT:
            return list(struct.unpack_from(f"<{count}{_SCALARS[kind][1]}", self.data, offset))
        texts, data, at = list[str](), self.data, offset
        for _ in range(count):
            begin = at + 8
            at = begin + _size_at(data, at)[0]
            texts.append(data[begin:at].decode(errors="replace"))
        return texts

    def _entry(self) -> tuple[str, Any]:
        key, kind = self._text(), self._number("<I")
        if kind in _SCALARS:
            return key, self._number(_SCALARS[kind])
        if kind == _TEXT:
            return key, self._text()
        of, count = (self._number("<I"), self._number("<Q")) if kind == _LIST else (kind, 0)
        if of not in _SCALARS and of != _TEXT:
            raise self.wrong(f"{key[:100]!r} is of a type that is unknown, or a list of lists ({of})")
        size = self._texts_size(count) if of == _TEXT else count * struct.calcsize(_SCALARS[of])
        return key, (of, count, self._take(size))

    def _texts_size(self, count: int) -> int:
        """Bytes of the texts ahead: there may be hundreds of thousands. Too many where they go beyond the file."""
        at, last, data = self._at, len(self.data) - 8, self.data
        while count and at <= last:
            at, count = at + 8 + _size_at(data, at)[0], count - 1
        return at - self._at + 8 * count

    def _tensor(self) -> StoredTensor:
        name, num_dims = ascii(self._text())[1:-1][:100], self._number("<I")
        shape = tuple(self._number("<Q") for _ in range(min(num_dims, 4)))[::-1]
        number, offset = self._number("<I"), self._number("<Q")
        if (kind := KINDS.get(number)) is None:
            known, other = ", ".join(kind.name for kind in KINDS.values()), NAMES["others"].get(number, number)
            raise self.wrong(f"tensor {name} is of type {other}, not supported (supported: {known})")
        if not 1 <= num_dims <= 4 or not 0 < math.prod(shape) < 2**50 or shape[-1] % kind.values:
            raise self.wrong(f"tensor {name} cannot be {kind.name} of {num_dims} dimensions, {list(shape)}")
        return StoredTensor(name, self, kind, shape, offset)

    def _placed(self, tensors: list[StoredTensor]) -> dict[str, StoredTensor]:
        """The tensors with their offsets from the file's beginning, by name. One lies behind the other."""
        alignment, placed = self.metadata.integer("general.alignment", 32, 8), dict[str, StoredTensor]()
        if alignment & (alignment - 1):
            raise self.wrong(f"general.alignment is {alignment}, which is no power of 2")
        start = end = -(-self._at // alignment) * alignment
        for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
            begin = start + tensor.offset
            if begin % alignment or begin < end or tensor.name in placed:
                raise tensor.wrong(f"cannot be at byte {begin}, or is there twice")
            end = begin + tensor.num_bytes
            if end > len(self.data):
                raise tensor.wrong(f"ends at byte {end} of {len(self.data)}: the file was cut off")
            placed[tensor.name] = replace(tensor, offset=begin)
        return placed

    def _take(self, size: int) -> int:
        """Go forward by `size` bytes; → where they begin."""
        begin = self._at
        if size > len(self.data) - begin:
            raise self.wrong(f"byte {begin} of {len(self.data)} is followed by {size} more: the file was cut off")
        self._at += size
        return begin

    def _number(self, form: str) -> Any:
        return struct.unpack_from(form, self.data, self._take(struct.calcsize(form)))[0]

    def _text(self) -> str:
        begin = self._take(size := self._number("<Q"))
        return self.data[begin : begin + size].decode(errors="replace")


class GgufModel:
    """All files of a model. layout: what `names.yaml` says of its architecture; stored: its tensors.

    Raises: ConfigError naming the file, and what of it is missing, broken or not supported.
    """

    def __init__(self, path: Path) -> None:
        self.files = [GgufFile(part) for part in parts_of(path)]
        self._head, self._metadata = self.files[0], self.files[0].metadata
        if (name := self._metadata.text("general.architecture", "")) not in NAMES["architectures"]:
            known = ", ".join(NAMES["architectures"])
            raise self._head.wrong(f"architecture not supported: {name[:100]!r} (supported: {known})")
        self.layout: dict[str, Any] = NAMES["architectures"][name]
        values = self._head.values(start := f"{name}.").data.items()
        self._numbers = Fields({key.removeprefix(start): value for key, value in values}, str(path), start)
        self.stored = {tensor.name: tensor for file in self.files for tensor in file.tensors.values()}
        if (expected := self._metadata.integer("split.tensors.count", len(self.stored), 0)) != len(self.stored):
            raise self._head.wrong(f"its parts have {len(self.stored)} tensors, not {expected}")
        if self.layout.get("config.json", {}).get("attention_k_eq_v"):  # in layers without values of their own
            self.stored = {name.replace("attn_k.", "attn_v."): self.stored[name] for name in self.stored} | self.stored
        self._divisors = {ours: self.stored.pop(name, None) for ours, name in NAMES["divisors"].items()}
        self._num_layers = self._integer("block_count") - self._integer("nextn_predict_layers")
        hidden, heads = self._integer("embedding_length"), max(1, self._integer("attention.head_count"))
        self._head_dim = self._integer("attention.key_length") or max(1, hidden // heads)
        self._rotary_dim = self._integer("rope.dimension_count") or self._head_dim
        if (table := self.stored.get("token_embd.weight")) is None:
            raise self._head.wrong("tensor token_embd.weight is missing")
        if table.shape != (shape := (table.shape[0], hidden)):
            raise table.wrong(f"is {list(table.shape)}; by the metadata it is {list(shape)}")

    def release(self) -> None:
        """Give back the memory of what was read of the files; whoever looks again reads again."""
        for file in self.files:
            file.data.madvise(mmap.MADV_DONTNEED)

    def our_names(self, name: str) -> tuple[str, list[str]]:
        """A tensor's name within its block, and what Hugging Face checkpoints call it, or the parts that lie one below
        the other in it; what is not known stays what it is, in its layer."""
        names, prefix, (stem, _, end) = NAMES["tensors"] | self.layout.get("names", {}), "", name.rpartition(".")
        if match := _BLOCK.fullmatch(name):
            layer, stem, end = match.groups()
            beyond = int(layer) - self._num_layers
            prefix = f"model.layers.{layer}." if beyond < 0 else f"mtp.layers.{beyond}."
        ours = names.get(f"{stem}.{end}") or names.get(stem, stem)
        behind = f".{end}" if end and f"{stem}.{end}" not in names else ""
        parts = [ours] if isinstance(ours, str) else ours
        return stem, [f"{'' if part.startswith('mtp.') else prefix}{part}{behind}" for part in parts]

    def read_json(self, name: str) -> dict[str, Any]:
        """What a file of a model's directory would hold, by its name."""
        if name == "tokenizer_config.json":
            return {"chat_template": chat_templates(self._metadata)}
        if name == "generation_config.json":
            theirs, data = NAMES["sampling"], self._metadata.data
            return {ours: data.get(f"general.sampling.{theirs.get(ours, ours)}") for ours in DRAWING}
        return self.config if name == "config.json" else {}

    def _integer(self, key: str) -> int:
        return self._numbers.integer(key, 0, 0)

    def _fields(self, table: str) -> dict[str, Any]:
        """Of a table in names.yaml, with the values that the metadata has, or else the architecture's usual ones."""
        told = {ours: self._numbers.data.get(key) for ours, key in NAMES[table].items()}
        usually = NAMES["usually"].get(table, {}) | self.layout.get(table, {})
        return usually | {ours: usually.get(ours) if value is None else value for ours, value in told.items()}

    @cached_property
    def config(self) -> dict[str, Any]:
        """What config.json would hold, with what stands in other forms in the metadata, or nowhere."""
        fields, data = self._fields("config.json"), self._numbers.data
        told = self.layout.get("layer_types", NAMES["layer_types"]).items()  # lists, of each layer
        kinds = [[names[bool(value)] for value in data[key]] for key, names in told if isinstance(data.get(key), list)]
        there = {f"{match[2]}.{match[3]}" for name in self.stored if (match := _BLOCK.fullmatch(name))}
        either = map(data.get, ("attention.head_count_kv", "feed_forward_length"))  # one for all layers, or of each
        heads, inner = (value if value and isinstance(value, list) else [value] for value in either)
        of_kind = dict(zip(kinds[0], heads, strict=False)) if kinds else {}
        kept, stored = NAMES["kept"], ((one.num_bytes, one.kind) for one in self.stored.values())
        return (
            NAMES["always"]
            | fields
            | {
                "architectures": [one for key, one in self.layout["class"].items() if not key or data.get(key)][:1],
                "num_hidden_layers": self._num_layers,
                "num_key_value_heads": of_kind.get("sliding_attention") or max(heads) or fields["num_attention_heads"],
                "num_global_key_value_heads": of_kind.get("full_attention"),
                "head_dim": self._integer("attention.key_length_swa") or self._head_dim,
                **dict.fromkeys(NAMES["vocab_size"], self.stored["token_embd.weight"].shape[0]),
                "intermediate_size": inner[0] or fields["moe_intermediate_size"],
                "use_double_wide_mlp": inner[-1] != inner[0],
                "layer_types": kinds[0][: self._num_layers] if kinds else None,
                "rope_local_base_freq": fields["rope_local_base_freq"] or fields["rope_theta"],
                "rope_scaling": self._rope_scaling(),
                "partial_rotary_factor": self._rotary_dim / self._head_dim,
                "query_pre_attn_scalar": self.layout.get("scalars", {}).get(self._num_layers) or self._head_dim,
                "linear_value_head_dim": self._integer("ssm.inner_size") // (self._integer("ssm.time_step_rank") or 1),
                "sliding_window": fields["sliding_window"] or None,
                "tie_word_embeddings": "output.weight" not in self.stored,
                "eos_token_id": self._ends(),
                "packed_bytes": sum(size * kept.get(of.name, of.num_bytes) // of.num_bytes for size, of in stored),
                **{key: not there.isdisjoint(names) for key, names in NAMES["there"].items()},
            }
        )

    def _rope_scaling(self) -> dict[str, Any]:
        fields = self._fields("rope_scaling")
        kind, factor = fields["rope_type"] or "linear", fields["factor"] or fields["scale_linear"]
        if divisors := {key: self._numbers_of(tensor) for key, tensor in self._divisors.items() if tensor is not None}:
            longrope = {"rope_type": "longrope", "attention_factor": fields["temperature"]}
            return divisors if "factors" in divisors else fields | divisors | longrope
        if kind == "yarn" and type(factor) is type(temperature := fields["temperature"]) is float:
            fields["attention_factor"] = temperature * (0.1 * math.log(max(factor, 1.0)) + 1)  # as it is without it
        is_scaled = factor if kind == "linear" else kind != "none"
        return fields | {"rope_type": kind if is_scaled else "default", "factor": factor}

    def _ends(self) -> list[Any]:
        """Ids of the tokens that end a turn, said or known."""
        ends = self.layout.get("ends", NAMES["ends"])
        named = (self._metadata.data.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
        tokens = self._head.values("tokenizer.ggml.tokens").list_of(str, "tokenizer.ggml.tokens")
        return [end for end in named if end is not None] + [i for i, text in enumerate(tokens) if text in ends]

    def _numbers_of(self, tensor: StoredTensor) -> list[float]:
        """By which frequencies are divided. Raises: ConfigError where they are of another kind, or no numbers."""
        num = self._rotary_dim // 2
        if tensor.kind.name != "F32" or tensor.shape != (num,):
            raise tensor.wrong(f"must be F32, [{num}]")
        factors = list(struct.unpack_from(f"<{num}f", tensor.file.data, tensor.offset))
        if not all(0 < factor < math.inf for factor in factors):
            raise tensor.wrong("has factors that are no numbers above 0")
        return factors


def chat_templates(metadata: Fields) -> list[dict[str, str]]:
    """As tokenizer_config.json has them."""
    keys = [key for key in metadata.data if f"{key}.".startswith(f"{TEMPLATE}.")]  # with names behind, or one
    return [{"name": key[len(TEMPLATE) + 1 :] or "default", "template": metadata.text(key, "")} for key in keys]


def parts_of(path: Path) -> list[Path]:
    """All files of a model, in their order. Raises: ConfigError naming those that are missing."""
    match = _PART.fullmatch(path.name)
    numbers = range(1, int(match[3]) + 1) if match else ()
    parts = [path.with_name(f"{match[1]}-{i:05}-of-{match[3]}.gguf") for i in numbers if match]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise ConfigError(f"{str(path)!r} is incomplete: {', '.join(missing[:8])} missing")
    return parts or [path]


def is_gguf(path: Path) -> bool:
    """Whether it is a file that is a model by itself."""
    return path.suffix == ".gguf" and path.is_file()


def models_in(folder: Path, patterns: Sequence[str] = ()) -> list[Path]:
    """The GGUF files in a directory, of each model the first part; or all below it whose names fit a pattern."""
    paths = sorted(folder.rglob("*.gguf") if patterns else folder.glob("*.gguf"))
    names = {path: path.relative_to(folder).as_posix() for path in paths if not path.name.startswith("mmproj")}
    fitting = [path for path in names if not patterns or any(fnmatch(names[path], pattern) for pattern in patterns)]
    return [path for path in fitting if (part := _PART.fullmatch(path.name)) is None or part[2] == "00001"]


def open_model(path: Path) -> GgufModel:
    """The last one that was opened is kept. Raises: ConfigError."""
    stat = path.stat() if path.is_file() else None
    return _opened(path, stat and (stat.st_mtime_ns, stat.st_size))


_opened = lru_cache(maxsize=1)(lambda path, _: GgufModel(path))

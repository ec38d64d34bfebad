"""Rotary position embeddings (arXiv 2104.09864) and the scalings that stretch a model's context."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from minisgl.config.model import ModelConfig, PagedKV, RopeConfig
from minisgl.kernel.ops import RopeAngles

Tensor = torch.Tensor

_ANGLES = 2048  # positions whose angles are known from the start


class RotaryEmbedding:
    """cos and sin of every position's angles, computed when asked for: once per step, for all layers.

    The angles of a position depend on that position alone, so that cached keys stay valid however long their sequence
    becomes (docs/adr/0003-dynamic-ntk-by-position.md).
    """

    def __init__(self, config: RopeConfig, head_dim: int, device: torch.device, max_seq_len: int = 0) -> None:
        self._config, self._dim = config, config.rotary_dim or head_dim
        inv_freq, factor = inverse_frequencies(config, self._dim, max_seq_len)
        still = head_dim // 2 - len(inv_freq)  # pairs that are not rotated
        factors = torch.cat((torch.full((len(inv_freq),), factor), torch.ones(still))) * config.scale
        self._inv_freq, self._exponents = F.pad(inv_freq, (0, still)).to(device), _exponents(self._dim).to(device)
        self._factors = factors.repeat(2).to(device)

    def __call__(self, positions: Tensor) -> RopeAngles:
        """positions: [num_tokens] int64."""
        inv_freq = self._dynamic_frequencies(positions) if self._config.type == "dynamic" else self._inv_freq
        cos, sin = (angles := positions[:, None].float() * inv_freq).cos(), angles.sin()
        cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        return RopeAngles(cos[:, None] * self._factors, sin[:, None] * self._factors)

    def _dynamic_frequencies(self, positions: Tensor) -> Tensor:
        """NTK-aware scaling for the length that ends at each position: [num_tokens, head_dim / 2]."""
        factor, original, dim = self._config.scaling["factor"], self._config.max_position, self._dim
        length = (positions + 1).clamp(min=original).double()
        base = self._config.theta * (factor * length / original - (factor - 1)) ** (dim / (dim - 2))
        inv_freq = torch.reciprocal(base[:, None].float() ** self._exponents)
        return F.pad(inv_freq, (0, len(self._inv_freq) - inv_freq.shape[1]))


def rotations(model: ModelConfig, device: torch.device, longest: int) -> list[RotaryEmbedding]:
    """Of the model's tables, each for heads of those layers that have it."""
    specs = [layer.attention for layer in model.cached_layers]
    dims = {spec.rope_index: spec.cache.k_dim for spec in specs if isinstance(spec.cache, PagedKV)}
    return [RotaryEmbedding(rope, dims.get(i, model.head_dim), device, longest) for i, rope in enumerate(model.ropes)]


class AngleTables:
    """Angles of positions from 0 on, in each of a model's tables: of all a long context has, they would fill too much.

    use: told (index, cosines, sines) of each table, [positions, 1, head_dim], whenever there is a longer one.
    """

    def __init__(self, ropes: Sequence[RotaryEmbedding], use: Callable[[int, Tensor, Tensor], object]) -> None:
        self._ropes, self._use, self._num_positions, self._tables = ropes, use, 0, list[RopeAngles]()
        self.reach(_ANGLES)

    def reach(self, length: int) -> None:
        """Have those of so many positions, and more for later."""
        if length <= self._num_positions:
            return
        self._num_positions = 2 * length
        tables = [rope(torch.arange(self._num_positions)) for rope in self._ropes]
        for index, table in enumerate(tables):
            self._use(index, table.cos, table.sin)
        self._tables = tables  # the old ones are no longer used


def head_order(config: RopeConfig, head_dim: int) -> Tensor | None:
    """Which feature of a head, as checkpoints have it, stands where the kernels want it, which rotate i with
    i + head_dim / 2: [head_dim] int64; None: each stays."""
    dim = config.rotary_dim or head_dim
    if dim == head_dim and not config.is_interleaved:
        return None
    rotated, still = torch.arange(dim), torch.arange(dim, head_dim)
    first, second = (rotated[::2], rotated[1::2]) if config.is_interleaved else rotated.chunk(2)
    return torch.cat((first, still[::2], second, still[1::2]))


def inverse_frequencies(config: RopeConfig, head_dim: int, max_seq_len: int = 0) -> tuple[Tensor, float]:
    """Inverse frequencies [head_dim / 2] float32 and the factor that scales cos and sin. max_seq_len: of the longest
    sequence that there may be (docs/adr/0024-longrope-by-the-longest-sequence.md)."""
    factors = config.long_factors if max_seq_len > config.max_position and config.long_factors else config.factors
    frequency: Tensor = config.theta ** _exponents(head_dim) * torch.tensor(factors or 1.0)
    inv_freq, scaling = 1.0 / frequency, config.scaling
    if config.type in ("linear", "proportional"):  # position interpolation, arXiv 2306.15595
        inv_freq = inv_freq / scaling.get("factor", 1.0)
        inv_freq[int(scaling.get("partial_rotary_factor", 1.0) * head_dim // 2) :] = 0.0
    if config.type in ("llama3", "yarn"):
        inv_freq = _llama3(inv_freq, config) if config.type == "llama3" else _yarn(frequency, config)
    return inv_freq, scaling.get("attention_factor", 1.0)  # longrope: arXiv 2402.13753


def _exponents(head_dim: int) -> Tensor:
    return torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim


def _llama3(inv_freq: Tensor, config: RopeConfig) -> Tensor:
    """Llama 3.1: low frequencies are interpolated, high ones kept, those between blended (meta-llama/llama-models)."""
    factor, low, high = (config.scaling[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = config.max_position * inv_freq / (2 * math.pi)  # over the original context
    smooth: Tensor = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - smooth) * inv_freq / factor + smooth * inv_freq


def _yarn(frequency: Tensor, config: RopeConfig) -> Tensor:
    """YaRN, arXiv 2309.00071, section 3.2 (NTK by parts)."""
    s, dim = config.scaling, 2 * len(frequency)

    def dimension(turns: float) -> float:  # whose wave makes that many turns over the original context
        return dim * math.log(config.max_position / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = dimension(s.get("beta_fast", 32)), dimension(s.get("beta_slow", 1))
    if s.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0
    ramp: Tensor = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    inv_freq: Tensor = ramp / (s["factor"] * frequency) + (1 - ramp) / frequency
    return inv_freq

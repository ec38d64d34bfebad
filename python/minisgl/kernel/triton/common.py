"""What our Triton kernels share: how they are launched and begin, and how they read bytes of e4m3."""
# mypy: allow-untyped-decorators, disable-error-code="import-not-found, no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program works on at a time, and how it is launched. block_m: rows of queries (tokens times heads of a
    group), or pairs of one expert; block_n: keys, or output features; block_k: input features of products."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    block_k: int = 0


_TILES = msgspec.yaml.decode(Path(__file__).with_name("tiles.yaml").read_bytes())


def tiles(kernel: str, dtype: torch.dtype, capability: tuple[int, int]) -> Any:
    """What `tiles.yaml` has for a kernel."""
    name = "float32" if dtype == torch.float32 else ".".join(map(str, capability))
    return _TILES[kernel].get(name, _TILES[kernel]["other"])


def launch_options(pdl: bool) -> dict[str, bool]:
    """Programmatic dependent launch: a kernel is set up while the one before it ends. It begins with `begin`."""
    return {"launch_pdl": True} if pdl else {}


def precision(dtype: torch.dtype) -> str:
    """Of dot products."""
    return "ieee" if dtype == torch.float32 else "tf32"


def native(data: torch.Tensor) -> torch.Tensor:
    """Bytes of e4m3 as such, where the GPU converts them itself."""
    converts = data.dtype == torch.uint8 and data.is_cuda and torch.cuda.get_device_capability(data.device) >= (8, 9)
    return data.view(torch.float8_e4m3fn) if converts else data


@triton.jit
def begin(PDL: tl.constexpr):
    """Waits for the kernel ahead, and lets the next one be set up."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def widen(x, DTYPE: tl.constexpr):
    """x, or what bytes of e4m3 stand for: their bits where float16 has them, times what its exponent is short of."""
    if x.dtype == tl.uint8:
        bits = x.to(tl.uint16)
        x = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
    return x.to(DTYPE)

"""What each attention backend computes and needs, in one table, and which are taken for a model on a machine."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

from minisgl.config.model import AttentionSpec, ModelConfig, PagedKV, State
from minisgl.config.probe import PACKAGES, Capabilities
from minisgl.errors import ConfigError
from minisgl.utils.math import div_ceil

logger = logging.getLogger(__name__)

WINDOW, SCALE = "sliding windows", "a scale of the scores"
# What a layer may want beyond causal attention of heads of one size, which all layers have alike.
FEATURES: dict[str, Callable[[AttentionSpec, ModelConfig], bool]] = {
    WINDOW: lambda spec, _: spec.window is not None,
    SCALE: lambda spec, _: spec.scale is not None,
    "soft-capped scores": lambda spec, _: spec.softcap is not None,
    "attention sinks": lambda spec, _: spec.sinks,
    "recurrent states": lambda spec, _: isinstance(spec.cache, State),
    "caches that differ by layer": lambda spec, model: spec.cache != model.layers[0].attention.cache,
    "keys and values of other sizes than queries": lambda spec, model: (
        isinstance(spec.cache, PagedKV) and {spec.cache.k_dim, spec.cache.v_dim} != {model.head_dim}
    ),
}


@dataclass(frozen=True, slots=True)
class Backend:
    """What an attention backend is for."""

    devices: tuple[str, ...] = ("cuda",)
    package: str = ""  # of PACKAGES
    arch: tuple[int, int] | None = None  # the only compute capability; None: any
    head_dims: tuple[int, ...] = ()  # (): any
    max_group: int = 0  # query heads per KV head; 0: any number
    is_16_bit: bool = False  # float32 is refused
    is_compiled: bool = False  # needs nvcc
    features: tuple[str, ...] = (WINDOW,)  # of FEATURES


BACKENDS = {
    "cpu": Backend(("cpu",)),
    "sdpa": Backend(("cpu", "cuda"), features=(WINDOW, SCALE)),
    "triton": Backend(package="triton", head_dims=tuple(range(16, 257, 16))),
    "cuda": Backend(
        package="tvm_ffi", arch=(9, 0), head_dims=(64, 128), max_group=16, is_16_bit=True, is_compiled=True
    ),
    "fi": Backend(package="flashinfer", head_dims=(64, 128, 256), is_16_bit=True),
    "fa": Backend(package="sgl_kernel", arch=(9, 0), head_dims=(64, 96, 128, 192, 256), is_16_bit=True),
}
# What is taken on GPUs: the first pair for prefill and decode that fits.
_PAIRS = (("fa", "cuda"), ("fa", "triton"), ("fa", "fa"), ("triton", "cuda"), ("triton", "triton"), ("sdpa", "sdpa"))


def choose_on_cpu(asked: str | None, lack: str, model: ModelConfig, dtype: str, machine: Capabilities) -> str:
    """One backend for prefill and decode. lack: why our kernels do not compute; "" when they do.

    Raises: ConfigError naming what cannot be had, and why.
    """
    why_not = _why_not("cpu", model, dtype, machine)
    names = (asked or ("sdpa" if lack or why_not["cpu"] else "cpu")).split(",")
    if not set(names) <= set(why_not) or len(set(names)) > 1 or len(names) > 2:
        raise ConfigError(f"--attention-backend {asked}: on a CPU there are cpu and sdpa")
    if names[0] == "cpu" and lack:
        raise ConfigError(f"--attention-backend {asked}: {lack}")
    _require(names[:1], asked, why_not)
    return names[0]


def choose_on_gpu(asked: str | None, model: ModelConfig, dtype: str, machine: Capabilities) -> tuple[str, str]:
    """Prefill and decode backend, told in one line of the log.

    Raises: ConfigError naming what cannot be had, and why.
    """
    why_not = _why_not("cuda", model, dtype, machine)
    if asked is None:
        fitting = [pair for pair in _PAIRS if not any(why_not[name] for name in pair)]
        prefill, decode = fitting[0] if fitting else _PAIRS[-1]
        _require([prefill], asked, why_not)
        passed = zip(*_PAIRS[: _PAIRS.index((prefill, decode))], strict=True)
        reasons = "; ".join(f"{name} {why_not[name]}" for name in dict.fromkeys(chain(*passed)) if why_not[name])
        logger.info("attention: %s prefill, %s decode%s", prefill, decode, reasons and f" ({reasons})")
        return prefill, decode
    names = ["triton", "cuda"] if asked == "cuda" else asked.split(",")
    prefill, decode = names[0], names[-1]
    _require(names, asked, why_not)
    problem = ""
    if len(names) > 2:
        problem = "expected one backend, or prefill,decode"
    elif prefill == "cuda":
        problem = "cuda is for decode; use triton,cuda"
    elif "sdpa" in names and prefill != decode:
        problem = "sdpa computes both prefill and decode; use sdpa alone"
    if problem:
        raise ConfigError(f"--attention-backend {asked}: {problem}")
    logger.info("attention: %s prefill, %s decode, as asked", prefill, decode)
    return prefill, decode


def _require(names: list[str], asked: str | None, why_not: dict[str, str]) -> None:
    """Raises: ConfigError saying why one of them cannot be had."""
    for name in names:
        if name not in why_not:
            raise ConfigError(f"--attention-backend {asked}: {name!r} is unknown; choose from {', '.join(why_not)}")
        if why_not[name]:
            raise ConfigError(f"--attention-backend {asked or 'auto'}: {name} {why_not[name]}")


def _why_not(device: str, model: ModelConfig, dtype: str, machine: Capabilities) -> dict[str, str]:
    """Of each backend of a device, why it cannot compute this model here, and what to do; "" when it can."""
    fitting = {name: backend for name, backend in BACKENDS.items() if device in backend.devices}
    return {name: _unfit(backend, model, dtype, machine) for name, backend in fitting.items()}


def _unfit(backend: Backend, model: ModelConfig, dtype: str, machine: Capabilities) -> str:
    specs = [layer.attention for layer in model.layers]
    for feature, is_wanted in FEATURES.items():
        if feature not in backend.features and any(is_wanted(spec, model) for spec in specs):
            return f"does not compute {feature}"
    if backend.arch is not None and backend.arch != (arch := machine.gpus[0].arch):
        return f"needs compute capability {dotted(backend.arch)}, this GPU has {dotted(arch)}"
    if backend.head_dims and model.head_dim not in backend.head_dims:
        return f"does not compute head_dim {model.head_dim}"
    if backend.max_group and (group := div_ceil(model.num_qo_heads, model.num_kv_heads)) > backend.max_group:
        return f"computes up to {backend.max_group} query heads per KV head, not {group}"
    if backend.is_16_bit and dtype == "float32":
        return "does not compute float32 (--dtype)"
    if backend.package and backend.package not in machine.packages:
        return f"needs a package: pip install {PACKAGES[backend.package][0]}"
    if backend.is_compiled and machine.nvcc is None:
        return f"needs nvcc: install CUDA {machine.torch_cuda}'s toolkit, or set CUDA_HOME to it"
    return ""


def dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"

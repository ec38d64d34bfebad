"""What `resolve` decides for CPUs: what computes, in which types, on how many threads."""

from __future__ import annotations

import logging

from minisgl.config.args import ServerArgs
from minisgl.config.attention import choose_on_cpu
from minisgl.config.memory import cpu_pages, fit_seq_len
from minisgl.config.model import ModelConfig
from minisgl.config.probe import Capabilities
from minisgl.config.runtime import EngineConfig
from minisgl.env import env_bool
from minisgl.errors import ConfigError

logger = logging.getLogger(__name__)

_PAGE_SIZE = 16
_PREFILL_LENGTH = 512
_ONE_THREAD_BYTES = 64 * 2**20  # of weights; below that, waking torch's second thread costs more than it computes


def cpu_engine(args: ServerArgs, path: str, model: ModelConfig, seq_len: int, machine: Capabilities) -> EngineConfig:
    """Everything decided for CPUs. seq_len: the longest request that is wanted, in tokens.

    Raises: ConfigError naming the flag that cannot be honoured.
    """
    problem = _kernel_problem(machine)
    _refuse_gpu_options(args)
    dtype = args.dtype or _auto_dtype(model, machine, has_kernels=not problem)
    lack = problem or ("" if dtype in ("float32", "bfloat16") else f"not with --dtype {dtype}")
    kernels = not lack
    if args.quantization and lack:
        raise ConfigError(f"--quantization {args.quantization}: {lack}")
    attention = choose_on_cpu(args.attention_backend, lack, model, dtype, machine)
    kv_dtype = _kv_dtype(args.kv_cache_dtype, "float32" if kernels else dtype, dtype, attention)
    if problem:
        logger.warning("torch computes, since %s: decoding is several times slower", problem)
    page_size = args.page_size or _PAGE_SIZE
    weights = args.quantization or dtype
    num_pages = args.num_pages or cpu_pages(args, model, machine, weights, kv_dtype, page_size, seq_len)
    return EngineConfig(
        model_path=path,
        model=model,
        dtype=dtype,
        device="cpu",
        tp_size=args.tensor_parallel_size,
        num_pages=num_pages,
        page_size=page_size,
        max_running_requests=args.max_running_requests,
        max_prefill_length=args.max_prefill_length or _PREFILL_LENGTH,
        max_seq_len=fit_seq_len(args, seq_len, num_pages * page_size),
        prefill_backend=attention,
        decode_backend=attention,
        num_threads=args.cpu_threads or _num_threads(args, model, machine, dtype, kernels),
        dummy_weight=args.dummy_weight,
        kv_cache_dtype=kv_dtype,
        cpu_kernels=kernels,
        quantization=args.quantization,
    )


def _kernel_problem(machine: Capabilities) -> str:
    """Why our kernels cannot be had; "" when they can."""
    if env_bool("MINISGL_DISABLE_CPU_KERNELS"):
        return "MINISGL_DISABLE_CPU_KERNELS is set"
    if machine.cxx is None and not machine.has_compiled:
        return "there is no C++ compiler (c++, or what CXX names)"
    if "tvm_ffi" not in machine.packages:
        return "the package apache-tvm-ffi is missing"
    return ""


def _auto_dtype(model: ModelConfig, machine: Capabilities, *, has_kernels: bool) -> str:
    """bfloat16 checkpoints stay so in memory; torch alone computes them well only where the processor does."""
    if model.dtype == "bfloat16" and (has_kernels or machine.has_fast_bfloat16):
        return "bfloat16"
    return "float32"


def _kv_dtype(asked: str | None, computed: str, stored: str, attention: str) -> str:
    """computed: the type that attention computes in, and that sdpa wants its cache in; stored: that of the weights."""
    allowed = (computed,) if attention == "sdpa" else (computed, "bfloat16")
    if asked is not None and asked not in allowed:
        why = "attention sdpa computes in it; " if attention == "sdpa" else ""
        raise ConfigError(f"--kv-cache-dtype {asked}: {why}here it must be {', or '.join(allowed)}")
    return asked or (stored if stored in allowed else computed)


def _num_threads(args: ServerArgs, model: ModelConfig, machine: Capabilities, dtype: str, kernels: bool) -> int:
    if not kernels and model.weight_bytes(dtype) < _ONE_THREAD_BYTES:
        return 1
    return max(1, machine.num_cores // args.tensor_parallel_size)


def _refuse_gpu_options(args: ServerArgs) -> None:
    """What asks for less than a GPU would do is what a CPU does; the rest cannot be honoured."""
    if args.moe_backend == "triton":
        raise ConfigError("--moe-backend triton: it is for GPUs; a CPU has torch only")
    if args.cuda_graph_max_bs:
        raise ConfigError(f"--cuda-graph-max-bs {args.cuda_graph_max_bs}: it is for GPUs; leave it out on a CPU, or 0")

"""What `resolve` decides for GPUs: whether they can be used, which kernels compute, what is captured."""

from __future__ import annotations

import logging

from minisgl.config.args import ServerArgs
from minisgl.config.attention import choose_on_gpu, dotted
from minisgl.config.memory import fit_seq_len, gpu_tokens
from minisgl.config.model import ModelConfig, MoE
from minisgl.config.probe import Capabilities, Gpu
from minisgl.config.runtime import EngineConfig
from minisgl.errors import ConfigError

logger = logging.getLogger(__name__)

MIN_ARCH = (8, 0)
_PREFILL_LENGTH = 8192  # tokens
_PAGE_SIZE = 16  # tokens
_GRAPH_MAX_BS = 256  # requests
_NUM_THREADS = 4  # for loading weights


def choose_device(args: ServerArgs, machine: Capabilities) -> str:
    """ "cuda" or "cpu". Raises: ConfigError when GPUs were asked for and cannot be used."""
    if args.device == "cpu":
        return "cpu"
    problem = _cuda_problem(machine, args.tensor_parallel_size)
    if not problem:
        return "cuda"
    if args.device == "cuda":
        raise ConfigError(f"--device cuda: {problem}")
    logger.log(logging.WARNING if machine.gpus else logging.INFO, "computing on the CPU: %s", problem)
    return "cpu"


def cuda_engine(args: ServerArgs, path: str, model: ModelConfig, seq_len: int, machine: Capabilities) -> EngineConfig:
    """Everything decided for GPUs. seq_len: the longest request that is wanted, in tokens.

    Raises: ConfigError naming the flag that cannot be honoured.
    """
    tp_size = args.tensor_parallel_size
    gpus = _gpus(tp_size, machine.gpus)
    dtype = args.dtype or model.dtype
    if args.quantization:
        raise ConfigError(f"--quantization {args.quantization}: it is for CPUs so far")
    if args.kv_cache_dtype not in (None, dtype):
        raise ConfigError(f"--kv-cache-dtype {args.kv_cache_dtype}: on GPUs it is that of the weights, {dtype}")
    page_size = args.page_size or _PAGE_SIZE
    max_prefill_length = args.max_prefill_length or _PREFILL_LENGTH
    capacity = gpu_tokens(args, model, gpus, dtype, dtype, page_size, max_prefill_length)
    prefill, decode = choose_on_gpu(args.attention_backend, model, dtype, machine)
    moe_backend = _moe_backend(args.moe_backend, machine)
    return EngineConfig(
        model_path=path,
        model=model,
        dtype=dtype,
        device="cuda",
        tp_size=tp_size,
        num_pages=args.num_pages or 0,
        page_size=page_size,
        max_running_requests=args.max_running_requests,
        max_prefill_length=max_prefill_length,
        max_seq_len=fit_seq_len(args, seq_len, capacity),
        prefill_backend=prefill,
        decode_backend=decode,
        num_threads=max(1, min(_NUM_THREADS, machine.num_cores // tp_size)),
        dummy_weight=args.dummy_weight,
        kv_cache_dtype=dtype,
        memory_ratio=args.memory_ratio,
        cuda_graph_max_bs=_graph_max_bs(args, model, decode, moe_backend),
        use_pynccl=tp_size > 1 and not args.disable_pynccl,
        moe_backend=moe_backend,
    )


def _cuda_problem(machine: Capabilities, tp_size: int) -> str:
    """Why the GPUs cannot be used, and what to do; "" when they can."""
    if not machine.gpus:
        return machine.gpu_problem
    if machine.torch_cuda is None:
        return "the installed torch is a CPU build; install one that is built for CUDA"
    if machine.driver_cuda[0] < int(machine.torch_cuda.split(".")[0]):
        newest = ".".join(map(str, machine.driver_cuda))
        return (
            f"driver {machine.driver} runs CUDA {newest} at most, and torch is built for CUDA {machine.torch_cuda}; "
            f"update the driver, or install a torch for CUDA {newest} or older"
        )
    for gpu in machine.gpus[:tp_size]:
        if gpu.arch < MIN_ARCH:
            return (
                f"{gpu} has compute capability {dotted(gpu.arch)}, and {dotted(MIN_ARCH)} is needed; "
                "choose others with CUDA_VISIBLE_DEVICES, or compute with --device cpu"
            )
    return ""


def _gpus(tp_size: int, visible: tuple[Gpu, ...]) -> tuple[Gpu, ...]:
    """Rank i's GPU is the i-th visible one; they must be alike, for ranks run the same kernels."""
    gpus = visible[:tp_size]
    if len(gpus) < tp_size:
        raise ConfigError(
            f"--tensor-parallel-size {tp_size}: {len(gpus)} GPU{'s are' if len(gpus) > 1 else ' is'} visible; "
            "lower it, look at CUDA_VISIBLE_DEVICES, or compute with --device cpu"
        )
    for gpu in gpus:
        if gpu.arch != gpus[0].arch:
            raise ConfigError(
                f"--tensor-parallel-size {tp_size}: {gpus[0]} and {gpu} differ in compute capability; "
                "choose GPUs that are alike with CUDA_VISIBLE_DEVICES"
            )
    return gpus


def _graph_max_bs(args: ServerArgs, model: ModelConfig, decode: str, moe_backend: str) -> int:
    asked, problem = args.cuda_graph_max_bs, ""
    if decode == "sdpa":
        problem = "sdpa cannot be captured; choose another --attn, or 0"
    elif moe_backend == "torch" and any(isinstance(layer.mlp, MoE) for layer in model.layers):
        problem = "--moe-backend torch cannot be captured; choose triton, or 0"
    if asked and problem:
        raise ConfigError(f"--cuda-graph-max-bs {asked}: {problem}")
    return 0 if problem else min(_GRAPH_MAX_BS if asked is None else asked, args.max_running_requests)


def _moe_backend(asked: str | None, machine: Capabilities) -> str:
    if asked == "triton" and "triton" not in machine.packages:
        raise ConfigError("--moe-backend triton: needs a package: pip install triton")
    return asked or ("triton" if "triton" in machine.packages else "torch")

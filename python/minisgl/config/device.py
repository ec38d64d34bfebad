"""What `resolve` decides for a device: whether GPUs can be used; what computes, in which types; how many tokens' keys
and values fit beside the weights, and what follows for the longest request."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from minisgl.config.args import ServerArgs
from minisgl.config.attention import choose_on_cpu, choose_on_gpu, dotted
from minisgl.config.model import DTYPE_BYTES, ModelConfig, MoE
from minisgl.config.probe import Capabilities, Gpu
from minisgl.config.runtime import EngineConfig
from minisgl.env import env_bool
from minisgl.errors import ConfigError
from minisgl.utils.math import div_ceil

logger = logging.getLogger(__name__)

GIB = 2**30
MIN_ARCH = (8, 0)
_PAGE_SIZE = 16  # tokens
_CPU_PREFILL_LENGTH, _GPU_PREFILL_LENGTH = 512, 8192  # tokens
_ONE_THREAD_BYTES = 64 * 2**20  # of weights; below that, waking torch's second thread costs more than it computes
_GRAPH_MAX_BS = 256  # requests
_LOADING_THREADS = 4  # beside a GPU
_GPU_RESERVE = GIB  # bytes: CUDA's context, libraries' workspaces, captured graphs
_ESTIMATE = 0.9  # share of an estimated KV cache that is counted on, before the engine has measured


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


def cpu_engine(args: ServerArgs, path: str, model: ModelConfig, seq_len: int, machine: Capabilities) -> EngineConfig:
    """Everything decided for CPUs. seq_len: the longest request that is wanted, in tokens.

    Raises: ConfigError naming the flag that cannot be honoured.
    """
    problem = _kernel_problem(machine)
    # What asks for less than a GPU would do is what a CPU does; the rest cannot be honoured.
    if args.moe_backend == "triton":
        raise ConfigError("--moe-backend triton: it is for GPUs; a CPU has torch only")
    if args.cuda_graph_max_bs:
        raise ConfigError(f"--cuda-graph-max-bs {args.cuda_graph_max_bs}: it is for GPUs; leave it out on a CPU, or 0")
    # bfloat16 checkpoints stay so in memory; torch alone computes them well only where the processor does.
    stays = model.dtype == "bfloat16" and (not problem or machine.has_fast_bfloat16)
    dtype = args.dtype or ("bfloat16" if stays else "float32")
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
        max_prefill_length=args.max_prefill_length or _CPU_PREFILL_LENGTH,
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
    max_prefill_length = args.max_prefill_length or _GPU_PREFILL_LENGTH
    capacity = gpu_tokens(args, model, gpus, dtype, dtype, page_size, max_prefill_length)
    prefill, decode = choose_on_gpu(args.attention_backend, model, dtype, machine)
    if args.moe_backend == "triton" and "triton" not in machine.packages:
        raise ConfigError("--moe-backend triton: needs a package: pip install triton")
    moe_backend = args.moe_backend or ("triton" if "triton" in machine.packages else "torch")
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
        num_threads=max(1, min(_LOADING_THREADS, machine.num_cores // tp_size)),
        dummy_weight=args.dummy_weight,
        kv_cache_dtype=dtype,
        memory_ratio=args.memory_ratio,
        cuda_graph_max_bs=_graph_max_bs(args, model, decode, moe_backend),
        use_pynccl=tp_size > 1 and not args.disable_pynccl,
        moe_backend=moe_backend,
    )


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


def cpu_pages(
    args: ServerArgs, model: ModelConfig, machine: Capabilities, dtype: str, kv_dtype: str, page_size: int, seq_len: int
) -> int:
    """dtype: of the weights, or "int8".

    Pages that fit the memory, and no more than all running requests could ever use. Memory is taken on first use."""
    tp_size = args.tensor_parallel_size
    budget = int(machine.memory * args.memory_ratio) // tp_size - model.weight_bytes(dtype, tp_size)
    budget -= args.max_running_requests * model.state_bytes_per_row(kv_dtype)
    affordable = budget // max(1, model.kv_bytes_per_token(kv_dtype, tp_size) * page_size)
    if affordable < 1:
        weights = model.weight_bytes(dtype, tp_size) * tp_size / GIB
        raise ConfigError(
            f"--memory-ratio {args.memory_ratio}: {machine.memory / GIB:.1f} GiB of memory are available, "
            f"the weights take {weights:.1f} GiB, and no room is left for the KV cache"
        )
    return min(affordable, args.max_running_requests * div_ceil(seq_len, page_size))


def gpu_budget(gpu: Gpu, ratio: float) -> int:
    """Bytes of a GPU that one rank may take: the share `ratio` of the whole, less what other programs hold."""
    return gpu.free_memory - int(gpu.total_memory * (1 - ratio))


def gpu_tokens(
    args: ServerArgs, model: ModelConfig, gpus: Sequence[Gpu], dtype: str, kv_dtype: str, page_size: int, step_len: int
) -> int:
    """Tokens that the KV cache will hold at least, by estimate: the engine measures what a step of `step_len` takes.

    Raises: ConfigError when the weights, or the pages that were asked for, do not fit.
    """
    tp_size, ratio = args.tensor_parallel_size, args.memory_ratio
    gpu = min(gpus, key=lambda gpu: gpu_budget(gpu, ratio))
    budget = gpu_budget(gpu, ratio) - args.max_running_requests * model.state_bytes_per_row(kv_dtype)
    weights, kv_bytes = model.weight_bytes(dtype, tp_size), max(1, model.kv_bytes_per_token(kv_dtype, tp_size))
    room = f"{gpu} has {gpu.free_memory / GIB:.1f} of {gpu.total_memory / GIB:.1f} GiB free"
    if args.num_pages is not None:
        kv = args.num_pages * page_size * kv_bytes
        if weights + kv > budget:
            raise ConfigError(
                f"--num-pages {args.num_pages}: {room}, the weights take {weights / GIB:.1f} GiB and the KV cache "
                f"{kv / GIB:.1f}; lower it, or raise --memory-ratio {ratio} or --tensor-parallel-size {tp_size}"
            )
        return args.num_pages * page_size
    step = _step_bytes(model, dtype, tp_size, step_len, args.max_running_requests)
    tokens = int((budget - weights - step - _GPU_RESERVE) / kv_bytes * _ESTIMATE)
    if tokens < page_size:
        raise ConfigError(
            f"--memory-ratio {ratio}: {room}, the weights take {weights / GIB:.1f} GiB, a step {step / GIB:.1f}, and "
            f"no room is left for the KV cache; raise --tensor-parallel-size {tp_size}, free the GPU, or lower "
            f"--max-prefill-length {step_len}"
        )
    return tokens // page_size * page_size


def _step_bytes(model: ModelConfig, dtype: str, tp_size: int, step_len: int, num_logits: int) -> int:
    """About what the activations of the largest step take: the widest of a layer, and logits with a float32 copy."""
    inner = max(layer.mlp.active_features for layer in model.layers)
    per_token = 4 * model.hidden_size + (3 * inner + 2 * model.num_qo_heads * model.head_dim) // tp_size
    return step_len * per_token * DTYPE_BYTES[dtype] + num_logits * model.vocab_size * (DTYPE_BYTES[dtype] + 4)


def fit_seq_len(args: ServerArgs, wanted: int, capacity: int) -> int:
    """One request must be able to run alone in a KV cache of `capacity` tokens."""
    if wanted <= capacity:
        return wanted
    if args.max_seq_len is not None:
        raise ConfigError(
            f"--max-seq-len {wanted}: the KV cache holds {capacity} tokens; see --num-pages and --memory-ratio"
        )
    if capacity < 2:
        raise ConfigError("--num-pages: the KV cache must hold at least 2 tokens")
    logger.warning("the KV cache holds %d tokens: --max-seq-len is lowered to that from %d", capacity, wanted)
    return capacity

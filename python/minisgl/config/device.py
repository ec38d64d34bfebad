"""What `resolve` decides for a device: whether GPUs can be used; what computes, in which types; how many tokens' keys
and values fit beside the weights, and what follows for the longest request."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import msgspec

from minisgl.config.args import ServerArgs
from minisgl.config.draft import longest_draft
from minisgl.config.model import DTYPE_BYTES, AttentionSpec, ModelConfig, MoE, PagedKV
from minisgl.config.probe import PACKAGES, Capabilities, Gpu
from minisgl.config.runtime import EngineConfig
from minisgl.config.states import ShortConv
from minisgl.core import most_samples
from minisgl.env import env_bool
from minisgl.errors import ConfigError
from minisgl.utils.math import div_ceil

logger = logging.getLogger(__name__)

GIB, MIN_ARCH = 2**30, (8, 0)
_PAGE_SIZE = 16  # tokens
_PREFILL_LENGTH = {"cpu": 512, "cuda": 8192}  # tokens
_ONE_THREAD_BYTES = 64 * 2**20  # of weights; below that, waking torch's second thread costs more than it computes
_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}  # else products are far slower than float32's
_FLOAT16 = {"avx2", "f16c"}  # our CPU kernels read it as fast as bfloat16
_GRAPH_MAX_BS = 256  # requests
_LOADING_THREADS = 4  # beside a GPU
_GPU_RESERVE = GIB  # bytes: CUDA's context, libraries' workspaces, captured graphs
_ESTIMATE = 0.9  # share of an estimated KV cache that is counted on, before the engine has measured

# What a layer may want beyond causal attention of heads of one size, which all layers have alike.
FEATURES: dict[str, Callable[[AttentionSpec, ModelConfig], bool]] = {
    "sliding windows": lambda spec, _: spec.window is not None,
    "soft-capped scores": lambda spec, _: spec.softcap is not None,
    "attention sinks": lambda spec, _: spec.sinks,
    "caches that differ by layer": lambda spec, model: spec.cache != model.caches()[0],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """An attention backend of `backends.yaml`, which says what the fields mean."""

    features: tuple[str, ...]
    made_by: str = ""
    devices: tuple[str, ...] = ("cuda",)
    package: str = ""
    arch: tuple[int, int] | None = None
    head_dims: tuple[int, ...] = ()
    max_group: int = 0
    is_16_bit: bool = False
    is_compiled: bool = False


BACKENDS = msgspec.yaml.decode(Path(__file__).with_name("backends.yaml").read_bytes(), type=dict[str, Backend])
# What is taken: the first one for prefill, with the first one for decode, that fit the device and the model.
_PAIRS = {"cpu": ["cpu"], "fa": ["cuda", "triton", "fa"], "triton": ["cuda", "triton"], "sdpa": ["sdpa"]}


def choose_device(args: ServerArgs, machine: Capabilities) -> str:
    """ "cuda" or "cpu". Raises: ConfigError when GPUs were asked for and cannot be used."""
    if args.device == "cpu":
        return "cpu"
    if not (problem := _cuda_problem(machine, args.tensor_parallel_size)):
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
        newest = dotted(machine.driver_cuda)
        why = f"driver {machine.driver} runs CUDA {newest} at most, and torch is built for CUDA {machine.torch_cuda}"
        return f"{why}; update the driver, or install a torch for CUDA {newest} or older"
    for gpu in machine.gpus[:tp_size]:
        if gpu.arch < MIN_ARCH:
            why = f"{gpu} has compute capability {dotted(gpu.arch)}, and {dotted(MIN_ARCH)} is needed"
            return f"{why}; choose others with CUDA_VISIBLE_DEVICES, or compute with --device cpu"
    return ""


def step_costs(engine: EngineConfig) -> tuple[float, float]:
    """`SchedulerConfig.step_costs`. On GPUs about what it takes beside an H200: bytes that are read; half a millisecond
    a step, and each pass of a second model, of which there is one more than it tells; 0.03 a token that a head tells,
    0.005 a recurrent layer; 0.4 while the host plans, with 0.012 a token; where the engine tells drafts, steps follow:
    0.15, with 0.01. Steps of drafts that cannot be captured (short convolutions) take as long as two."""
    if engine.device == "cuda" and any(isinstance(kind, ShortConv) for kind in engine.model.states):
        return 0.06, 1.0
    model, num_bytes = engine.model, engine.model.weight_bytes(engine.dtype, engine.tp_size)
    head = num_bytes * len(model.mtp) / len(model.layers) + model.vocab_size * model.hidden_size * 0.56 / engine.tp_size
    told = model.second[1].weight_bytes(engine.dtype, engine.tp_size) if model.second and not model.mtp else head
    num_told = 1 if model.second and model.second[1].block else engine.draft_len * bool(model.mtp or model.second)
    share = model.second[1].weight_bytes("int8") / model.weight_bytes("int8") if model.second else 0  # of a guess
    host = 2.2e-4 if model.mtp else 1.3e-4  # seconds
    of_cpu = 0.15 + share + 0.15 * bool(model.mtp), 0.03 + host / (1.5e-4 + num_bytes / 6e10)
    is_model, step = model.second is not None and not model.mtp, 5e-4 + num_bytes / 4e12
    telling = (num_told + 1) * (5e-4 + told / 4e12) if is_model else num_told * (3e-5 + told / 4e12)
    host, row = (1.5e-4, 1e-5) if num_told else (4e-4, 12e-6)
    verify = (host + telling + 5e-6 * len(model.states)) / step
    return of_cpu if engine.device == "cpu" else (0.004 + row / step, verify)


def _head_pays(args: ServerArgs, engine: EngineConfig, machine: Capabilities) -> bool:
    """Whether `--speculate auto` is the model's own head: on CPUs where our kernels compute all of it. On GPUs masks
    beside Python are worth more, which steps that verify drafts do not have."""
    model = engine.model
    is_dense = not any(isinstance(layer.mlp, MoE) for layer in model.cached_layers)
    is_ours = args.dtype != "float16" and args.attention_backend in (None, "cpu", "cpu,cpu") and engine.tp_size == 1
    is_plain = model.pooling is None and not (model.packed_bytes or model.layer_inputs or model.layer_scalars)
    return engine.device == "cpu" and is_dense and is_ours and is_plain and not _kernel_problem(machine)


def attention_tokens(engine: EngineConfig) -> int:
    """`SchedulerConfig.attention_tokens`. On CPUs what operations of layers say, which take about as long in products
    as in attention; of those whose windows slide, what they see of the longest sequence. On GPUs it is not counted."""
    model, longest = engine.model, engine.max_seq_len
    weights = sum(3 * layer.mlp.active_features * model.hidden_size for layer in model.layers)
    weights += sum(model.attention_weights(layer.attention) for layer in model.layers)
    kinds = [(layer.attention.cache, min(1, (layer.attention.window or longest) / longest)) for layer in model.layers]
    pair = sum((cache.k_dim + cache.v_dim) * seen for cache, seen in kinds if isinstance(cache, PagedKV))
    return int(weights / pair / model.num_qo_heads) if engine.device == "cpu" and pair else 1 << 40


def dotted(version: tuple[int, ...]) -> str:
    """A version in words; "?" where it is not known."""
    return ".".join(map(str, version)) or "?"


def decide_engine(args: ServerArgs, path: str, model: ModelConfig, seq_len: int, machine: Capabilities) -> EngineConfig:
    """Everything that depends on the device. seq_len: the longest request that is wanted, in tokens.

    Raises: ConfigError naming the flag that cannot be honoured."""
    device, tp_size, dtype = choose_device(args, machine), args.tensor_parallel_size, args.dtype or model.dtype
    num_snapshots = args.num_state_snapshots or max(16, args.max_running_requests)
    speculate = args.speculate or ("mtp" if model.mtp else "off")
    if args.speculate == "mtp" and not model.mtp:
        raise ConfigError(f"--speculate mtp: {path} has no head for it; choose ngram, or off")
    wanted = EngineConfig(
        model_path=path,
        model=model,
        dtype=dtype,
        device=device,
        tp_size=tp_size,
        num_pages=args.num_pages or 0,
        page_size=args.page_size or _PAGE_SIZE,
        max_running_requests=args.max_running_requests,
        max_prefill_length=args.max_prefill_length or _PREFILL_LENGTH[device],
        max_seq_len=seq_len,
        prefill_backend="",
        decode_backend="",
        num_threads=max(1, machine.num_cores // tp_size),
        dummy_weight=args.dummy_weight,
        kv_cache_dtype=args.kv_cache_dtype or dtype,
        quantization=args.quantization,
        memory_ratio=args.memory_ratio,
        num_snapshots=num_snapshots if model.states and args.cache_type == "radix" else 0,
        window=model.window if model.window < seq_len else 0,
        draft_len=longest_draft(speculate, args.speculate_tokens, device == "cpu" and not model.states, model.states),
    )
    if not args.speculate and model.mtp and not _head_pays(args, wanted, machine):
        return decide_engine(args, path, replace(model, mtp=()), seq_len, machine)
    if args.quantization and model.packed_bytes:
        raise ConfigError(f"--quantization {args.quantization}: the weights of {path} are packed already")
    return _on_cpu(args, wanted, machine) if device == "cpu" else _on_gpus(args, wanted, machine)


def _on_cpu(args: ServerArgs, wanted: EngineConfig, machine: Capabilities) -> EngineConfig:
    model, problem = wanted.model, _kernel_problem(machine)
    # What asks for less than a GPU would do is what a CPU does; the rest cannot be honoured.
    if args.moe_backend == "triton":
        raise ConfigError("--moe-backend triton: it is for GPUs; a CPU has torch only")
    if args.cuda_graph_max_bs:
        raise ConfigError(f"--cuda-graph-max-bs {args.cuda_graph_max_bs}: it is for GPUs; leave it out on a CPU, or 0")
    # bfloat16 checkpoints stay so in memory; torch alone computes them well only where the processor does.
    stays = model.dtype == "bfloat16" and (not problem or _BFLOAT16 & machine.cpu_flags)
    dtype = args.dtype or ("bfloat16" if stays else "float32")
    lack = problem or ("" if dtype in ("float32", "bfloat16") else f"not with --dtype {dtype}")
    if "fp8" in (args.quantization, args.kv_cache_dtype):
        flag = "--quantization" if args.quantization == "fp8" else "--kv-cache-dtype"
        raise ConfigError(f"{flag} fp8: it is for GPUs; CPUs have int8")
    if args.quantization and lack:
        raise ConfigError(f"--quantization {args.quantization}: {lack}")
    attention, _ = _choose_attention(replace(wanted, dtype=dtype), args.attention_backend, lack, machine)
    is_narrow = dtype == "bfloat16" and not lack
    one_thread = lack and model.weight_bytes(dtype) < _ONE_THREAD_BYTES
    config = replace(
        wanted,
        dtype=dtype,
        prefill_backend=attention,
        decode_backend=attention,
        num_threads=args.cpu_threads or (1 if one_thread else wanted.num_threads),
        kv_cache_dtype=args.kv_cache_dtype or ("float16" if is_narrow and machine.cpu_flags >= _FLOAT16 else dtype),
        cpu_kernels=not lack,
    )
    if lack:
        logger.warning("our kernels: %s; torch computes, and decoding is several times slower", lack)
    config = _with_states(config, int(machine.memory * config.memory_ratio) // config.tp_size)
    num_pages, num_window_pages = _cpu_pages(config, machine.memory)
    seq_len = _fit_seq_len(args, wanted.max_seq_len, num_pages * config.page_size)
    return replace(config, num_pages=num_pages, num_window_pages=num_window_pages, max_seq_len=seq_len)


def _kernel_problem(machine: Capabilities) -> str:
    """Why our kernels cannot be had; "" when they can."""
    if env_bool("MINISGL_DISABLE_CPU_KERNELS"):
        return "MINISGL_DISABLE_CPU_KERNELS is set"
    if machine.cxx is None and not machine.has_compiled:
        return "there is no C++ compiler (c++, or what CXX names)"
    return "the package apache-tvm-ffi is missing" if "tvm_ffi" not in machine.packages else ""


def _on_gpus(args: ServerArgs, wanted: EngineConfig, machine: Capabilities) -> EngineConfig:
    tp_size, dtype = wanted.tp_size, wanted.dtype
    gpus = _gpus(tp_size, machine.gpus)
    problems = {"it is for CPUs; GPUs have fp8": args.quantization != "fp8", "not with float32": dtype == "float32"}
    if args.quantization and (problem := next((text for text, applies in problems.items() if applies), "")):
        raise ConfigError(f"--quantization {args.quantization}: {problem}")
    if wanted.kv_cache_dtype not in (dtype, "fp8"):
        raise ConfigError(f"--kv-cache-dtype {args.kv_cache_dtype}: on GPUs it is that of the weights, {dtype}, or fp8")
    free = min(gpu.free_memory - int(gpu.total_memory * (1 - args.memory_ratio)) for gpu in gpus)
    wanted = _with_states(wanted, free)
    capacity = gpu_tokens(wanted, gpus)
    prefill, decode = _choose_attention(wanted, args.attention_backend, "", machine)
    if (wanted.model.mtp or wanted.model.second) and decode in ("fi", "sdpa"):  # which need the host before each token
        raise ConfigError(f"heads and models that guess: not with the attention of {decode}; choose another --attn")
    moe_backend = args.moe_backend or ("triton" if "triton" in machine.packages else "torch")
    if moe_backend == "triton" and "triton" not in machine.packages:
        raise ConfigError("--moe-backend triton: needs a package: pip install triton")
    return replace(
        wanted,
        max_seq_len=_fit_seq_len(args, wanted.max_seq_len, capacity),
        prefill_backend=prefill,
        decode_backend=decode,
        num_threads=min(_LOADING_THREADS, wanted.num_threads),
        cuda_graph_max_bs=_graph_max_bs(args, wanted, decode, moe_backend),
        use_pynccl=tp_size > 1 and not args.disable_pynccl,
        moe_backend=moe_backend,
    )


def _gpus(tp_size: int, visible: tuple[Gpu, ...]) -> tuple[Gpu, ...]:
    """Rank i's GPU is the i-th visible one; they must be alike, for ranks run the same kernels."""
    gpus = visible[:tp_size]
    flag, hint = f"--tensor-parallel-size {tp_size}", "look at CUDA_VISIBLE_DEVICES, or compute with --device cpu"
    if len(gpus) < tp_size:
        raise ConfigError(f"{flag}: {len(gpus)} GPU{'s are' if len(gpus) > 1 else ' is'} visible; lower it, {hint}")
    if other := next((gpu for gpu in gpus if gpu.arch != gpus[0].arch), None):
        hint = "choose GPUs that are alike with CUDA_VISIBLE_DEVICES"
        raise ConfigError(f"{flag}: {gpus[0]} and {other} differ in compute capability; {hint}")
    return gpus


def _graph_max_bs(args: ServerArgs, wanted: EngineConfig, decode: str, moe_backend: str) -> int:
    asked, problem = args.cuda_graph_max_bs, ""
    if decode == "sdpa":
        problem = "sdpa cannot be captured; choose another --attn, or 0"
    elif moe_backend == "torch" and any(isinstance(layer.mlp, MoE) for layer in wanted.model.layers):
        problem = "--moe-backend torch cannot be captured; choose triton, or 0"
    if asked and problem:
        raise ConfigError(f"--cuda-graph-max-bs {asked}: {problem}")
    most = most_samples(wanted.max_running_requests) if wanted.draft_len else wanted.max_running_requests
    return 0 if problem else min(_GRAPH_MAX_BS if asked is None else asked, most)


def _choose_attention(wanted: EngineConfig, asked: str | None, lack: str, machine: Capabilities) -> tuple[str, str]:
    """Prefill and decode backend, told in one line of the log. lack: why our CPU kernels do not compute; "" if they do.

    Raises: ConfigError naming what cannot be had, and why."""
    fitting = {name: backend for name, backend in BACKENDS.items() if wanted.device in backend.devices}
    why_not = {name: _unfit(backend, wanted, machine) for name, backend in fitting.items()}
    why_not |= {"cpu": f"cannot be had: {lack}"} if lack else {}
    pairs = [(one, other) for one, others in _PAIRS.items() for other in others if {one, other} <= why_not.keys()]
    best = next((pair for pair in pairs if not any(why_not[name] for name in pair)), pairs[-1])
    names = best if asked is None else ("triton", "cuda") if asked == "cuda" else tuple(asked.split(","))
    prefill, decode = names[0], names[-1]
    problems = {f"{name!r} is unknown; choose from {', '.join(why_not)}": name not in why_not for name in names}
    problems |= {f"{name} {why_not[name]}": bool(why_not.get(name)) for name in names if name in why_not}
    problems |= {
        "expected one backend, or prefill,decode": len(names) > 2,
        "cuda is for decode; use triton,cuda": prefill == "cuda",
        f"{prefill} and {decode} do not go together; use one alone": prefill != decode and "sdpa" in names,
    }
    if problem := next((text for text, applies in problems.items() if applies), ""):
        raise ConfigError(f"--attention-backend {asked or 'auto'}: {problem}")
    passed = chain(*pairs[: pairs.index(best)]) if asked is None else ()
    reasons = "; ".join(f"{name} {why_not[name]}" for name in dict.fromkeys(passed) if why_not[name])
    logger.info("attention: %s prefill, %s decode%s", prefill, decode, reasons and f" ({reasons})")
    return prefill, decode


def _unfit(backend: Backend, wanted: EngineConfig, machine: Capabilities) -> str:
    model = wanted.model
    if model.second and not model.mtp and (why := _unfit(backend, replace(wanted, model=model.second[1]), machine)):
        return f"{why} (of --draft-model)"
    specs = [spec for layer in model.layers if isinstance((spec := layer.attention).cache, PagedKV)]
    for feature, is_wanted in FEATURES.items():
        if feature not in backend.features and any(is_wanted(spec, model) for spec in specs):
            return f"does not compute {feature}"
    if wanted.kv_cache_dtype == "fp8" and "fp8 caches" not in backend.features:
        return "does not read --kv-cache-dtype fp8"
    if backend.arch is not None and backend.arch != (arch := machine.gpus[0].arch):
        return f"needs compute capability {dotted(backend.arch)}, this GPU has {dotted(arch)}"
    if backend.head_dims and model.head_dim not in backend.head_dims:
        return f"does not compute head_dim {model.head_dim}"
    if backend.max_group and (group := div_ceil(model.num_qo_heads, model.num_kv_heads)) > backend.max_group:
        return f"computes up to {backend.max_group} query heads per KV head, not {group}"
    if backend.is_16_bit and wanted.dtype == "float32":
        return "does not compute float32 (--dtype)"
    if backend.package and backend.package not in machine.packages:
        return f"needs a package: pip install {PACKAGES[backend.package][0]}"
    if backend.is_compiled and machine.nvcc is None:
        return f"needs nvcc: install CUDA {machine.torch_cuda}'s toolkit, or set CUDA_HOME to it"
    return ""


def _with_states(config: EngineConfig, memory: int) -> EngineConfig:
    """Fewer requests at once, where their states would take more than half of what weights leave of a rank's memory."""
    rows, room = config.max_running_requests, memory - config.model.weight_bytes(kept_as(config), config.tp_size)
    num_slots = room // 2 // max(1, config.model.state_bytes(config.tp_size, config.draft_len))
    if not config.model.states or config.num_states <= num_slots:
        return config
    fitting = max(1, min(rows, max((num_slots - 1) // 2, num_slots - 1 - config.num_snapshots)))
    kept = min(config.num_snapshots, max(1, num_slots - 1 - fitting))
    logger.warning("states fill half of the memory: --max-running-requests %d, and %d snapshots", fitting, kept)
    return replace(config, max_running_requests=fitting, num_snapshots=kept)


def _cpu_pages(config: EngineConfig, memory: int) -> tuple[int, int]:
    """Pages, and those of windows, that are asked for, or else fit the memory, and no more than all running requests
    could ever use. Memory is taken on first use."""
    weights = config.model.weight_bytes(kept_as(config), config.tp_size)
    weights += bool(config.model.mtp) * config.model.vocab_size * config.model.hidden_size  # the head's LM head: 8 bits
    budget = int(memory * config.memory_ratio) // config.tp_size - weights
    num_pages, num_window_pages = config.pages_for(budget - config.state_bytes)
    if num_pages < 1:
        why = f"--memory-ratio {config.memory_ratio}: {memory / GIB:.1f} GiB of memory are available, the weights take "
        raise ConfigError(f"{why}{weights * config.tp_size / GIB:.1f} GiB, and no room is left for the KV cache")
    used = config.num_pages or config.max_running_requests * div_ceil(config.max_seq_len, config.page_size)
    return min(num_pages, used), min(num_window_pages, used)


def kept_as(config: EngineConfig) -> str:
    """As what weights are held, for `weight_bytes`. On GPUs integers of more than 4 bits are widened."""
    stored, stays = config.model.quantization, config.model.packed_bytes and config.cpu_kernels
    if config.model.packed_bytes and config.device == "cuda":
        is_wide = stored is not None and stored.layout != "float8" and any(s.bits != 4 for s in stored.schemes)
        stays = config.dtype != "float32" and not is_wide
    return "packed" if stays else config.quantization or config.dtype


def gpu_tokens(config: EngineConfig, gpus: Sequence[Gpu]) -> int:
    """Tokens that the KV cache will hold at least, by estimate: the engine measures what a step takes.

    Raises: ConfigError when the weights, or the pages that were asked for, do not fit."""
    ratio, model, tp_size = config.memory_ratio, config.model, config.tp_size
    # One rank may take this share of the whole, less what other programs hold.
    budgets = [gpu.free_memory - int(gpu.total_memory * (1 - ratio)) for gpu in gpus]
    gpu = gpus[budgets.index(min(budgets))]
    weights = model.weight_bytes(kept_as(config), tp_size)
    room = f"{gpu} has {gpu.free_memory / GIB:.1f} of {gpu.total_memory / GIB:.1f} GiB free"
    room = f"{room}, the weights take {weights / GIB:.1f} GiB"
    budget = min(budgets) - weights - config.state_bytes
    if config.num_pages:
        if (kv := config.kv_bytes(*config.pages_for(0))) > budget:
            hint = f"lower it, or raise --memory-ratio {ratio} or --tensor-parallel-size {tp_size}"
            raise ConfigError(f"--num-pages {config.num_pages}: {room} and the KV cache {kv / GIB:.1f}; {hint}")
        return config.num_pages * config.page_size
    # About what the activations of the largest step take: the widest of a layer, and logits with a float32 copy.
    size, inner = DTYPE_BYTES[config.dtype], max(layer.mlp.active_features for layer in model.layers)
    per_token = 4 * model.hidden_size + (3 * inner + 2 * model.num_qo_heads * model.head_dim) // tp_size
    step = config.max_prefill_length * per_token * size + config.max_running_requests * model.vocab_size * (size + 4)
    num_pages, _ = config.pages_for(int((budget - step - _GPU_RESERVE) * _ESTIMATE))
    if num_pages < 1:
        why = f"{room}, a step {step / GIB:.1f}, and no room is left for the KV cache"
        hint = f"raise --tensor-parallel-size {tp_size}, free the GPU, or lower --max-prefill-length"
        raise ConfigError(f"--memory-ratio {ratio}: {why}; {hint} {config.max_prefill_length}")
    return num_pages * config.page_size


def _fit_seq_len(args: ServerArgs, wanted: int, capacity: int) -> int:
    """What is wanted, or less: one request must be able to run alone in a KV cache of `capacity` tokens."""
    if wanted <= capacity:
        return wanted
    if args.max_seq_len is not None:
        hint = "see --num-pages and --memory-ratio"
        raise ConfigError(f"--max-seq-len {wanted}: the KV cache holds {capacity} tokens; {hint}")
    if capacity < 2:
        raise ConfigError("--num-pages: the KV cache must hold at least 2 tokens")
    logger.warning("the KV cache holds %d tokens: --max-seq-len is lowered to that from %d", capacity, wanted)
    return capacity

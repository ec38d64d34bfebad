"""Every automatic choice, from options, a model's shape and a machine."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from minisgl.benchmark.shapes import read_shape, write_shape
from minisgl.config.args import args_from_options, parse_args
from minisgl.config.device import gpu_tokens, step_costs
from minisgl.config.families import read_model_config
from minisgl.config.locate import DEMO_MODEL, locate_model
from minisgl.config.model import (
    AttentionSpec,
    DenseMLP,
    LayerNorms,
    LayerSpec,
    ModelConfig,
    MoE,
    PagedKV,
    RopeConfig,
)
from minisgl.config.pooling import Pooling
from minisgl.config.probe import Capabilities, Gpu, Nvidia, probe, probe_nvidia, torch_cuda, visible_devices
from minisgl.config.quantization import Quantization, Scheme
from minisgl.config.resolve import ModelFiles, prepare, read_default_sampling, resolve
from minisgl.config.runtime import ServerConfig
from minisgl.config.states import DeltaNet
from minisgl.errors import ConfigError


def shape(num_layers: int = 28, num_kv_heads: int = 8, inner: int = 3072, **changes: Any) -> ModelConfig:
    """Qwen3-0.6B's, or that with changes."""
    head_dim = changes.get("head_dim", 128)
    layer = LayerSpec(
        AttentionSpec(PagedKV(num_kv_heads, head_dim, head_dim)), DenseMLP(inner), LayerNorms(of_heads="each")
    )
    fields: dict[str, Any] = {
        "architecture": "Qwen3ForCausalLM",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "num_qo_heads": 16,
        "head_dim": head_dim,
        "rms_norm_eps": 1e-6,
        "layers": (layer,) * num_layers,
        "ropes": (RopeConfig(1e6),),
        "max_position": 40960,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "eos_token_ids": (7, 8),
    }
    return ModelConfig(**fields | changes)


MODEL = shape()
MACHINE = Capabilities(num_cores=8, memory=24 * 2**30, cpu_flags=frozenset({"avx2", "fma"}))
COMPILES = replace(MACHINE, cxx="/usr/bin/c++", packages=frozenset({"tvm_ffi"}))
HALVES = replace(COMPILES, cpu_flags=MACHINE.cpu_flags | {"f16c"})


def decide(machine: Capabilities = MACHINE, model: ModelConfig = MODEL, **options: Any) -> ServerConfig:
    return resolve(args_from_options(options), ModelFiles(Path("/m"), model, {}), machine)


def test_bfloat16_only_where_the_cpu_multiplies_it() -> None:
    assert decide().engine.dtype == "float32"
    fast = replace(MACHINE, cpu_flags=frozenset({"avx512_bf16"}))
    assert decide(fast).engine.dtype == "bfloat16"
    assert decide(fast, replace(MODEL, dtype="float32")).engine.dtype == "float32"
    assert decide(dtype="bfloat16").engine.dtype == "bfloat16"


def test_cpu_kernels_keep_what_the_checkpoint_has() -> None:
    engine = decide(COMPILES).engine
    assert (engine.cpu_kernels, engine.dtype, engine.kv_cache_dtype) == (True, "bfloat16", "bfloat16")
    assert (engine.prefill_backend, engine.decode_backend, engine.num_threads) == ("cpu", "cpu", 8)
    assert decide(HALVES).engine.kv_cache_dtype == "float16"
    assert decide(HALVES, dtype="float32").engine.kv_cache_dtype == "float32"
    reference = decide(HALVES, attention_backend="sdpa").engine
    assert (reference.decode_backend, reference.dtype, reference.kv_cache_dtype) == ("sdpa", "bfloat16", "float16")
    narrow = decide(COMPILES, quantization="int8", kv_cache_dtype="float32", cpu_threads=3, num_pages=7).engine
    assert (narrow.quantization, narrow.kv_cache_dtype, narrow.num_threads) == ("int8", "float32", 3)
    assert decide(COMPILES, tp=2).engine.num_threads == 4


HEADED = replace(MODEL, mtp=MODEL.layers[:1])
MIXTURE = replace(MODEL.layers[0], mlp=MoE(8, 2, 64, True))


@pytest.mark.parametrize(
    ("machine", "model", "options"),
    [
        (MACHINE, HEADED, {}),
        (COMPILES, MODEL, {}),
        (COMPILES, HEADED, {"tp": 2}),
        (COMPILES, HEADED, {"attention_backend": "sdpa"}),
        (COMPILES, HEADED, {"dtype": "float16"}),
        (COMPILES, replace(HEADED, packed_bytes=2**30), {}),
        (COMPILES, replace(HEADED, pooling=Pooling("last", False, "")), {}),
        (COMPILES, replace(HEADED, mtp=(MIXTURE,)), {}),
    ],
)
def test_no_head_where_it_is_not_known_to_pay(
    machine: Capabilities, model: ModelConfig, options: dict[str, Any]
) -> None:
    config = decide(machine, model, **options)
    assert (config.scheduler.speculate, config.engine.model.mtp) == ("off", ())


def test_a_head_is_used_where_it_pays_and_refuses_no_start() -> None:
    config = decide(COMPILES, HEADED)
    assert (config.scheduler.speculate, config.engine.model.mtp) == ("mtp", HEADED.mtp)
    assert decide(COMPILES, HEADED, speculate="ngram").scheduler.speculate == "ngram"
    # The memory holds weights and a page without the head's, and not with them.
    plain = decide(COMPILES, MODEL).engine
    needed = MODEL.weight_bytes("bfloat16") + plain.kv_bytes(1, 0)
    little = replace(COMPILES, memory=int(needed / 0.9) + 1000)
    with pytest.raises(ConfigError, match="no room is left for the KV cache"):
        decide(little, HEADED, speculate="mtp")
    assert decide(little, HEADED).scheduler.speculate == decide(little, MODEL).scheduler.speculate == "off"


def test_a_gpu_asks_a_head_where_a_flag_says_so() -> None:
    model = shape(40, inner=17408, hidden_size=5120, num_qo_heads=40, tie_word_embeddings=False)
    headed = replace(model, mtp=model.layers[:1])
    assert decide(GPUS, headed).scheduler.speculate == "off"
    assert decide(GPUS, headed, speculate="mtp").scheduler.speculate == "mtp"


@pytest.mark.parametrize(
    ("model", "small", "measured"),
    [
        ("qwen3.5-9b", None, {1: 1.29, 8: 1.44, 32: 1.64}),
        ("qwen3.5-0.8b", None, {1: 1.80, 8: 1.89, 32: 1.97}),
        ("qwen3-14b", "qwen3-0.6b", {1: 1.43, 8: 1.48, 32: 1.80}),
    ],
)
def test_a_step_of_drafts_costs_about_what_was_measured(
    model: str, small: str | None, measured: dict[int, float]
) -> None:
    """Of three tokens for each of so many requests, in plain steps of these, on an H200 (docs/performance-log.md)."""
    first = read_shape(model)
    drafts = {"mtp": first.layers[3:4]} if small is None else {"second": ("", read_shape(small))}
    engine = replace(decide(GPUS, first).engine, draft_len=3, model=replace(first, **drafts))
    of_row, verify = step_costs(engine)
    for num, times in measured.items():
        assert (1 + of_row * 4 * num + verify) / (1 + of_row * num) == pytest.approx(times, rel=0.2)


def test_where_torch_computes_a_line_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "minisgl"):
        assert decide(COMPILES).engine.cpu_kernels and not caplog.records
        assert not decide(COMPILES, dtype="float16").engine.cpu_kernels
    assert caplog.messages == [
        "our kernels: not with --dtype float16; torch computes, and decoding is several times slower"
    ]


@pytest.mark.parametrize(
    ("machine", "options", "says"),
    [
        (MACHINE, {"quantization": "int8"}, "--quantization int8: there is no C"),
        (MACHINE, {"attention_backend": "cpu"}, "--attention-backend cpu: cpu cannot be had: there is no C"),
        (replace(COMPILES, packages=frozenset()), {"quantization": "int8"}, "apache-tvm-ffi is missing"),
        (COMPILES, {"quantization": "int8", "dtype": "float16"}, "not with --dtype float16"),
        (
            COMPILES,
            {"attention_backend": "cpu", "dtype": "float16"},
            "--attention-backend cpu: cpu cannot be had: not with --dtype float16",
        ),
        (COMPILES, {"quantization": "fp8"}, "^--quantization fp8: it is for GPUs; CPUs have int8$"),
        (COMPILES, {"kv_cache_dtype": "fp8"}, "^--kv-cache-dtype fp8: it is for GPUs; CPUs have int8$"),
    ],
)
def test_what_cpu_kernels_cannot_do(machine: Capabilities, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        decide(machine, **options)


def test_cpu_kernels_can_be_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINISGL_DISABLE_CPU_KERNELS", "1")
    engine = decide(COMPILES).engine
    assert (engine.cpu_kernels, engine.dtype, engine.decode_backend) == (False, "float32", "sdpa")


def test_kv_cache_fills_the_memory_that_the_weights_leave() -> None:
    config = decide(memory_ratio=0.5)
    taken = config.engine.num_pages * config.engine.page_size * MODEL.kv_bytes_per_token("float32")
    budget = 0.5 * MACHINE.memory - MODEL.weight_bytes("float32")
    assert 0.99 * budget < taken <= budget
    assert decide(memory_ratio=0.25).engine.num_pages < config.engine.num_pages


def test_kv_cache_is_no_larger_than_requests_can_use() -> None:
    config = decide(max_running_requests=2, max_seq_len=1000, page_size=16)
    assert config.engine.num_pages == 2 * 63


def test_too_little_memory_says_what_takes_it() -> None:
    with pytest.raises(ConfigError, match=r"--memory-ratio 0\.9: 2\.0 GiB .* weights take 2\.\d GiB"):
        decide(replace(MACHINE, memory=2 * 2**30))


def test_one_request_always_fits_the_cache() -> None:
    config = decide(num_pages=10, page_size=16)
    assert config.scheduler.max_seq_len == config.tokenizer.max_seq_len == config.engine.max_seq_len == 160
    with pytest.raises(ConfigError, match="--max-seq-len 500"):
        decide(num_pages=10, page_size=16, max_seq_len=500)
    with pytest.raises(ConfigError, match="--max-seq-len 50000: the model's context is 40960"):
        decide(max_seq_len=50_000)


def test_threads_are_shared_between_ranks() -> None:
    assert decide().engine.num_threads == 8
    assert decide(tp=2).engine.num_threads == 4
    small = shape(vocab_size=4096, hidden_size=256, num_layers=10, inner=640, head_dim=16)
    assert decide(model=small).engine.num_threads == 1, "threads wait for one another longer than they compute"
    with pytest.raises(ConfigError, match="--tensor-parallel-size 3"):
        decide(tp=3)


def test_a_cpu_has_one_backend_and_no_graphs() -> None:
    engine = decide(attention_backend="sdpa", cuda_graph_max_bs=0, disable_pynccl=True, moe_backend="torch").engine
    assert (engine.device, engine.prefill_backend, engine.decode_backend) == ("cpu", "sdpa", "sdpa")
    assert engine.cuda_graph_max_bs == 0
    for backend in ("fi", "sdpa,fa", "sdpa,sdpa,sdpa", ",", "cuda"):
        with pytest.raises(ConfigError, match="--attention-backend"):
            decide(attention_backend=backend)
    with pytest.raises(ConfigError, match="--cuda-graph-max-bs 8"):
        decide(cuda_graph_max_bs=8)
    with pytest.raises(ConfigError, match="--moe-backend triton"):
        decide(moe_backend="triton")


def gpu(index: int = 0, arch: tuple[int, int] = (9, 0), total: int = 80, free: int = 79) -> Gpu:
    return Gpu(index, "NVIDIA H100", arch, total * 2**30, free * 2**30)


GPUS = replace(
    MACHINE,
    gpus=(gpu(0), gpu(1)),
    gpu_problem="",
    driver="580.1",
    driver_cuda=(13, 0),
    torch_cuda="13.0",
    packages=frozenset({"triton", "tvm_ffi"}),
    nvcc="/usr/local/cuda/bin/nvcc",
)
BIG = shape(hidden_size=8192, inner=28672, num_layers=80, num_qo_heads=64)


def test_a_gpu_is_used_where_there_is_one() -> None:
    config = decide(GPUS)
    engine, scheduler = config.engine, config.scheduler
    assert (engine.device, engine.dtype, engine.memory_ratio) == ("cuda", "bfloat16", 0.9)
    assert (engine.prefill_backend, engine.decode_backend, engine.moe_backend) == ("triton", "cuda", "triton")
    assert (engine.page_size, scheduler.max_prefill_length, engine.cuda_graph_max_bs) == (16, 8192, 256)
    assert engine.num_pages == scheduler.num_pages == 0, "the engine measures"
    assert config.tokenizer.max_seq_len == engine.max_seq_len == 40960
    assert not engine.use_pynccl
    assert decide(GPUS, tp=2).engine.use_pynccl
    assert not decide(GPUS, tp=2, disable_pynccl=True).engine.use_pynccl
    assert decide(GPUS, device="cpu").engine.device == "cpu"
    assert decide(GPUS, device="cuda", num_pages=5000).engine.num_pages == 5000


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_gpu_computes_in_the_checkpoints_dtype(dtype: str) -> None:
    engine = decide(GPUS, replace(MODEL, dtype=dtype)).engine
    assert engine.dtype == dtype
    assert engine.decode_backend == ("triton" if dtype == "float32" else "cuda")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"gpus": (), "gpu_problem": "no NVIDIA driver on this machine"}, "no NVIDIA driver"),
        ({"torch_cuda": None}, "torch is a CPU build; install one"),
        ({"driver": "550.1", "driver_cuda": (12, 4)}, r"driver 550\.1 runs CUDA 12\.4 .* built for CUDA 13\.0; update"),
        ({"gpus": (gpu(arch=(7, 0)),)}, r"GPU 0 .* compute capability 7\.0, and 8\.0 .* CUDA_VISIBLE_DEVICES"),
    ],
)
def test_gpus_that_cannot_be_used(
    changes: dict[str, Any], problem: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for, it is an error; `auto` says in one line why it takes the CPU."""
    machine = replace(GPUS, **changes)
    with pytest.raises(ConfigError, match=f"^--device cuda: .*{problem}"):
        decide(machine, device="cuda")
    monkeypatch.setattr(logging.getLogger("minisgl"), "propagate", True)
    with caplog.at_level(logging.INFO, "minisgl"):
        assert decide(machine).engine.device == "cpu"
    record = caplog.records[0]
    assert record.getMessage().startswith("computing on the CPU: ")
    assert record.levelname == ("WARNING" if machine.gpus else "INFO")


def test_more_ranks_than_gpus() -> None:
    with pytest.raises(ConfigError, match=r"^--tensor-parallel-size 4: 2 GPUs are visible; .*--device cpu"):
        decide(GPUS, tp=4)
    with pytest.raises(ConfigError, match=r"^--tensor-parallel-size 2: GPU 0 .* and GPU 1 .* differ"):
        decide(replace(GPUS, gpus=(gpu(0), gpu(1, (8, 0)))), tp=2)


def attention(machine: Capabilities = GPUS, model: ModelConfig = MODEL, **options: Any) -> tuple[str, str]:
    engine = decide(machine, model, **options).engine
    return engine.prefill_backend, engine.decode_backend


def test_attention_backends_by_what_is_there() -> None:
    everything = replace(GPUS, packages=GPUS.packages | {"sgl_kernel", "flashinfer"})
    assert attention(everything) == ("fa", "cuda")
    assert attention(everything, shape(head_dim=80)) == ("triton", "triton")
    assert attention(everything, shape(head_dim=90)) == ("sdpa", "sdpa")
    assert attention(everything, shape(num_qo_heads=34, num_kv_heads=2)) == ("fa", "triton")
    ampere = replace(everything, gpus=(gpu(arch=(8, 6)),))
    assert attention(ampere) == ("triton", "triton")
    assert attention(replace(GPUS, nvcc=None)) == ("triton", "triton")
    assert attention(replace(GPUS, packages=frozenset({"sgl_kernel"}))) == ("fa", "fa")
    bare = decide(replace(GPUS, packages=frozenset())).engine
    assert (bare.prefill_backend, bare.decode_backend, bare.cuda_graph_max_bs) == ("sdpa", "sdpa", 0)
    assert bare.moe_backend == "torch"
    assert attention(attention_backend="cuda") == ("triton", "cuda")
    assert attention(attention_backend="triton") == ("triton", "triton")
    assert attention(everything, attention_backend="fi,fa") == ("fi", "fa")


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ("flash", "'flash' is unknown; choose from sdpa, triton, cuda, fi, fa"),
        (",", "'' is unknown"),
        ("fi", "fi needs a package: pip install flashinfer-python"),
        ("triton,fa", "fa needs a package: pip install sglang-kernel"),
        ("cuda,cuda", "cuda is for decode; use triton,cuda"),
        ("sdpa,triton", "sdpa and triton do not go together; use one alone"),
        ("triton,triton,triton", "expected one backend, or prefill,decode"),
    ],
)
def test_attention_backends_that_cannot_be_had(asked: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        decide(GPUS, attention_backend=asked)
    assert str(caught.value).startswith(f"--attention-backend {asked}: ")
    assert problem in str(caught.value)


def test_a_decode_kernel_for_another_gpu_dtype_or_toolkit() -> None:
    for machine, options, problem in (
        (replace(GPUS, gpus=(gpu(arch=(8, 9)),)), {}, r"needs compute capability 9\.0, this GPU has 8\.9"),
        (replace(GPUS, nvcc=None), {}, "needs nvcc: install CUDA 13"),
        (GPUS, {"dtype": "float32"}, "does not compute float32"),
    ):
        with pytest.raises(ConfigError, match=f"^--attention-backend cuda: cuda {problem}"):
            decide(machine, attention_backend="cuda", **options)


@pytest.mark.parametrize(
    ("backend", "changes", "problem"),
    [
        ("cuda", {"head_dim": 96}, "does not compute head_dim 96"),
        ("cuda", {"num_qo_heads": 17, "num_kv_heads": 1}, "computes up to 16 query heads per KV head, not 17"),
        ("fa", {"head_dim": 288}, "does not compute head_dim 288"),
        ("fi", {"head_dim": 80}, "does not compute head_dim 80"),
        ("triton", {"head_dim": 90}, "does not compute head_dim 90"),
    ],
)
def test_attention_backends_for_other_shapes(backend: str, changes: dict[str, int], problem: str) -> None:
    everything = replace(GPUS, packages=GPUS.packages | {"sgl_kernel", "flashinfer"})
    with pytest.raises(ConfigError, match=f"^--attention-backend {backend}: {backend} {problem}"):
        decide(everything, shape(**changes), attention_backend=backend)


@pytest.mark.parametrize("machine", [MACHINE, COMPILES, GPUS])
def test_heads_that_differ_by_layer_are_for_some(machine: Capabilities) -> None:
    layer = MODEL.layers[0]
    model = replace(MODEL, layers=(layer, replace(layer, attention=AttentionSpec(PagedKV(4, 256, 256)))))
    assert attention(machine, model) == (("cpu", "cpu") if machine is COMPILES else ("sdpa", "sdpa"))
    if machine is GPUS:
        with pytest.raises(ConfigError, match=r"triton does not compute caches that differ by layer$"):
            decide(machine, model, attention_backend="triton")


@pytest.mark.parametrize(
    ("changes", "decode", "what"),
    [({"softcap": 50.0}, "triton", "soft-capped scores"), ({"sinks": True}, "cuda", "attention sinks")],
)
def test_softcaps_and_sinks_are_ours(changes: dict[str, Any], decode: str, what: str) -> None:
    """Packages' backends are passed over, and refused by name where they are asked for."""
    layer, everything = MODEL.layers[0], replace(GPUS, packages=GPUS.packages | {"sgl_kernel", "flashinfer"})
    model = replace(MODEL, layers=(replace(layer, attention=replace(layer.attention, **changes)),) * 28)
    assert attention(everything, model) == ("triton", decode)
    assert attention(COMPILES, model) == ("cpu", "cpu")
    assert attention(MACHINE, model) == ("sdpa", "sdpa")
    for name in ("fi", "fa"):
        with pytest.raises(ConfigError, match=f"^--attention-backend {name}: {name} does not compute {what}"):
            decide(everything, model, attention_backend=name)


def test_caches_are_sums_over_layers() -> None:
    layer = MODEL.layers[0]
    kinds = (PagedKV(1, 576, 0), PagedKV(8, 128, 64), DeltaNet(2, 4, 8, 16, width=4))
    model = replace(MODEL, layers=tuple(replace(layer, attention=AttentionSpec(kind)) for kind in kinds))
    assert model.kv_bytes_per_token("bfloat16", tp_size=2) == 2 * (576 + 4 * (128 + 64))
    assert model.state_bytes() == 2 * model.state_bytes(tp_size=2) == 4 * (3 * (2 * 2 * 8 + 4 * 16) + 4 * 8 * 16)


@pytest.mark.parametrize("machine", [MACHINE, GPUS])
def test_states_leave_half_of_the_memory_to_pages(machine: Capabilities, caplog: pytest.LogCaptureFixture) -> None:
    layer = MODEL.layers[0]
    layers = (layer, replace(layer, attention=AttentionSpec(DeltaNet(16, 32, 128, 128, width=4)))) * 14
    model = replace(MODEL, layers=layers)
    free = machine.gpus[0].free_memory if machine.gpus else machine.memory
    most = decide(machine, model, max_running_requests=65536).engine
    assert f"--max-running-requests {most.max_running_requests}, and {most.num_snapshots} snapshots" in caplog.text
    assert 0.3 * free < most.state_bytes < 0.5 * free
    assert decide(machine, model, max_running_requests=65536).scheduler.max_running_requests < 65536
    few = decide(machine, model, max_running_requests=7)
    assert few.engine.max_running_requests == 7 and few.engine.num_snapshots == few.scheduler.num_snapshots == 16
    many = decide(machine, model, max_running_requests=7, num_state_snapshots=65536).engine
    assert many.max_running_requests == 7 and 0.3 * free < many.state_bytes < 0.5 * free, "as many as there is room for"
    assert few.scheduler.has_states and decide(machine, model, num_state_snapshots=5).scheduler.num_snapshots == 5
    assert decide(machine, model, cache_type="naive").engine.num_snapshots == 0 == decide(machine).engine.num_snapshots


@pytest.mark.parametrize("backend", ["fa", "fi"])
def test_attention_backends_of_16_bits(backend: str) -> None:
    everything = replace(GPUS, packages=GPUS.packages | {"sgl_kernel", "flashinfer"})
    with pytest.raises(ConfigError, match=f"^--attention-backend {backend}: {backend} does not compute float32"):
        decide(everything, attention_backend=backend, dtype="float32")


def test_captured_batches() -> None:
    assert decide(GPUS, max_running_requests=32).engine.cuda_graph_max_bs == 32
    assert decide(GPUS, max_running_requests=1024).engine.cuda_graph_max_bs == 256
    assert decide(GPUS, cuda_graph_max_bs=0).engine.cuda_graph_max_bs == 0
    with pytest.raises(ConfigError, match="--cuda-graph-max-bs 8: sdpa cannot be captured"):
        decide(GPUS, cuda_graph_max_bs=8, attention_backend="sdpa")
    mixture = replace(MODEL, layers=tuple(replace(layer, mlp=MoE(8, 2, 64)) for layer in MODEL.layers))
    assert decide(GPUS, mixture).engine.cuda_graph_max_bs == 256
    assert decide(GPUS, mixture, moe_backend="torch").engine.cuda_graph_max_bs == 0
    with pytest.raises(ConfigError, match="--cuda-graph-max-bs 8: --moe-backend torch cannot be captured"):
        decide(GPUS, mixture, cuda_graph_max_bs=8, moe_backend="torch")
    with pytest.raises(ConfigError, match=r"--moe-backend triton: .*pip install triton"):
        decide(replace(GPUS, packages=frozenset()), moe_backend="triton")


def test_eight_bits_on_gpus() -> None:
    """Weights and caches take half the memory, and only backends that read such a cache are chosen."""
    everything = replace(GPUS, packages=GPUS.packages | {"sgl_kernel", "flashinfer"})
    wide = decide(everything).engine
    narrow = decide(everything, quantization="fp8", kv_cache_dtype="fp8").engine
    assert (narrow.quantization, narrow.kv_cache_dtype, narrow.dtype) == ("fp8", "fp8", "bfloat16")
    assert (wide.prefill_backend, wide.decode_backend) == ("fa", "cuda")
    assert (narrow.prefill_backend, narrow.decode_backend) == ("triton", "cuda")
    assert 2 * narrow.kv_bytes(1, 0) == wide.kv_bytes(1, 0)
    assert 2 * MODEL.weight_bytes("fp8") == MODEL.weight_bytes("bfloat16")
    assert gpu_tokens(narrow, GPUS.gpus) > 2 * gpu_tokens(wide, GPUS.gpus)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"quantization": "int8"}, "^--quantization int8: it is for CPUs; GPUs have fp8$"),
        ({"quantization": "fp8", "dtype": "float32"}, "^--quantization fp8: not with float32$"),
        ({"kv_cache_dtype": "float32"}, "^--kv-cache-dtype float32: .*that of the weights, bfloat16, or fp8$"),
        ({"kv_cache_dtype": "int8"}, "^--kv-cache-dtype int8: .*that of the weights, bfloat16, or fp8$"),
        *(
            ({"kv_cache_dtype": "fp8", "attention_backend": name}, f"{name.split(',')[0]} does not read .*dtype fp8$")
            for name in ("sdpa", "fa", "fi", "fa,triton")
        ),
    ],
)
def test_eight_bits_that_gpus_do_not_have(options: dict[str, Any], says: str) -> None:
    everything = replace(GPUS, packages=GPUS.packages | {"sgl_kernel", "flashinfer"})
    with pytest.raises(ConfigError, match=says):
        decide(everything, **options)


def test_experts_and_eight_bits() -> None:
    mixture = replace(MODEL, layers=tuple(replace(layer, mlp=MoE(8, 2, 64)) for layer in MODEL.layers))
    stored = replace(mixture, packed_bytes=2**30)
    for engine in (decide(GPUS, mixture, quantization="fp8").engine, decide(GPUS, stored).engine):
        assert engine.moe_backend == "triton" and engine.cuda_graph_max_bs > 0
    assert decide(GPUS, stored, moe_backend="torch").engine.cuda_graph_max_bs == 0
    with pytest.raises(ConfigError, match=r"^--quantization fp8: the weights of /m are packed already$"):
        decide(GPUS, stored, quantization="fp8")


def test_what_does_not_fit_a_gpu() -> None:
    with pytest.raises(
        ConfigError, match=r"^--memory-ratio 0\.9: GPU 0 .* 79\.0 of 80\.0 GiB free, the weights take 1\d\d"
    ):
        decide(GPUS, BIG)
    with pytest.raises(ConfigError, match=r"^--memory-ratio 0\.9: GPU 1 .* 1\.0 of 80\.0 GiB free"):
        decide(replace(GPUS, gpus=(gpu(0), gpu(1, free=1))), tp=2)
    with pytest.raises(ConfigError, match=r"^--num-pages 100000: .* KV cache 170\.\d; lower it"):
        decide(GPUS, num_pages=100_000)


def test_pages_are_counted_in_the_type_of_the_cache() -> None:
    engine = decide(GPUS, num_pages=10_000).engine
    wide = replace(engine, kv_cache_dtype="float32")
    assert wide.kv_bytes(1, 0) == 2 * engine.kv_bytes(1, 0) == MODEL.kv_bytes_per_token("float32") * engine.page_size
    tokens = [gpu_tokens(replace(config, num_pages=0), GPUS.gpus) for config in (engine, wide)]
    assert tokens[0] // 2 - 16 <= tokens[1] <= tokens[0] // 2
    with pytest.raises(ConfigError, match=r"KV cache 34\.2; lower it"):
        gpu_tokens(wide, (gpu(free=20),))


def test_the_longest_request_on_a_gpu_with_little_memory() -> None:
    small = replace(GPUS, gpus=(gpu(total=8, free=7),))
    longest = decide(small).engine.max_seq_len
    assert 1000 < longest < 40960
    assert longest * MODEL.kv_bytes_per_token("bfloat16") < 7 * 2**30 - MODEL.weight_bytes("bfloat16")
    assert decide(small, memory_ratio=0.6).engine.max_seq_len < longest, "a share of the whole GPU"
    with pytest.raises(ConfigError, match=r"^--max-seq-len 40960: the KV cache holds"):
        decide(small, max_seq_len=40960)


def quantized(params: float, bits: int = 4, **changes: Any) -> ModelConfig:
    """params: of the layers, each of which takes 4.16 bits with a scale and a zero for 128; embeddings take 16."""
    scheme = Quantization("awq" if bits == 4 else "gptq", (Scheme(bits, 128, ("Linear",)),), (), 0)
    model = shape(tie_word_embeddings=False, **changes)
    size = int(params * (bits + 20 / 128) / 8 + 4 * model.vocab_size * model.hidden_size)
    return replace(model, quantization=scheme, packed_bytes=size)


def test_weights_of_4_bits_on_a_gpu_with_little_memory() -> None:
    """Of Qwen3-8B's and 14B's shapes."""
    small = replace(GPUS, gpus=(gpu(total=12, free=12),))
    options: dict[str, Any] = {"max_running_requests": 16, "max_prefill_length": 2048}
    model = quantized(6.95e9, num_layers=36, inner=12288, hidden_size=4096, num_qo_heads=32)
    assert decide(small, model, **options, max_seq_len=16384).engine.max_seq_len == 16384
    with pytest.raises(ConfigError, match=r"^--memory-ratio 0\.9: .* the weights take 15\.\d GiB"):
        decide(small, replace(model, quantization=None, packed_bytes=0), **options)
    with pytest.raises(ConfigError, match=r"the weights take 15\.\d GiB"):  # 8 bits are not kept so
        decide(small, quantized(6.95e9, 8, num_layers=36, inner=12288, hidden_size=4096, num_qo_heads=32), **options)
    larger = quantized(13.2e9, num_layers=40, inner=17408, hidden_size=5120, num_qo_heads=40)
    with pytest.raises(ConfigError, match=r"^--max-seq-len 16384: the KV cache holds \d+ tokens"):
        decide(small, larger, **options, max_seq_len=16384)
    assert decide(replace(GPUS, gpus=(gpu(total=16, free=16),)), larger, **options).engine.max_seq_len > 16384


@pytest.mark.parametrize(
    ("chosen", "seen"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("-1", []),
        ("2,0", [2, 0]),
        ("0,9,1", [0]),
        ("1,1", [1]),
        ("GPU-b", [1]),
        ("GPU-cc77, GPU-aa55", [2, 0]),
        ("MIG-x", []),
    ],
)
def test_visible_devices_as_cuda_reads_them(chosen: str | None, seen: list[int]) -> None:
    assert visible_devices(["GPU-aa55", "GPU-bb66", "GPU-cc77"], chosen) == seen


def test_the_driver_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {
        "Init": None,
        "Shutdown": None,
        "SystemGetDriverVersion": "580.1",
        "SystemGetCudaDriverVersion_v2": 12040,
        "DeviceGetCount": 2,
        "DeviceGetHandleByIndex": "handle",
        "DeviceGetUUID": "GPU-1",
        "DeviceGetName": "NVIDIA H100",
        "DeviceGetCudaComputeCapability": (9, 0),
        "DeviceGetMemoryInfo": SimpleNamespace(total=80, free=79),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, f"nvml{name}", lambda *_, answer=answer: answer)
    found = probe_nvidia("1")
    assert found == Nvidia((Gpu(0, "NVIDIA H100", (9, 0), 80, 79),), "580.1", (12, 4), "")
    assert "shows none of this machine's 2 GPUs" in probe_nvidia("").gpu_problem

    def fail(*_: object) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    assert "driver does not run (Driver Not Loaded)" in probe_nvidia(None).gpu_problem


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("__version__ = '2.13.0'\ncuda: Optional[str] = '13.0'\nhip = None\n", "13.0"),
        ("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\nhip: str = '6.1'\n", None),
    ],
)
def test_which_cuda_torch_is_built_for(
    text: str, version: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "version.py").write_text(text)
    spec = ModuleSpec("torch", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr("minisgl.config.probe.find_spec", {"torch": spec}.get)
    assert torch_cuda() == version


def test_the_rest_is_passed_on() -> None:
    config = decide(cache_type="naive", schedule_policy="lpm", disable_overlap=True, num_tokenizer=2, port=5)
    scheduler = config.scheduler
    assert (scheduler.cache_type, scheduler.schedule_policy, scheduler.overlap) == ("naive", "lpm", False)
    assert scheduler.eos_token_ids == (7, 8)
    assert (config.num_tokenizer, config.port) == (2, 5)
    assert decide(model_path="org/name").served_model_name == "org/name"
    assert decide(served_model_name="x").served_model_name == "x"


def test_recommended_sampling(tmp_path: Path) -> None:
    assert read_default_sampling(tmp_path) == {}
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": 1}))
    assert read_default_sampling(tmp_path) == {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
    for greedy in ({"do_sample": False}, {"top_p": 0}, {"do_sample": True, "top_p": 0.0, "top_k": 1}):
        file.write_text(json.dumps({"temperature": 0.6, **greedy}))
        assert read_default_sampling(tmp_path) == {"temperature": 0.0}
    for wrong in ("{", "[]"):
        file.write_text(wrong)
        with pytest.raises(ConfigError, match=r"generation_config\.json"):
            read_default_sampling(tmp_path)


def test_all_that_others_read_is_recommended_too(tmp_path: Path) -> None:
    """vLLM's and SGLang's lists. Qwen2.5 ships a repetition penalty."""
    file = tmp_path / "generation_config.json"
    given = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.05}
    file.write_text(json.dumps({"do_sample": True, "max_new_tokens": 2048, "max_length": 9, "typical_p": 0.5, **given}))
    assert read_default_sampling(tmp_path) == {**given, "max_tokens": 2048}
    file.write_text(json.dumps({"do_sample": False, "max_new_tokens": 2048, **given}))
    greedy = read_default_sampling(tmp_path)
    assert greedy == {"temperature": 0.0, "repetition_penalty": 1.05, "max_tokens": 2048}
    file.write_text(json.dumps(dict.fromkeys([*given, "do_sample", "max_new_tokens"])))
    assert read_default_sampling(tmp_path) == {}


@pytest.mark.parametrize(
    "key", ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens", "do_sample"]
)
def test_recommendations_that_no_request_could_have_are_one_line(tmp_path: Path, key: str) -> None:
    file = tmp_path / "generation_config.json"
    for value in ("hot", "0.5", -2, -0.5, 1000.5, True, [1], {}, float("nan"), 10**30):
        file.write_text(json.dumps({key: value}))
        if (key, value) == ("do_sample", True):
            continue
        with pytest.raises(ConfigError, match=rf"generation_config\.json: {key} must be .*, not ") as caught:
            read_default_sampling(tmp_path)
        assert "\n" not in str(caught.value)


def test_what_changes_a_model_without_touching_its_files(tmp_path: Path) -> None:
    """--chat-template and --config-override, also in the environment, a YAML file and `LLM`."""
    template, yaml = tmp_path / "t.jinja", tmp_path / "c.yaml"
    template.write_text("<tool_call>{% for m in messages %}{% generation %}x{% endgeneration %}{% break %}{% endfor %}")
    yaml.write_text(f"chat-template: {template}\nconfig_override: {{max_position_embeddings: 96}}\n")
    override = {"max_position_embeddings": 96}
    options = {"chat_template": str(template), "config_override": override}
    flags = ["--chat-template", str(template), "--config-override", json.dumps(override)]
    environ = {f"MINISGL_{name.upper()}": json.dumps(v) if isinstance(v, dict) else v for name, v in options.items()}
    for args in (
        args_from_options(options),
        parse_args(flags, {}),
        parse_args([], environ),
        parse_args(["--config", str(yaml)], {}),
    ):
        config = prepare(args)
        assert config.tokenizer.chat_template == template.read_text()
        assert config.scheduler.max_seq_len == 96
        assert config.tool_call_parser == "hermes"  # as the new template has it
    assert prepare(args_from_options({})).tokenizer.chat_template is None
    with pytest.raises(ConfigError, match=r"config\.json: hidden_size must be a whole number of at least 1, not 'x'"):
        prepare(args_from_options({"config_override": {"hidden_size": "x"}}))


def test_a_revision_is_no_part_of_the_served_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repo_id: str, *, revision: str | None, **patterns: object) -> str:
        asked.append((repo_id, revision))
        return str(DEMO_MODEL)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for options in ({"model": "org/name@abc"}, {"model": "org/name", "revision": "abc"}):
        assert prepare(args_from_options(options)).served_model_name == "org/name"
    assert set(asked) == {("org/name", "abc")}


def test_where_models_are_found(tmp_path: Path) -> None:
    assert locate_model(None, "huggingface") == DEMO_MODEL
    assert locate_model(str(tmp_path), "huggingface") == tmp_path.resolve()
    for wrong in (str(tmp_path / "missing"), "./missing", "missing", "a/b/c"):
        with pytest.raises(ConfigError, match="no directory, no GGUF file, and no repo id"):
            locate_model(wrong, "huggingface")


def test_a_repo_that_cannot_be_fetched_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("no route to the hub\ndetails")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ConfigError, match=r"^--model org/name: cannot be fetched: no route to the hub; without a n.*$"):
        locate_model("org/name", "huggingface")


@pytest.mark.parametrize(
    ("status", "source", "hints"),
    [
        (None, "huggingface", ["local directory", "HF_ENDPOINT", "--model-source modelscope"]),
        (503, "huggingface", ["local directory", "HF_ENDPOINT"]),
        (None, "modelscope", ["local directory", "--model-source huggingface"]),
        (401, "huggingface", ["check its name", "HF_TOKEN"]),
        (404, "modelscope", ["check its name", "MODELSCOPE_API_TOKEN"]),
    ],
)
def test_what_to_do_about_a_repo_that_cannot_be_fetched(
    monkeypatch: pytest.MonkeyPatch, status: int | None, source: str, hints: list[str]
) -> None:
    """By what the hubs' clients raise: an error of the connection, or one with the answer."""

    def fail(*args: object, **kwargs: object) -> None:
        error = OSError("refused")
        error.response = SimpleNamespace(status_code=status) if status else None  # type: ignore[attr-defined]
        raise error

    monkeypatch.setitem(sys.modules, "modelscope", SimpleNamespace(snapshot_download=fail))
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ConfigError) as caught:
        locate_model("org/name", source)
    message = str(caught.value)
    assert message.startswith("--model org/name: cannot be fetched: refused; ")
    assert all(hint in message for hint in hints)
    assert ("HF_ENDPOINT" in message) == ("HF_ENDPOINT" in hints)


def test_a_hub_without_a_network_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of the real client: this address answers nobody."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"^--model org/name: cannot be fetched: .*HF_ENDPOINT to a mirror") as caught:
        locate_model("org/name", "huggingface")
    assert "\n" not in str(caught.value)


def test_this_machine_can_be_probed() -> None:
    machine = probe()
    assert machine.num_cores >= 1
    assert machine.memory > 2**20
    assert bool(machine.gpus) != bool(machine.gpu_problem)


def test_kernels_that_an_image_brought_need_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MINISGL_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    machine = probe()
    assert (machine.cxx, machine.has_compiled) == (None, False)
    assert not decide(replace(machine, gpus=(), memory=MACHINE.memory)).engine.cpu_kernels
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "cpu-x86-64-v3-0.so").touch()
    assert decide(replace(probe(), gpus=(), memory=MACHINE.memory)).engine.cpu_kernels


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MINISGL_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)

    def getpwuid(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", getpwuid)
    with pytest.raises(ConfigError, match="MINISGL_CACHE_DIR"):
        probe()


def test_a_card_with_12_gib(tmp_path: Path) -> None:
    """Qwen3-8B's shape at 4 bits has room for 16k tokens; 14B's is refused, with what takes the memory."""
    card = replace(GPUS, gpus=(Gpu(0, "NVIDIA GeForce RTX 3060", (8, 6), 12 * 2**30, int(11.7 * 2**30)),))
    awq = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
    small = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32}

    def tokens(name: str, fields: dict[str, int]) -> int:
        path = write_shape("qwen3-14b", tmp_path / name)
        config = json.loads((path / "config.json").read_text()) | fields | {"quantization_config": awq}
        (path / "config.json").write_text(json.dumps(config))
        return gpu_tokens(decide(card, read_model_config(path), device="cuda").engine, card.gpus)

    assert 16384 <= tokens("8b", small) < 20000
    with pytest.raises(ConfigError, match=r"11\.7 of 12\.0 GiB free, the weights take 9\.4 GiB, .* no room is left"):
        tokens("14b", {})


def test_attention_counts_by_the_operations_of_layers_on_a_cpu_only() -> None:
    """Of Qwen3-0.6B's shape: 15.7 million weights a layer, and 4,096 products of a query with a key and a value."""
    assert decide().scheduler.attention_tokens == (3 * 3072 + 4 * 2048 - 2048) * 1024 // (16 * 256)
    assert decide(GPUS).scheduler.attention_tokens > 2**32
    layers, (spec, *_) = MODEL.layers, MODEL.layers
    near = replace(spec, attention=replace(spec.attention, window=1024))
    windowed = replace(MODEL, layers=(spec, *[near] * (len(layers) - 1)))
    options = {"max_seq_len": 32768, "num_pages": 4096}
    far = decide(model=windowed, **options).scheduler.attention_tokens
    assert 14 < far / decide(model=MODEL, **options).scheduler.attention_tokens < 16, "31 of 32 are behind the windows"
    state = replace(spec, attention=AttentionSpec(DeltaNet(16, 32, 128, 128, 4)))
    assert decide(model=replace(MODEL, layers=(state,) * 2)).scheduler.attention_tokens > 2**32

"""The cases of `tests/gpu/hunt.py`: numbers, and the checkpoints and ways of serving that they stand for."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.gguf_files import byte_tokens, write_gguf
from tests.integration.test_llm import with_tokenizer
from tests.integration.test_mtp import Head
from tests.integration.test_quantized_checkpoints import CASES, E2M1, mxfp4, quantized
from tests.models import hf_model, randomize, tiny_model

Tensor = torch.Tensor

# Heads for which the kernel of decode steps is taken: it is compiled for each shape. (head_dim, KV heads, group, fp8)
ATTENTION = [(64, 2, 2, 0), (64, 8, 8, 0), (64, 1, 2, 0), (64, 4, 8, 0), (128, 2, 3, 0), (256, 1, 5, 0), (64, 3, 7, 1)]
ATTENTION += [(64, 2, 2, 1)]
# Delta nets, likewise: heads of keys, their size, heads of values, their size. The last ones are left to torch.
DELTA = [(2, 16, 4, 24), (3, 32, 9, 20), (1, 64, 5, 64), (1, 128, 3, 96), (2, 24, 6, 18)]
HYBRIDS = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")
WINDOWS = ("gpt_oss", "gemma2", "gemma3_text", "ministral", "olmo3", "exaone4", "mistral")
EXPERTS = {
    "qwen3_moe": "num_experts",
    "qwen2_moe": "num_experts",
    "mixtral": "num_local_experts",
    "gpt_oss": "num_local_experts",
    "qwen3_5_moe_text": "num_experts",
    "qwen3_next": "num_experts",
    "olmoe": "num_experts",
    "granitemoe": "num_local_experts",
}
GGUF = ["qwen3", "llama", "qwen3_moe", "qwen2"]  # and other formats: every fourth case is of one of these families
OTHERS = ["llama", "qwen3", "qwen3_5_text", "gpt_oss", "qwen3_moe", "gemma3_text", "qwen2", "qwen3_next", "mixtral"]
OTHERS += ["gemma2", "phi3", "glm4", "lfm2", "qwen3_5_moe_text", "ministral", "olmo3", "granite", "granitemoe"]
OTHERS += ["smollm3", "exaone4", "mistral", "qwen2_moe", "olmoe", "gemma", "ernie4_5", "seed_oss"]
FAMILIES = [family for i in range(0, 26, 3) for family in (*OTHERS[i : i + 3], GGUF[i // 3 % 4])]
OF_RANKS = ["llama", "qwen3_5_text", "gpt_oss", "qwen3_moe", "gemma3_text", "qwen3"]
DIVIDED = {"llama", "gemma3_text", "gemma2", "gemma"}  # transformers wants their heads to divide the hidden size
OWN_SIZE = {"qwen3", "qwen3_moe", "gpt_oss", "mistral", "ministral", "glm4", "mixtral", "seed_oss", "ernie4_5"}
OWN_SIZE |= DIVIDED | {*HYBRIDS}  # whose heads' size is a field of its own


@dataclass(frozen=True, slots=True)
class Case:
    """form: "", one of `CASES`, mxfp4, online fp8, or a type of GGUF. stays_packed: however small weights are."""

    number: int
    family: str
    fields: dict[str, Any]
    dtype: str
    form: str
    options: dict[str, Any]
    drafts: str
    has_experts: bool
    stays_packed: bool
    num_prompts: int = 6
    num_tokens: int = 16
    asks_prompts: bool = False

    @property
    def is_exact(self) -> bool:
        return "fp8" not in self.form and "modelopt" not in self.form

    def tags(self) -> list[str]:
        """What the hunt counts."""
        some = [name for name in ("attention_backend", "kv_cache_dtype") if name in self.options]
        own = [self.family, self.dtype, *([self.form] if self.form else []), f"drafts {self.drafts}"]
        return own + [f"{name}={self.options[name]}" for name in some]


@dataclass(frozen=True, slots=True)
class Made:
    """A checkpoint; transformers' model of the values that its weights stand for; a copy in the type."""

    path: Path
    exact: nn.Module
    near: nn.Module

    def logits(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.exact(ids).logits, self.near(ids).logits


def draw(number: int, tp_size: int, device: str) -> Case:
    """Case `number`. On a CPU, which is for trying the hunt itself, weights are not packed."""
    rng = Random(number * 7919 + tp_size)
    families = OF_RANKS if tp_size > 1 else FAMILIES
    family = families[number % len(families)]
    dtype = rng.choice(["bfloat16"] * 3 + ["float32"] * 2 + ["float16" if tp_size == 1 else "bfloat16"])
    fields, options = _sizes(family, rng), _serving(rng)
    if "head_dim" in fields and dtype != "float32" and rng.random() < 0.5:
        dim, num_kv, group, is_fp8 = rng.choice(ATTENTION if tp_size == 1 else ATTENTION[:2])
        if dtype == "bfloat16":
            heads = {"head_dim": dim, "num_key_value_heads": num_kv, "num_attention_heads": num_kv * group}
            fields |= heads
            options |= {"kv_cache_dtype": "fp8"} if is_fp8 else {}
            options |= {"attention_backend": "triton"} if is_fp8 and "attention_backend" in options else {}
    if tp_size > 1:
        _divide(fields, tp_size)
    form, packed = _form(family, rng, dtype, fields)
    if family in DIVIDED and (rest := fields["hidden_size"] % fields["num_attention_heads"]):
        if form in CASES or "gguf" in form:
            fields |= {"num_attention_heads": 4, "num_key_value_heads": 2}
        else:
            fields["hidden_size"] += fields["num_attention_heads"] - rest
    drafts = rng.choice(["off", "off", "off", "ngram", "noise" if tp_size == 1 else "ngram", "mtp"])
    if drafts == "mtp" and (family not in ("qwen3", "qwen3_5_text") or form):
        drafts = "ngram"
    if drafts != "off":
        options["speculate"] = "ngram" if drafts == "noise" else drafts
        options |= {"speculate_tokens": rng.choice([1, 2, 3, 7])} if rng.random() < 0.5 else {}
    if device == "cuda" and "attention_backend" not in options and not _is_compiled(fields, options, dtype, tp_size):
        options["attention_backend"] = "triton"
        if fields.get("head_dim", 64) % 16 or "head_dim" not in fields:
            del options["attention_backend"]
    if form == "online fp8":
        options["quantization"] = "fp8"
    if device == "cpu":
        form, packed = "", False  # its products with packed weights round what they are given to 8 bits
        for name in ("kv_cache_dtype", "quantization", "attention_backend", "cuda_graph_max_bs"):
            options.pop(name, None)
    return Case(
        number, family, fields, dtype, form, options, drafts, family in EXPERTS, packed,
        asks_prompts=rng.random() < 0.3,
    )  # fmt: skip


def _sizes(family: str, rng: Random) -> dict[str, Any]:
    num_kv, group = rng.choice([1, 1, 2, 3, 4, 8]), rng.choice([1, 2, 3, 4, 5, 7, 8, 16])
    group = min(group, 24 // num_kv)
    fields: dict[str, Any] = {
        "num_hidden_layers": rng.choice([2, 3]),
        "vocab_size": rng.choice([401, 509, 512, 777, 1000, 1031]),
        "intermediate_size": rng.choice([96, 104, 176, 200, 344, 512]),
        "num_attention_heads": num_kv * group,
        "num_key_value_heads": num_kv,
        "tie_word_embeddings": rng.random() < 0.4,
    }
    dim = rng.choice([32, 48, 64, 64, 72, 80, 96, 112, 128, 128, 160, 192, 256])
    if family in OWN_SIZE:
        fields |= {"head_dim": dim, "hidden_size": rng.choice([64, 72, 96, 136, 160, 200, 256, 320, 512, 1160])}
    else:
        fields["hidden_size"] = dim * num_kv * group
        if fields["hidden_size"] > 1024:
            fields |= {"hidden_size": dim * 3, "num_attention_heads": 3, "num_key_value_heads": rng.choice([1, 3])}
    if family in ("granitemoe", "granite"):
        fields["attention_multiplier"] = 1 / 8
    if family in ("llama", "qwen3", "qwen3_moe") and rng.random() < 0.4:
        fields["attention_bias"] = True
    if family == "llama" and rng.random() < 0.4:
        fields["mlp_bias"] = True
    if family in WINDOWS:
        fields["sliding_window"] = rng.choice([1, 2, 7, 15, 16, 17, 33, 64])
        fields["num_hidden_layers"] = max(fields["num_hidden_layers"], 3)
    if family in ("gemma3_text", "gemma2"):
        fields |= {
            "num_hidden_layers": 7 if family == "gemma3_text" else 3,
            "query_pre_attn_scalar": rng.choice([48, 256]),
        }
    if family in EXPERTS:
        num = rng.choice([4, 5, 8, 8, 16, 17, 32, 64, 128])
        fields |= {EXPERTS[family]: num, "num_experts_per_tok": rng.randint(1, min(8, num))}
        fields["moe_intermediate_size"] = rng.choice([32, 40, 48, 64, 96, 128, 136])
        fields["intermediate_size"] = rng.choice([32, 40, 64, 96, 128, 136, 192])
    if family in HYBRIDS:
        num_k, dim_k, num_v, dim_v = rng.choice(DELTA)
        fields |= {"linear_num_key_heads": num_k, "linear_key_head_dim": dim_k}
        fields |= {"linear_num_value_heads": num_v, "linear_value_head_dim": dim_v, "num_hidden_layers": 4}
        fields["full_attention_interval"] = 2
    if family == "phi3":
        fields["partial_rotary_factor"] = rng.choice([0.5, 0.75, 1.0]) if dim % 16 == 0 else 1.0
    fields |= {
        "num_hidden_layers": {"lfm2": 3, "exaone4": 5, "olmo3": 5, "smollm3": 5}.get(
            family, fields["num_hidden_layers"]
        )
    }
    return fields


def _divide(fields: dict[str, Any], tp_size: int) -> None:
    """Sizes of which ranks can have a share."""
    group = fields["num_attention_heads"] // fields["num_key_value_heads"]
    num_kv = max(1, fields["num_key_value_heads"] // tp_size * tp_size)
    group += group % tp_size if num_kv % tp_size else 0
    fields |= {"num_key_value_heads": num_kv, "num_attention_heads": num_kv * group}
    names = "linear_num_key_heads", "linear_key_head_dim", "linear_num_value_heads", "linear_value_head_dim"
    if names[0] in fields:
        fields |= zip(names, DELTA[0], strict=True)


def _serving(rng: Random) -> dict[str, Any]:
    page = rng.choice([1, 5, 8, 16, 16, 64])
    tokens = rng.choice([4096, 4096, 4096, 1024, 400])  # of the last some are retracted
    options: dict[str, Any] = {"page_size": page, "num_pages": tokens // page + 1, "max_seq_len": 320}
    options["max_running_requests"] = rng.choice([1, 3, 16, 16, 64, 200])
    more: dict[str, list[Any]] = {
        "max_prefill_length": [7, 33, 128],
        "cuda_graph_max_bs": [0, 2],
        "cache_type": ["naive"],
        "disable_overlap": [True],
        "attention_backend": ["sdpa"],
        "schedule_policy": ["lpm"],
    }
    shares = {"max_prefill_length": 0.5, "cuda_graph_max_bs": 0.3, "attention_backend": 0.05}
    for name, values in more.items():
        if rng.random() < shares.get(name, 0.12):
            options[name] = rng.choice(values)
    if options.get("attention_backend") == "sdpa":
        options["cuda_graph_max_bs"] = 0
    return options


def _form(family: str, rng: Random, dtype: str, fields: dict[str, Any]) -> tuple[str, bool]:
    """Of weights, and whether they stay packed in any case; sizes are made to fit."""
    if rng.random() < 0.45 and family != "gpt_oss":
        return "", False
    if family == "gpt_oss" and rng.random() < 0.7:
        fields |= {"hidden_size": rng.choice([64, 96, 160, 256]), "intermediate_size": rng.choice([32, 64, 96, 160])}
        return "mxfp4", False
    if family not in GGUF or "head_dim" not in fields:
        return ("online fp8", False) if dtype != "float32" and rng.random() < 0.15 else ("", False)
    if fields["num_attention_heads"] * fields["head_dim"] % 64:
        fields["head_dim"] = 64
    has_bias = {"attention_bias", "mlp_bias"} & fields.keys()
    if rng.random() < 0.3 and not has_bias and not fields["num_attention_heads"] * fields["head_dim"] % 256:
        sizes = dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size"), 256)
        fields |= {**sizes, "hidden_size": rng.choice([256, 512]), "vocab_size": 256, "tie_word_embeddings": False}
        return "gguf " + rng.choice(["Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q6_K", "Q2_K", "IQ4_XS", "IQ2_XS"]), False
    case = rng.choice([*CASES])
    while "Ministral" in case or ("in order" in case and family == "qwen3_moe"):
        case = rng.choice([*CASES])
    unit = 128 if "8 bits" in case and "gptq" in case else 64
    for name in ("hidden_size", "intermediate_size", "moe_intermediate_size"):
        fields[name] = unit * rng.randint(1, 3)
    if fields["num_attention_heads"] * fields["head_dim"] % unit:
        fields["head_dim"] = 128
    is_32 = CASES[case][2].get("group_size") == 32 or case == "compressed" or "fp8" in case or case == "modelopt"
    return case, is_32 and dtype == "bfloat16" and rng.random() < 0.7


def _is_compiled(fields: dict[str, Any], options: dict[str, Any], dtype: str, tp_size: int) -> bool:
    """Whether the kernel of decode steps is there, or would not be taken."""
    num_kv, num_q = fields["num_key_value_heads"], fields["num_attention_heads"]
    dim = fields.get("head_dim") or fields["hidden_size"] // num_q
    if dtype == "float32" or dim not in (64, 128, 256):
        return True
    local = max(1, num_kv // tp_size)
    is_fp8 = int(options.get("kv_cache_dtype") == "fp8")
    return dtype == "bfloat16" and (dim, local, num_q // tp_size // local, is_fp8) in ATTENTION


def make(case: Case, folder: Path) -> Made:
    """The checkpoint, in a folder that is there."""
    if case.form in CASES:
        path, exact = quantized(folder / "model", case.form, case.family, **case.fields)
        with_tokenizer(path)
    elif case.form.startswith("gguf"):
        source = tiny_model(case.family, **case.fields)
        path, reference = write_gguf(source, folder / "gguf", case.form.split()[1], **byte_tokens())
        exact = hf_model(reference)
    elif case.form == "mxfp4":
        path, exact = _with_mxfp4(case, folder / "model")
    else:
        source = tiny_model(case.family, **case.fields)
        path = Path(shutil.copytree(source, folder / "model"))
        exact = copy.deepcopy(hf_model(source))
        if case.drafts == "mtp":
            _add_head(path, exact)
        with_tokenizer(path)
    dtype = getattr(torch, case.dtype)
    if case.form == "online fp8" or (not case.is_exact and case.dtype != "float32"):
        near = _rounded(exact, case)
    else:
        near = exact if dtype == torch.float32 else copy.deepcopy(exact).to(dtype)
    return Made(path, exact, near)


def _rounded(model: nn.Module, case: Case) -> nn.Module:
    """Products with e4m3 take tokens in e4m3, too; of online fp8 weights are rounded as well."""
    from tests.integration.test_float8_gpu import rounded

    near = copy.deepcopy(model)
    for name, layer in near.named_modules():
        if not isinstance(layer, nn.Linear) or name == "lm_head":
            continue
        if case.form == "online fp8":
            scales = layer.weight.data.abs().amax(1, keepdim=True) / 448
            layer.weight.data = (layer.weight.data / scales).to(torch.float8_e4m3fn).float() * scales
        layer.register_forward_pre_hook(lambda _, args: rounded(args[0].flatten(0, -2), 128).view_as(args[0]))
    return near


def _with_mxfp4(case: Case, target: Path) -> tuple[Path, nn.Module]:
    source = tiny_model("gpt_oss", **case.fields)
    shutil.copytree(source, target)
    tensors, exact = load_file(source / "model.safetensors"), copy.deepcopy(hf_model(source))
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        blocks, exponents = mxfp4(tensors.pop(name).transpose(1, 2))
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": exponents}
        codes = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2).long()
        values = E2M1[codes & 7] * (1 - 2 * (codes >> 3)) * torch.exp2(exponents[..., None].float() - 127)
        exact.get_parameter(name).data = values.flatten(-2).transpose(1, 2).contiguous()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")
    full = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    fields = json.loads((target / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": full}
    (target / "config.json").write_text(json.dumps(fields))
    return with_tokenizer(target), exact


def _add_head(path: Path, model: nn.Module) -> None:
    """Random weights of a layer that guesses the next but one token."""
    config: Any = model.config
    if config.model_type == "qwen3":
        head: nn.Module = Head(config)
    else:
        head = _HybridHead(config)
    randomize(_Named(head, config), 3)
    weights = load_file(path / "model.safetensors") | {f"mtp.{k}": v.contiguous() for k, v in head.state_dict().items()}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(fields | {"mtp_num_hidden_layers": 1}))


class _Named(nn.Module):
    def __init__(self, head: nn.Module, config: Any) -> None:
        super().__init__()
        self.head, self.config = head, config


class _HybridHead(nn.Module):
    """Of Qwen3.5: a layer that sees all."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer, Qwen3_5RMSNorm

        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.fc = nn.Linear(2 * hidden, hidden, bias=False)
        self.pre_fc_norm_embedding, self.pre_fc_norm_hidden = Qwen3_5RMSNorm(hidden, eps), Qwen3_5RMSNorm(hidden, eps)
        self.layers = nn.ModuleList([Qwen3_5DecoderLayer(config, config.layer_types.index("full_attention"))])
        self.norm = Qwen3_5RMSNorm(hidden, eps)

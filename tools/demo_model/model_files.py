"""What the scripts share: file names, special tokens, the model's shape, and the small JSON files of the model."""

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DEFAULT_MODEL_DIR = HERE.parents[1] / "python" / "minisgl" / "demo_model"

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = [END_OF_TEXT, IM_START, IM_END]
# Added but not special: they stay in the text when special tokens are skipped, so that a server can parse tool calls.
MARKUP_TOKENS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]

VOCAB_SIZE = 4096
CONTEXT = 2048

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 640,
    "max_position_embeddings": CONTEXT,
    "max_window_layers": 10,
    "model_type": "qwen3",
    "num_attention_heads": 4,
    "num_hidden_layers": 10,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": VOCAB_SIZE,
}
GENERATION_CONFIG: dict[str, Any] = {
    "do_sample": True,
    "temperature": 0.3,
    "top_p": 0.9,
    "top_k": 20,
    "eos_token_id": [2, 0],
    "pad_token_id": 0,
}


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def tokenizer_config() -> dict[str, Any]:
    """`tokenizer_config.json`, with the chat template inside."""
    tokens = SPECIAL_TOKENS + MARKUP_TOKENS
    return {
        "added_tokens_decoder": {
            str(i): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": token in SPECIAL_TOKENS,
            }
            for i, token in enumerate(tokens)
        },
        "add_prefix_space": False,
        "bos_token": None,
        "chat_template": (HERE / "chat_template.jinja").read_text(encoding="utf-8").rstrip("\n"),
        "clean_up_tokenization_spaces": False,
        "eos_token": IM_END,
        "model_max_length": CONTEXT,
        "pad_token": END_OF_TEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }


def write_small_files(model_dir: Path) -> None:
    """Everything but the tokenizer, the weights and the card."""
    model_dir.mkdir(parents=True, exist_ok=True)
    write_json(model_dir / "config.json", CONFIG)
    write_json(model_dir / "generation_config.json", GENERATION_CONFIG)
    write_json(model_dir / "tokenizer_config.json", tokenizer_config())

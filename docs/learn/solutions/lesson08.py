"""Sizes from config.json."""

from typing import Any


def num_weights(config: dict[str, Any]) -> int:
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    attention = hidden * (queries + 2 * keys) + queries * hidden + 2 * head  # the norms of query and key heads
    mlp = 3 * hidden * inner
    layer = attention + mlp + 2 * hidden  # two norms
    tables = 1 if config["tie_word_embeddings"] else 2
    return config["num_hidden_layers"] * layer + tables * config["vocab_size"] * hidden + hidden


def kv_bytes(config: dict[str, Any]) -> int:
    return config["num_hidden_layers"] * 2 * config["num_key_value_heads"] * config["head_dim"] * 2

"""lm-eval: a server's scores and log-likelihoods are those of the same checkpoint in its own `hf` model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.clients.conftest import run_client
from tests.clients.prompts import MODEL
from tests.e2e.conftest import Server

CHAT = "<|im_start|>user\n{{question}}<|im_end|>\n<|im_start|>assistant\n"
PAIRS = [(3, 4), (12, 30), (7, 8), (55, 1), (20, 9), (41, 17)]
SUMS = [
    {
        "question": f"What is {a} + {b}?",
        "choices": [f"{a} + {b} = {a + b + wrong}." for wrong in (1, 0, 10)],
        "label": 1 if a != 55 else 0,  # one whose label is wrong: a score below 1
    }
    for a, b in PAIRS
]
FACTS = [
    {"question": "Once upon a time", "answer": " a curious fox lived in a quiet forest."},
    {"question": "7, 8, 9,", "answer": " 10, 11, 12"},
    {"question": "", "answer": "A radix cache keeps the KV pages of finished requests in a prefix tree."},
]
TEXT = "A radix cache keeps the KV pages of finished requests in a prefix tree, so that a new request can reuse them. "
STORIES = [{"text": "Once upon a time a curious fox lived in a quiet forest."}, {"text": TEXT * 3}]
ANSWERS = [{"question": f"What is {a} + {b}?", "answer": f"{a} + {b} = {a + b}."} for a, b in PAIRS[:2]]
TEXTS = [{"question": "Once upon a time", "answer": "?"}, {"question": "7, 8, 9,", "answer": "?"}]  # to go on with
TASKS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "sums": (
        SUMS,
        {
            "output_type": "multiple_choice",
            "doc_to_text": CHAT,
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "label",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
    ),
    "facts": (
        FACTS,
        {
            "output_type": "loglikelihood",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
        },
    ),
    "stories": (
        STORIES,
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
    ),
    "answers": (
        ANSWERS + TEXTS,
        {
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 24, "do_sample": False, "temperature": 0.0},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
    ),
}


def write_tasks(folder: Path) -> None:
    for name, (rows, task) in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        common = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
        common.update(test_split="test", target_delimiter="")
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**common, **task}), encoding="utf-8")


def cached_tokens(demo: Server) -> float:
    lines = httpx.get(f"{demo.url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("minisgl:prefix_cache_hits_total"))


@pytest.fixture(scope="module")
def found(demo: Server, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of each model, by task."""
    folder = tmp_path_factory.mktemp("lm_eval")
    write_tasks(folder)
    before = cached_tokens(demo)
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    made = run_client("lm_eval_client", f"{demo.url}/v1", MODEL, str(folder), **offline, TOKENIZERS_PARALLELISM="false")
    return {**made, "cached tokens": cached_tokens(demo) - before}


def close(one: Any, other: Any) -> bool:
    """Log-likelihoods of one sample, and whether greedy decoding gives it."""
    pairs = [(a, b) if isinstance(a, list) else ([a, True], [b, True]) for a, b in zip(one, other, strict=True)]
    return all(float(a[0]) == pytest.approx(float(b[0]), abs=1e-3) and str(a[1]) == str(b[1]) for a, b in pairs)


@pytest.mark.parametrize("served", ["served", "cached"])
@pytest.mark.parametrize("task", ["sums", "facts", "stories"])
def test_log_likelihoods_are_hugging_face_s(found: Any, task: str, served: str) -> None:
    ours, theirs = found[served][task], found["hf"][task]
    assert len(ours["samples"]) == len(TASKS[task][0])
    assert all(close(*pair) for pair in zip(ours["samples"], theirs["samples"], strict=True)), (ours, theirs)
    assert ours["scores"] == pytest.approx(theirs["scores"], rel=1e-3)


def test_the_score_is_what_the_model_knows(found: Any) -> None:
    assert found["served"]["sums"]["scores"]["acc,none"] == pytest.approx(5 / 6)


def test_generations_are_hugging_face_s(found: Any) -> None:
    texts = found["served"]["answers"]
    assert texts == found["as text"]["answers"] == found["hf"]["answers"]
    assert all(text for (text,) in texts["samples"][len(ANSWERS) :])
    chat = found["served chat"]["answers"]
    assert chat == found["hf chat"]["answers"]
    assert chat["samples"][: len(ANSWERS)] == [[row["answer"]] for row in ANSWERS]
    assert chat["scores"]["exact_match,none"] == len(ANSWERS) / len(ANSWERS + TEXTS)


def test_the_cache_was_in_use(found: Any) -> None:
    assert found["cached tokens"] > 0

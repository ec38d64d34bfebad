"""Runs tasks with lm-eval, on its own `hf` model and through a server: `python lm_eval_client.py URL MODEL TASKS`
prints JSON. TASKS is a folder of YAML files.

A program of its own, because the hub's libraries ask the environment when they are imported whether they are offline.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import minisgl

CHECKPOINT = Path(minisgl.__file__).parent / "demo_model"
SCORED = ["sums", "facts", "stories"]
WRITTEN = ["answers"]


def evaluate(tasks: TaskManager, names: list[str], model: Any, /, **options: Any) -> dict[str, Any]:
    """By task: its scores, and for each sample in order what the model said of it."""
    chat = options.pop("apply_chat_template", False)
    made = lm_eval.simple_evaluate(
        model=model,
        model_args=options,
        tasks=names,
        task_manager=tasks,
        log_samples=True,
        bootstrap_iters=0,
        apply_chat_template=chat,
    )
    assert made is not None
    return {
        name: {
            "scores": {
                key: value
                for key, value in made["results"][name].items()
                if key.endswith(",none") and "stderr" not in key
            },
            "samples": [
                sample["filtered_resps"] for sample in sorted(made["samples"][name], key=lambda each: each["doc_id"])
            ],
        }
        for name in names
    }


def main() -> None:
    url, model, folder = sys.argv[1:]
    torch.set_num_threads(1)
    tasks = TaskManager(include_path=folder, include_defaults=False)
    served: dict[str, Any] = {"model": model, "tokenizer": str(CHECKPOINT), "max_retries": 1}
    texts = {**served, "base_url": f"{url}/completions"}
    chats = {"model": model, "base_url": f"{url}/chat/completions", "max_retries": 1}
    with contextlib.redirect_stdout(sys.stderr):
        hf = HFLM(pretrained=str(CHECKPOINT), dtype="float32", device="cpu")
        found = {
            "hf": evaluate(tasks, SCORED + WRITTEN, hf),
            "served": evaluate(tasks, SCORED + WRITTEN, "local-completions", **texts, batch_size=4),
            "cached": evaluate(tasks, SCORED, "local-completions", **texts, num_concurrent=4),
            "as text": evaluate(tasks, WRITTEN, "local-completions", **texts, tokenized_requests=False),
            "hf chat": evaluate(tasks, WRITTEN, hf, apply_chat_template=True),
            "served chat": evaluate(tasks, WRITTEN, "local-chat-completions", **chats, apply_chat_template=True),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()

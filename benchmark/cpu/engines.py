"""The engines that are compared, each in a process of its own that answers one command after the other."""

from __future__ import annotations

import multiprocessing as mp
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

Prompts = Sequence[Sequence[int]]


class Failed(Exception):
    """An engine that cannot be had here, or has failed: what to tell about it."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What an engine is to load, and for what load.

    max_new: tokens that a stream makes at most, max_len: those and its prompt; kv_tokens: of all streams at a time.
    """

    directory: Path
    precision: str
    gguf: Path | None
    num_threads: int
    max_new: int
    max_len: int
    kv_tokens: int


@dataclass(frozen=True, slots=True)
class Timing:
    """One run. prefill: seconds to the first token of all; decode: those after it, with all streams running, in which
    `num_decoded` tokens came. tokens: of each stream. logits: at the end of the first prompt, where they can be had."""

    prefill: float
    decode: float
    num_decoded: int
    tokens: list[list[int]]
    logits: np.ndarray | None = None
    setting: str = ""  # what the engine chose for this load


class Engine(Protocol):
    version: str

    def run(self, prompts: Prompts, num_tokens: int) -> Timing:
        """Greedy decoding of `num_tokens` for each prompt; all prompts are of one length."""
        ...


class Minisgl:
    """Through the Python API; the turns of its loop are timed. Prompts must not repeat: there is a prefix cache."""

    PAGE_SIZE = 16
    OPTIONS: ClassVar[dict[str, dict[str, Any]]] = {
        "float32": {"dtype": "float32"},
        "bfloat16": {"dtype": "bfloat16"},
        "int8": {"quantization": "int8"},
        "int4": {"quantization": "int4"},
    }

    def __init__(self, setup: Setup) -> None:
        import minisgl
        from minisgl import LLM
        from minisgl.llm import Pending

        turns: list[tuple[float, list[int]]] = []  # when each ended, and the tokens that each stream had

        class TimedLLM(LLM):
            def turn(self) -> list[Pending]:
                ended = super().turn()
                requests = [*ended, *self.pending.values()]
                turns.append((time.perf_counter(), [len(request.replies) for request in requests]))
                return ended

        self.version = minisgl.__version__
        self._turns = turns
        path = setup.directory if setup.precision in self.OPTIONS else setup.gguf
        options = self.OPTIONS.get(setup.precision, {}) | {"max_seq_len": setup.max_len, "page_size": self.PAGE_SIZE}
        num_pages = 2 * setup.kv_tokens // self.PAGE_SIZE  # the rest caches prompts, as it does in use
        self._llm = TimedLLM(str(path), num_pages=num_pages, **options)

    def run(self, prompts: Prompts, num_tokens: int) -> Timing:
        from minisgl import SamplingParams

        self._turns.clear()
        params = SamplingParams(num_tokens, 0.0, ignore_eos=True)
        start = time.perf_counter()
        outputs = self._llm.generate([list(prompt) for prompt in prompts], params, progress=False)
        together = [(when, counts) for when, counts in self._turns if len(counts) == len(prompts) and min(counts)]
        (first, before), (last, after) = together[0], together[-1]
        tokens = [output.token_ids for output in outputs]
        return Timing(first - start, last - first, sum(after) - sum(before), tokens)


class LlamaCpp:
    """Through its C API: one batch per step, with a KV cache of its own for each stream, in F16 as by default.

    Flash attention is on or off, whichever was the faster in the first run of a load, which is a warm-up.
    """

    def __init__(self, setup: Setup) -> None:
        import llama_cpp

        self._api: Any = llama_cpp
        self.version = llama_cpp.__version__
        self._log = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._log, None)
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE  # weights in memory, not mapped from the file
        self._model = llama_cpp.llama_model_load_from_file(str(setup.gguf).encode(), params)
        if not self._model:
            raise Failed(f"llama.cpp cannot load {setup.gguf}")
        self._num_threads, self._max_new = setup.num_threads, setup.max_new
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._contexts: dict[tuple[int, int, bool], tuple[Any, str]] = {}

    def run(self, prompts: Prompts, num_tokens: int) -> Timing:
        load = (len(prompts), len(prompts[0]), num_tokens > 1)
        if load not in self._contexts:
            self._contexts[load] = self._faster_context(prompts, num_tokens)
        context, setting = self._contexts[load]
        return replace(self._run(context, prompts, num_tokens), setting=setting)

    def _faster_context(self, prompts: Prompts, num_tokens: int) -> tuple[Any, str]:
        """For this load: with flash attention, or without it; and which of them it is.

        Decoding is tried after the first quarter of the prompts.
        """
        tried = []
        for setting, flash in (("flash attention", 1), ("no flash attention", 0)):
            context = self._make_context(len(prompts), len(prompts[0]), flash)
            if num_tokens == 1:
                self._run(context, prompts, 1)  # the context's first use
                timing = self._run(context, prompts, 1)
            else:
                timing = self._run(context, [prompt[: len(prompt) // 4 + 1] for prompt in prompts], min(num_tokens, 9))
            tried.append((timing.decode or timing.prefill, context, setting))
        (_, context, setting), (_, slower, _) = sorted(tried, key=lambda item: item[0])
        self._api.llama_free(slower)
        return context, setting

    def _make_context(self, num_streams: int, prompt_len: int, flash: int) -> Any:
        params = self._api.llama_context_default_params()
        params.n_ctx = num_streams * (prompt_len + self._max_new)
        params.n_batch, params.n_ubatch = max(512, num_streams * prompt_len), 512
        params.n_seq_max = params.n_outputs_max = num_streams
        params.n_threads = params.n_threads_batch = self._num_threads
        params.flash_attn_type = flash
        params.offload_kqv = params.op_offload = params.kv_unified = False
        context = self._api.llama_init_from_model(self._model, params)
        if not context:
            raise Failed(f"llama.cpp cannot make a context for {num_streams} streams")
        return context

    def _run(self, context: Any, prompts: Prompts, num_tokens: int) -> Timing:
        api = self._api
        api.llama_memory_clear(api.llama_get_memory(context), False)
        prompt_len = len(prompts[0])
        batch = api.llama_batch_init(len(prompts) * prompt_len, 0, 1)
        try:
            start = time.perf_counter()
            rows = self._step(context, batch, prompts, 0)
            first = time.perf_counter()
            logits = rows[0].copy()
            tokens = [[int(row.argmax())] for row in rows]
            for position in range(prompt_len, prompt_len + num_tokens - 1):
                rows = self._step(context, batch, [stream[-1:] for stream in tokens], position)
                for stream, row in zip(tokens, rows, strict=True):
                    stream.append(int(row.argmax()))
            last = time.perf_counter()
        finally:
            api.llama_batch_free(batch)
        decode = last - first if num_tokens > 1 else 0.0
        return Timing(first - start, decode, len(prompts) * (num_tokens - 1), tokens, logits)

    def _step(self, context: Any, batch: Any, new: Prompts, position: int) -> list[np.ndarray]:
        """Adds tokens to each stream from `position` on. Returns the logits at the last of each, views."""
        index, last = 0, []
        for stream, ids in enumerate(new):
            for offset, token in enumerate(ids):
                batch.token[index], batch.pos[index] = token, position + offset
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, stream
                batch.logits[index] = offset == len(ids) - 1
                index += 1
            last.append(index - 1)
        batch.n_tokens = index
        if code := self._api.llama_decode(context, batch):
            raise Failed(f"llama_decode: {code}")
        pointers = [self._api.llama_get_logits_ith(context, i) for i in last]
        return [np.ctypeslib.as_array(pointer, (self._vocab_size,)) for pointer in pointers]


class Transformers:
    """`generate()`; a stopping criterion notes when each token came. No more than MAX_TOKENS of them: it is slow."""

    MAX_TOKENS = 17

    def __init__(self, setup: Setup) -> None:
        import torch
        import transformers

        torch.set_num_threads(setup.num_threads)
        self.version = transformers.__version__
        dtype = getattr(torch, setup.precision)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(setup.directory, dtype=dtype).eval()

    def run(self, prompts: Prompts, num_tokens: int) -> Timing:
        import torch

        arrivals: list[float] = []
        scores: list[np.ndarray] = []

        def note(_: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            if not scores:
                scores.append(logits[0].float().numpy().copy())
            return logits

        def stop(ids: torch.Tensor, _: Any, **__: Any) -> torch.Tensor:
            arrivals.append(time.perf_counter())
            return torch.full((len(ids),), len(arrivals) >= num_tokens)

        num_tokens = min(num_tokens, self.MAX_TOKENS)
        ids = torch.tensor(prompts)
        start = time.perf_counter()
        with torch.inference_mode():
            output = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=num_tokens,
                eos_token_id=None,
                pad_token_id=0,
                logits_processor=[note],
                stopping_criteria=[stop],
            )
        tokens = output[:, ids.shape[1] :].tolist()
        decode = arrivals[-1] - arrivals[0]
        return Timing(arrivals[0] - start, decode, len(prompts) * (num_tokens - 1), tokens, scores[0])


ENGINES: dict[str, type[Any]] = {"minisgl": Minisgl, "llama.cpp": LlamaCpp, "transformers": Transformers}


def serve(connection: Connection, engine: str, setup: Setup) -> None:
    """The child: loads, answers (True, version), then (True, Timing) to each (prompts, num_tokens), until None.

    What goes wrong is answered as (False, reason).
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: setup.num_threads])
    try:
        model: Engine = ENGINES[engine](setup)
        connection.send((True, model.version))
        while (command := connection.recv()) is not None:
            connection.send((True, model.run(*command)))
    except EOFError:
        pass  # the other side has gone
    except Exception as error:  # whatever it is, it becomes a row of the table
        connection.send((False, f"{type(error).__name__}: {error}".splitlines()[0][:120]))
    finally:
        connection.close()


class Worker:
    """An engine's process, seen from the other side. Raises: Failed, after which the process is gone."""

    def __init__(self, engine: str, setup: Setup, limit: float) -> None:
        context = mp.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, engine, setup), daemon=True)
        self._limit = limit
        self._process.start()
        theirs.close()
        self.version: str = self._answer()

    def run(self, prompts: Prompts, num_tokens: int) -> Timing:
        self._connection.send((prompts, num_tokens))
        return self._answer()

    def close(self) -> None:
        self._connection.close()
        self._process.join(10)
        self._process.kill()
        self._process.join()

    def _answer(self) -> Any:
        try:
            if not self._connection.poll(self._limit):
                raise Failed(f"no answer in {self._limit:g} s")
            is_fine, answer = self._connection.recv()
        except (Failed, EOFError, ConnectionError) as error:
            self._process.kill()
            raise Failed(str(error) or "its process has died") from None
        if not is_fine:
            self.close()
            raise Failed(answer)
        return answer

"""The Python API: `LLM` is tokenizer, scheduler and engine in one process, by composition."""

import atexit
import gc
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from inspect import Signature, signature
from typing import Any, TypeGuard

from rich.progress import Progress

from minisgl.config.args import ServerArgs, args_from_options
from minisgl.config.resolve import prepare
from minisgl.core import FinishReason, SamplingParams
from minisgl.errors import RequestError
from minisgl.message import messages as wire
from minisgl.message.sockets import ipc_endpoints
from minisgl.processes.control import Launcher
from minisgl.processes.supervisor import Supervisor
from minisgl.processes.workers import load_rank, rank_specs
from minisgl.scheduler.transport import LocalTransport
from minisgl.tokenizer.detokenize import Detokenizer, LateLogprobs
from minisgl.tokenizer.pooling import pair_prompt, score_of, served, text_prompt, vector_of
from minisgl.tokenizer.tokenize import Tokenizer
from minisgl.utils.process import held_interrupts, private_folder

Prompt = str | Sequence[int]
Prompts = Prompt | Sequence[Prompt]
Conversation = Sequence[dict[str, Any]]
Wrapped = wire.ChatPrompt | wire.TextPrompt | wire.IdsPrompt
Params = SamplingParams | Sequence[SamplingParams] | None
ProgressCallback = Callable[[int, int], None]
Reporting = bool | ProgressCallback | None


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Seconds since the request was submitted: to its first token, and to its last."""

    time_to_first_token: float
    total_time: float


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """One finished request. `token_ids` includes the end-of-sequence token that ended it; `text` does not.

    error: why the request failed, if `finish_reason` is `error`; the others of a batch are not affected.
    logprobs: of `token_ids`; prompt_logprobs: of `prompt_token_ids`. Empty unless the parameters ask for them."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_token_ids: list[int]
    cached_tokens: int
    metrics: RequestMetrics
    error: str | None = None
    logprobs: Sequence[wire.TokenLogprob] = ()
    prompt_logprobs: list[wire.TokenLogprob] = field(default_factory=list)
    pooled: bytes = b""  # what `embed` and `score` are made of


@dataclass(frozen=True, slots=True)
class Increment:
    """New output of a stream. The last one has a `finish_reason`."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    error: str | None = None
    logprobs: list[wire.TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[wire.TokenLogprob] = field(default_factory=list)  # with the first increment


@dataclass(slots=True)
class Pending:
    """A request on its way, and when things happened to it."""

    uid: int
    prompt_ids: list[int]
    submitted: float
    told: Callable[[bytes, Any], Iterable[wire.TokenLogprob]]  # of packed ids and what replies have for these
    first_token: float = 0.0
    ended: float = 0.0
    replies: list[wire.UserReply] = field(default_factory=list)

    def output(self) -> RequestOutput:
        """All of it, when it has ended."""
        last = self.replies[-1]
        assert last.finish_reason is not None
        metrics = RequestMetrics(self.first_token - self.submitted, self.ended - self.submitted)
        ids = b"".join([reply.token_ids for reply in self.replies])
        packed = b"".join([reply.logprobs or b"" for reply in self.replies])  # type: ignore[misc]  # (late ones)
        known = wire.unpack_ids(ids), last.finish_reason, self.prompt_ids, last.num_cached_tokens, metrics, last.error
        logprobs = LateLogprobs(partial(self.told, ids, packed))
        of_prompt = [token for reply in self.replies for token in reply.prompt_logprobs]
        return RequestOutput("".join([reply.text for reply in self.replies]), *known, logprobs, of_prompt, last.pooled)


class LLM(AbstractContextManager["LLM"]):
    """A model in this process; with `tensor_parallel_size` above 1, rank 0 of it, the others in child processes.

    model: a local directory or hub repo id; None is the built-in demo model. The options are the command line's, under
    the flags' names (`dtype="float32"`, `page_size=16`, `tp=2` …). Use it as a context manager, or call `close`.
    Not for several threads at a time. Child processes are spawned: with more than one rank, a script must create the
    LLM under `if __name__ == "__main__":`.
    A program with a loop of its own calls `submit`, then `turn` again and again, which returns the requests that ended.

    Raises: ConfigError when an option, or the model, cannot be used."""

    def __init__(self, model: str | None = None, **engine_options: Any) -> None:
        named = {} if model is None else {"model_path": str(model)}
        self.config = prepare(args_from_options({**engine_options, **named}))
        engine, scheduler = self.config.engine, self.config.scheduler
        self.pending, self._next_uid = dict[int, Pending](), 0
        self._release_interrupts: Callable[[], None] = lambda: None
        self._closers = ExitStack()  # all of them run, whatever one raises
        self.endpoints = ipc_endpoints(self._closers.enter_context(private_folder()), tp_size=engine.tp_size)
        try:
            self.tokenizer = Tokenizer(self.config.tokenizer)
            self._detokenizer = Detokenizer(self.tokenizer.codec, late=True)
            self._supervisor = Supervisor(Launcher(), rank_specs(engine, scheduler, self.endpoints, first=1))
            self._closers.callback(self._supervisor.stop)
            self._supervisor.start()  # they meet rank 0 when its engine starts
            meeting = f"{self.endpoints.rendezvous}-0"
            self.rank = self._supervisor.wait_for(lambda: load_rank(engine, scheduler, meeting, 0))
            self._closers.callback(self.rank.close)
            self.transport = LocalTransport(self.endpoints.ranks, self._while_waiting, self.rank.grammars)
            self._closers.callback(self.transport.close)
            self.scheduler = self.rank.scheduler(self.transport)
        except BaseException:
            self.close()
            raise
        atexit.register(self.close)  # last, so that it is first: the ranks above 0 must outlive rank 0's last step

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """End the engine and its child processes. Idempotent; the end of the program does it too."""
        atexit.unregister(self.close)
        self._closers.close()

    def generate(
        self, prompts: Prompts, sampling_params: Params = None, progress: Reporting = None
    ) -> list[RequestOutput]:
        """Complete each prompt, a text or a list of token ids; returns the outputs in prompt order.

        sampling_params: one for all or one per prompt; None takes the model's recommended ones. progress: True shows
        a bar, None does so for 16 prompts and more, a callable is told (finished, total).

        Raises: RequestError before anything runs when a prompt cannot be served."""
        return self._run([_wrapped(prompt) for prompt in _several(prompts)], sampling_params, progress)

    def chat(
        self,
        conversations: Conversation | Sequence[Conversation],
        sampling_params: Params = None,
        progress: Reporting = None,
        tools: list[dict[str, Any]] | None = None,
    ) -> list[RequestOutput]:
        """The model's answer to each conversation (a list of messages with `role` and `content`)."""
        many: Sequence[Any] = [conversations] if _is_conversation(conversations) else conversations
        return self._run([wire.ChatPrompt(list(messages), tools) for messages in many], sampling_params, progress)

    def embed(self, prompts: Prompts, dimensions: int = 0, prompt_name: str = "") -> list[list[float]]:
        """The vector of each text, or list of token ids: the first `dimensions` numbers (0: all). prompt_name: of what
        comes before texts, of those that the model's files name. Raises: RequestError, also where one fails."""
        pooling, params = served(self.config.engine.model, "embed", dimensions)
        texts = [text_prompt(pooling, t, prompt_name) if isinstance(t, str) else _wrapped(t) for t in _several(prompts)]
        return [vector_of(pooling, output.pooled, dimensions).tolist() for output in self._run(texts, params, None)]

    def score(self, query: str, documents: str | Sequence[str], instruction: str = "") -> list[float]:
        """How well each document answers the query, from 0 to 1. Raises: RequestError, also where one fails."""
        pooling, params = served(self.config.engine.model, "score")
        pairs = [pair_prompt(pooling, query, document, instruction) for document in _several(documents)]
        return [score_of(output.pooled) for output in self._run(pairs, params, None)]

    def stream(
        self, prompt: Prompt | Conversation, sampling_params: SamplingParams | None = None
    ) -> Iterator[Increment]:
        """Complete one prompt (or answer one conversation), yielding text as it comes.

        Several streams may be read in turn. Leaving the loop early ends the request."""
        wrapped = wire.ChatPrompt(list(prompt)) if _is_conversation(prompt) else _wrapped(prompt)
        (pending,) = self.submit([wrapped], sampling_params)
        for reply in self.replies(pending):
            logprobs = [*pending.told(reply.token_ids, reply.logprobs)], [*reply.prompt_logprobs]
            yield Increment(reply.text, wire.unpack_ids(reply.token_ids), reply.finish_reason, reply.error, *logprobs)

    def replies(self, request: Pending) -> Iterator[wire.UserReply]:
        """What comes of a request, up to its last reply. Leaving the loop early ends the request."""
        try:
            for taken in itertools.count():
                while taken == len(request.replies):
                    self.turn()
                yield (reply := request.replies[taken])
                if reply.finish_reason is not None:
                    return
        finally:
            self.abort(request.uid)

    def _run(self, prompts: Sequence[Wrapped], params: Params, progress: Reporting) -> list[RequestOutput]:
        requests, outputs = self.submit(prompts, params), dict[int, RequestOutput]()
        gc.freeze()  # a full collection looks at all that libraries have made: a tenth of a second between two tokens
        try:
            with _progress(progress, len(requests)) as report:
                while len(outputs) < len(requests):
                    for ended in self.turn():
                        if ended.uid >= requests[0].uid:  # no stream's, which was there before
                            outputs[ended.uid] = ended.output()  # now, while a step runs: it takes a while for many
                            report(len(outputs), len(requests))
        finally:
            gc.unfreeze()
            for request in requests:
                self.abort(request.uid)
        return [outputs[request.uid] for request in requests]

    def submit(self, prompts: Sequence[Wrapped], params: Params) -> list[Pending]:
        """Send requests on their way. Raises: RequestError, and none is sent."""
        per_prompt = [params] * len(prompts) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(per_prompt) != len(prompts):
            raise RequestError(f"{len(per_prompt)} sampling parameters for {len(prompts)} prompts")
        default = SamplingParams(**self.config.default_sampling)  # type: ignore[arg-type]
        first, messages = self._next_uid, []
        given = zip(itertools.count(first), prompts, per_prompt)
        wanted = [wire.TokenizeMsg(uid, prompt, own or default) for uid, prompt, own in given]
        for message in self.tokenizer.tokenize(wanted):
            if isinstance(message, wire.ErrorReply):
                where = f"prompt {message.uid - first}: " if len(prompts) > 1 else ""
                raise RequestError(f"{where}{message.message}", param=message.param, code=message.code)
            messages.append(message)
        self._next_uid += len(messages)
        now, read = time.perf_counter(), self._detokenizer.logprobs
        told = [partial(read, skips=message.params.skip_special_tokens) for message in messages]
        requests = [Pending(one.uid, wire.unpack_ids(one.prompt), now, told[i]) for i, one in enumerate(messages)]
        self.pending.update((request.uid, request) for request in requests)
        self.transport.put(messages)
        return requests

    def turn(self) -> list[Pending]:
        """One turn of the scheduler's loop. Returns the requests that ended in it, which are not pending any more.

        A step that is half planned, or half launched, could not be gone on from: Ctrl-C waits for a better moment."""
        ended = []
        with held_interrupts() as self._release_interrupts:
            self.scheduler.turn()
            now = time.perf_counter()
            for message in self.transport.take_outputs():
                if isinstance(message, wire.ErrorReply):
                    uid, reason = message.uid, FinishReason.ERROR
                    message = wire.DetokenizeMsg(uid, b"", finish_reason=reason, error=message.message)
                reply, abort = self._detokenizer.detokenize(message)
                if abort is not None:
                    self.transport.put([abort])
                if reply is None or (request := self.pending.get(reply.uid)) is None:
                    continue
                request.ended, request.first_token = now, request.first_token or now
                request.replies.append(reply)
                if reply.finish_reason is not None:
                    ended.append(self.pending.pop(reply.uid))
        return ended

    def abort(self, uid: int) -> None:
        """End a request, if it is pending."""
        if self.pending.pop(uid, None) is not None:
            self.transport.put([wire.AbortMsg(uid)])

    def _while_waiting(self) -> None:
        """Now and then while a step runs. Raises: WorkerDied when it waits for a rank that is gone."""
        self._release_interrupts()
        self._supervisor.check(0.0)


_OPTIONS = [option.replace(kind=option.KEYWORD_ONLY) for option in signature(ServerArgs).parameters.values()]
LLM.__signature__ = Signature([*signature(LLM).parameters.values()][:1] + _OPTIONS)  # type: ignore[attr-defined]


def _is_conversation(value: Any) -> TypeGuard[Conversation]:
    return not isinstance(value, str) and len(value) > 0 and isinstance(value[0], dict)


def _several(prompts: Prompts) -> Sequence[Any]:
    is_one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
    return [prompts] if is_one else prompts


def _wrapped(prompt: Any) -> wire.TextPrompt | wire.IdsPrompt:
    if isinstance(prompt, str):
        return wire.TextPrompt(prompt)
    try:
        return wire.IdsPrompt(wire.pack_ids(prompt))
    except (TypeError, ValueError, OverflowError):
        raise RequestError(f"a prompt is a text or a list of token ids, not {type(prompt).__name__}") from None


@contextmanager
def _progress(progress: Reporting, total: int) -> Iterator[ProgressCallback]:
    """A progress bar, a callback, or nothing, behind one call `report(finished, total)`."""
    is_shown = progress is True or (progress is None and total >= 16)
    with Progress(transient=progress is None, disable=not is_shown) as bar:
        task = bar.add_task("generate", total=total)
        yield progress if callable(progress) else lambda finished, _: bar.update(task, completed=finished)

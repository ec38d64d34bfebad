"""The records that flow through the system: a request's parameters, its state, and what one step is to compute."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from minisgl.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import numpy as np
    import numpy.typing as npt

MAX_SEED = 2**63 - 1
MAX_COUNT = 2**63 - 1  # of what a client may ask for; larger numbers fit neither messages nor tensors
NOT_READY, ID_PENDING = -2, -3  # in place of a sampled id: its mask was not there in time; it is not sampled yet
MASK_PENDING, MASK_READY, MASK_NOT_READY = 0, 1, 2  # `Masks.__call__`
MAX_LOGPROBS = 20  # alternatives at each position: OpenAI's limit
MAX_PRIORITY, MAX_BIAS = 2**31 - 1, 100


def most_samples(num_rows: int) -> int:
    """Tokens that one step may sample, drafts included, where so many requests may run."""
    return max(num_rows, 32)


class FinishReason(str, Enum):
    """Why a request ended. Every accepted request ends with exactly one of these."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an output has to match.

    kind: of `text`: "json" (a JSON schema), "regex", "choice" (a JSON list of strings), "grammar" (Lark or EBNF), or
    "form" (JSON that puts such together, see `grammar/source.py`).
    whitespace: of "json", beside what is in strings: "compact" (at most a space after commas and colons, which models
    write and need), or "any". reasoning: whether text between two tags comes before all that: "" never, "optional", or
    "always" (the first tag may be missing then), with the tags behind it: "optional <think> </think>"; what the end of
    the prompt says comes first (`config.chat.reasoning_after`). param: the field of the request that it came from."""

    kind: str
    text: str
    whitespace: str = "compact"
    reasoning: str = ""
    param: str = field(default="response_format", compare=False)


class Range(NamedTuple):
    """What a parameter may be. text: in words, where they are not "from … to …"."""

    lowest: float
    highest: float
    text: str = ""


RANGES = {
    "temperature": Range(0, 100),
    "top_k": Range(-1, MAX_COUNT, "at least 1 and below 2**63, or 0 for off"),
    "top_p": Range(0, 1, "above 0 and at most 1"),
    "min_p": Range(0, 1),
    "seed": Range(0, MAX_SEED, "from 0 to 2**63 - 1"),
    "speculate": Range(0, 64),
    "presence_penalty": Range(-2, 2),
    "frequency_penalty": Range(-2, 2),
    "repetition_penalty": Range(0.01, 100),  # logits divided by less leave what numbers can hold
    "logprobs": Range(0, MAX_LOGPROBS),
    "prompt_logprobs": Range(0, MAX_LOGPROBS),
    "priority": Range(-MAX_PRIORITY, MAX_PRIORITY),
}
_MAY_BE_NONE = ("seed", "speculate", "logprobs", "prompt_logprobs")
# How a token is drawn from a distribution, and of what kind the values are.
DRAWING: Mapping[str, type[float]] = {"temperature": float, "top_p": float, "top_k": int, "min_p": float}


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when it ends.

    max_tokens: most output tokens; None means as many as the context has room for.
    temperature: 0 is greedy (arg max). top_k: 0 is off. top_p: 1 is off. min_p: 0 is off.
    seed: the same seed gives the same tokens whatever else is in the batch; None draws one.
    stop: strings that end the output; the stop string itself is cut, unless include_stop_str_in_output.
    ignore_eos: generate past end-of-sequence tokens, up to max_tokens; a grammar's output ends there all the same.
    stop_token_ids: end the output as end-of-sequence tokens do, also with ignore_eos.
    min_tokens: so many output tokens come before any end; what would end it sooner is not sampled or not looked for.
    skip_special_tokens: special tokens do not become text.
    presence_penalty, frequency_penalty: taken from the logits of tokens that are in the output, once or for each time.
    repetition_penalty: divides the positive logits of tokens in prompt and output, and multiplies the negative ones
    (arXiv 1909.05858, section 4.1). 1 is off.
    logit_bias: (token id, what is added to its logit).
    logprobs: of each output token, and of so many most probable ones in its place; None: not wanted.
    speculate: the longest draft of its next tokens, where the server speculates; 0: none; None: as the server has it.
    prediction: a text that the output may be, in part at least, or (of a tokenizer) its ids: a draft.
    prompt_logprobs: the same for each prompt token but the first, which nothing precedes.
    echo: the text begins with the prompt's. Only then may max_tokens be 0.
    priority: of waiting requests the one with the lowest number runs first, under that policy.
    cache_salt: cached prefixes are shared with requests of the same salt only.
    client: whose request it is; clients take turns.
    grammar: what the output has to match; None is anything. It ends where the grammar does, so min_tokens must be 0.
    pooling: no output, but a vector: "last" or "mean" of the prompt's hidden states, or its "score"; "": an output.

    Log-probabilities are the model's own: of the logits as they were before temperature, penalties and biases.

    Raises: RequestError naming the field whose value is out of range."""

    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    echo: bool = False
    priority: int = 0
    cache_salt: str = ""
    client: str = ""
    grammar: Grammar | None = None
    pooling: str = ""
    speculate: int | None = None
    prediction: str | tuple[int, ...] = ()

    def __post_init__(self) -> None:
        limit, least = self.max_tokens, 0 if self.echo else 1
        _check(limit is None or least <= limit <= MAX_COUNT, "max_tokens", f"at least {least} and below 2**63", limit)
        for name, (lowest, highest, text) in RANGES.items():
            value = getattr(self, name)
            fits = name in _MAY_BE_NONE if value is None else lowest <= value <= highest
            _check(fits, name, text or f"from {lowest} to {highest}", value)
        _check(self.top_p > 0, "top_p", RANGES["top_p"].text, self.top_p)
        _check(all(self.stop), "stop", "free of empty strings", list(self.stop))
        most = MAX_COUNT if limit is None else limit
        _check(self.pooling in ("", "last", "mean", "score"), "pooling", "last, mean, score or empty", self.pooling)
        _check(not self.min_tokens or self.grammar is None, "min_tokens", "0 with structured output", self.min_tokens)
        _check(0 <= self.min_tokens <= most, "min_tokens", "from 0 to max_tokens", self.min_tokens)
        for token, bias in self.logit_bias:
            _check(abs(bias) <= MAX_BIAS, "logit_bias", f"from -{MAX_BIAS} to {MAX_BIAS} for each token", {token: bias})

    def end_ids(self, eos: Iterable[int]) -> tuple[int, ...]:
        """The tokens that end the output, where the model's end-of-sequence tokens are these."""
        return (*self.stop_token_ids, *(() if self.ignore_eos and self.grammar is None else eos))

    def of_choice(self, index: int) -> SamplingParams:
        """The parameters of the output of this number: the seeds of a request's outputs follow one another."""
        return replace(self, seed=((self.seed or 0) + index) % (MAX_SEED + 1)) if index else self


def _check(valid: bool, name: str, expected: str, value: object) -> None:
    if not valid:
        raise RequestError(f"{name} must be {expected}, not {value!r}", param=name)


class ReqState(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"  # the terminal reply is out; pages go back once no step in flight touches them


@dataclass(slots=True, eq=False)
class Req:
    """A request inside the scheduler: the one mutable record. Only the planner changes it.

    tokens: prompt, then the output ids that are known on the host. prefix: those of them that were known when it was
    last queued, as an array, so that neither admission nor a chunk of prefill costs a conversion. `num_tokens` counts
    those that have been planned but whose ids are still on the device, too. `num_computed` of them have their KV in
    `pages` (or will, once the steps already planned have run)."""

    uid: int
    tokens: list[int]
    prefix: npt.NDArray[np.int32]
    prompt_len: int
    params: SamplingParams
    max_len: int  # prompt + output tokens at which the request ends with `length`
    num_tokens: int
    namespace: bytes = b""  # cached prefixes are shared within one only
    num_computed: int = 0
    num_inflight: int = 0  # steps submitted and not yet retired that touch this request
    num_stale: int = 0  # of those the ones that went on from a token that was not sampled
    num_cached: int = 0  # prompt tokens found in the prefix cache at first admission
    row: int = -1  # index into the engine's per-request tables while running
    pages: list[int] = field(default_factory=list)
    window_pages: list[int] = field(default_factory=list)  # of layers whose windows slide, as many, if there are any
    num_behind: int = 0  # of these so many, the first ones, are not its any more
    handle: Any = None  # the prefix cache's lock on the shared part of `pages`
    state: ReqState = ReqState.WAITING
    started: bool = False  # was ever admitted
    num_interrupted: int = 0  # tokens in the cache when its prefill last made way for others
    drafted: tuple[int, int] = (0, 0)  # tokens of its drafts: right, wrong
    num_charged: int = 0  # tokens that count among what its client has had
    retracted: bool = False  # waits again as soon as no step in flight touches it
    failed: bool = False  # what it computed must not be reused
    held: bool = False  # sits steps out until `Planner.resume`: its mask is being computed
    paced: bool = False  # held after each token
    borders: list[int] = field(default_factory=list)  # tokens of its prompt after which snapshots of states are due
    num_saved: int = 0  # tokens of its prefix that are cached so far; -1: the state of its row is of no use any more
    prompt_logprobs: Logprobs = b""  # of the chunks so far, until its first output
    ends: frozenset[int] = frozenset()  # tokens that end its output

    @property
    def tells_prompt(self) -> bool:
        """Whether it computes all of its prompt, even what is cached. Meanwhile it must not hold on to that: alone with
        both copies, it might never get the pages that it needs."""
        tells = self.params.prompt_logprobs is not None or self.params.pooling == "mean"
        return tells and len(self.tokens) == self.prompt_len


class Admission(NamedTuple):
    """A request takes a row of the engine's tables: written before the step's tokens are computed."""

    row: int
    token_ids: npt.NDArray[np.int32]  # every id known so far: the prompt, and after a retraction the output
    params: SamplingParams  # `seed` is never None here
    prompt_len: int = 0  # how many of `token_ids` are prompt
    end_ids: tuple[int, ...] = ()  # ids that must not be sampled while the output has fewer than `min_tokens`


class PageUpdate(NamedTuple):
    """Pages that a row gains: they become entries `first_index, first_index + 1, …` of its page table.

    window_pages: of the table for layers whose windows slide, if that is another. Entries behind the window are stale.
    """

    row: int
    first_index: int
    pages: tuple[int, ...]
    window_pages: tuple[int, ...] = ()


class ScheduledReq(NamedTuple):
    """One request's share of a step: compute `num_new` tokens from position `start` on.

    The ids come from the engine's token buffer at [row, start : start + num_new]. Each of the last `num_samples` of
    them (one, and one for each drafted token; none in prefill chunks but the last) yields the token at the position
    after it, which the engine writes into the buffer. A request for a vector has none. `next_draft_len`: as many tokens
    the engine is to draft for the next step; the row has pages for them."""

    row: int
    start: int
    num_new: int
    num_samples: int
    next_draft_len: int = 0
    num_accepted: int = 0  # tokens of its last draft that recurrent states have still to take in, before all else
    follows: int = 0  # 1 + its place in the step before: it starts behind what that accepts; `start` counts none of it


class Draft(NamedTuple):
    """Guesses of a row's next tokens, which its share verifies as its last ones: written to the token buffer from
    `position` on before the step is computed. One is accepted if the token before it samples the same. ids:
    `ID_PENDING` for those that the engine drafts in the step before (`ScheduledReq.follows`)."""

    row: int
    position: int
    ids: tuple[int, ...]


class StateCopy(NamedTuple):
    """The state in slot `source`, of all layers that have one, and what it keeps, is in slot `target`, too; -1: zeros.

    Slots are rows, one more for padding, and then those of snapshots."""

    source: int
    target: int


class Masks(Protocol):
    """Which tokens may be sampled, for each of a plan's `masked`: bit t % 32 of word t // 32 is set if token t may.
    They may depend on tokens of the step before. An engine asks once."""

    shape: tuple[int, int]  # len(masked), ceil(vocab_size / 32)

    def __call__(
        self, words: npt.NDArray[np.int32], states: npt.NDArray[np.int32], ids: npt.NDArray[np.int32] | None
    ) -> None:
        """Write mask i to words[i], and last states[i], from `MASK_PENDING` to `MASK_READY` or `MASK_NOT_READY`: before
        it returns, or with `ids` later, on any thread that keeps the arrays. Then engines wait, for a second at most,
        and write to ids[i], until then `ID_PENDING`, the token of `StepResult` as soon as it is sampled."""


class StepPlan(NamedTuple):
    """What the engine computes in one step. Plans are executed in order; a later one may rely on an earlier one's KV.

    Within a step, all KV is stored before any of it is read, so requests in one plan may share pages. Before that, the
    copies of `states` are made, one after the other."""

    step_id: int
    admissions: tuple[Admission, ...]
    page_updates: tuple[PageUpdate, ...]
    reqs: tuple[ScheduledReq, ...]  # decode first: those of one token, which samples
    num_decode: int = 0  # how many of them are decode
    masked: tuple[int, ...] = ()  # which of the step's samples have a mask, by their number among these
    expected: tuple[PageUpdate, ...] = ()  # now and then: all pages of each row, which the engine is to compare
    states: tuple[StateCopy, ...] = ()  # of models that have any
    drafts: tuple[Draft, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum([req.num_new for req in self.reqs])


# Log-probabilities of tokens, one after the other. Of each, in words of 4 bytes of this machine's order: its own as
# float32, then for the k most probable tokens in its place, in descending order, id and log-probability by turns.
Logprobs = bytes


class StepResult(NamedTuple):
    """The sampled ids: `num_samples` for each `ScheduledReq` that samples, in plan order; -1 where the logits were not
    finite, `NOT_READY` where a mask was not.

    Log-probabilities are there on rank 0, for the requests that want them: of sampled tokens by their number among the
    step's samples; of the prompt tokens from start + 1 to start + num_new, as far as they are prompt, by index into the
    plan's requests. pooled: on all ranks, of the requests for vectors whose prompts end, float32; b"": not finite.
    drafts: on all ranks, what may follow the last token that is kept, by index into the plan's requests."""

    step_id: int
    token_ids: list[tuple[int, ...]]
    logprobs: Mapping[int, Logprobs] = {}
    prompt_logprobs: Mapping[int, Logprobs] = {}
    pooled: Mapping[int, bytes] = {}
    drafts: Mapping[int, list[int]] = {}


def num_right(draft: Sequence[int], ids: Sequence[int]) -> int:
    """How many tokens of a draft are accepted where a step has sampled `ids`: those before the first wrong one."""
    return next((i for i in range(len(draft)) if draft[i] != ids[i] or ids[i + 1] < -1), len(draft))


class StepHandle(Protocol):
    """A submitted step."""

    def wait(self, timeout: float | None = None) -> bool:
        """Wait up to `timeout` seconds (None: for ever); whether the step has finished."""

    def result(self) -> StepResult:
        """Wait for the step. Raises: EngineError when it failed on the device."""


class Executor(Protocol):
    """Executes plans in the order of submission; `submit` does not wait for the step. masks: None on ranks above 0,
    which do not sample, and where the plan has no `masked`."""

    def submit(self, plan: StepPlan, masks: Masks | None = None) -> StepHandle: ...

    def close(self) -> None:
        """Finish what was submitted, leave the other ranks, and free the device."""


class ReqOutput(NamedTuple):
    """New tokens of one request. The last output of a request, and only that, has a `finish_reason`.

    error_status: what an HTTP client is told of whose fault the error is.
    num_hidden: how many of the last ids are end-of-sequence tokens that ended it (0 or 1).
    logprobs: of `token_ids`; prompt_logprobs: of all prompt tokens but the first, with the first output. On rank 0, for
    requests that want them. pooled: a vector, in float32."""

    req: Req
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    num_hidden: int = 0
    error: str | None = None
    error_status: int = 500
    logprobs: Logprobs = b""
    prompt_logprobs: Logprobs = b""
    pooled: bytes = b""

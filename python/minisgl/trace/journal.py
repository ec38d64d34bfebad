"""What the API server remembers of requests, and the story of one of them: its eight stages."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

import msgspec
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from minisgl.message.messages import TokenizeMsg, UserReply
from minisgl.trace.recorder import Json, Record

MAX_ENTRIES = 1024
MAX_PROMPT = 2**14  # bytes of a prompt that are kept, where any are
TRACE_HEADERS = ("traceparent", "tracestate")  # of the W3C: which trace a request is a part of


@dataclass(slots=True, eq=False)
class Output:
    """One output. detokenized: its first text and its last, and `first` is when the first was here."""

    uid: int
    has_grammar: bool
    first: float = 0.0
    detokenized: tuple[float, float] = (0.0, 0.0)
    num_output: int = 0
    reason: str | None = None


@dataclass(slots=True, eq=False)
class Entry:
    """An HTTP request that got as far as a tokenizer. headers: of `TRACE_HEADERS`. ids: its own, the answer's, and the
    owner."""

    received: float
    headers: dict[str, str]
    ids: Sequence[str] = ("", "", "")
    validated: float = 0.0
    sent: float = 0.0
    prompts: dict[int, str] = field(default_factory=dict)  # by index of their first output, where they are kept
    outputs: dict[int, Output] = field(default_factory=dict)  # by index

    @property
    def uids(self) -> tuple[int, ...]:
        return tuple([output.uid for output in self.outputs.values()])


_arrived: ContextVar[Entry | None] = ContextVar("arrived", default=None)


class Journal:
    """The last requests. on_sent: is told when an answer is out."""

    def __init__(self) -> None:
        self.keep_prompts = False
        self.entries: deque[Entry] = deque(maxlen=MAX_ENTRIES)
        self.open: dict[int, tuple[Entry, Output]] = {}  # by uid: the outputs that have not ended
        self.on_sent: Callable[[Entry], None] = lambda _: None

    def begin(self, ids: Sequence[str], index: int, uid: int, message: TokenizeMsg) -> None:
        """An output is sent on its way, perhaps once more."""
        entry = _arrived.get()
        if entry is None or (entry.validated and entry.ids != ids):  # others are sent again while this one comes
            entry = next((entry for entry in self.entries if entry.ids == ids), None)
        if entry is None:
            return
        if not entry.validated:
            entry.ids, entry.validated = ids, time.time()
            self.entries.append(entry)
        if self.keep_prompts and index % message.count == 0:
            entry.prompts[index] = msgspec.json.encode(message.prompt)[:MAX_PROMPT].decode("utf-8", "ignore")
        if (before := entry.outputs.get(index)) is not None:
            self.open.pop(before.uid, None)
        entry.outputs[index] = Output(uid, message.params.grammar is not None)
        self.open[uid] = entry, entry.outputs[index]

    def take(self, reply: UserReply) -> None:
        """The first or the last text of an output is here."""
        if (found := self.open.get(reply.uid)) is None:
            return
        output, output.num_output = found[1], reply.num_output_tokens
        output.first = output.first or time.time()
        output.detokenized = output.detokenized[0] or reply.detokenized, reply.detokenized
        if reply.finish_reason is not None:
            self.end(reply.uid, reply.finish_reason.value)

    def end(self, uid: int, reason: str) -> None:
        """An output has ended, however."""
        if (found := self.open.pop(uid, None)) is not None:
            found[1].reason = reason


class Arrivals:
    """Around the routes: notes when requests come, and when their answers are out."""

    def __init__(self, app: ASGIApp, journal: Journal) -> None:
        self._app, self._journal = app, journal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        entry = Entry(time.time(), {name: headers[name] for name in TRACE_HEADERS if name in headers})
        _arrived.set(entry)
        try:
            await self._app(scope, receive, send)
        finally:
            entry.sent = time.time()
            if entry.validated:
                self._journal.on_sent(entry)


def story(entry: Entry, records: Mapping[int, Record], owner: str = "") -> Json:
    """One request, as far as it has come. records: rank 0's, by uid. owner: who asks."""
    outputs = [
        _output(entry, index, output, records.get(output.uid) or Record(output.uid))
        for index, output in entry.outputs.items()
    ]
    ids = {"id": entry.ids[0], "response_id": entry.ids[1], "owner_is_you": entry.ids[2] == owner}
    return {**ids, "prompt": "\n".join(entry.prompts.values()) or None, "outputs": outputs}


def _output(entry: Entry, index: int, output: Output, record: Record) -> Json:
    nothing: Json = {"time": 0.0, "num_cached": 0, "row": None, "step": None}
    first = record.admissions[0] if record.admissions else nothing
    state = "finished" if output.reason else "running" if record.admissions else "waiting"
    row = record.admissions[-1]["row"] if record.admissions else None
    ended = {"reason": output.reason or record.reason, "num_output": max(output.num_output, record.num_output)}
    held = record.queued - record.tokenized if output.has_grammar and record.queued else 0.0
    waited = {**record.waited, "grammar": held}
    most = max(waited, key=waited.__getitem__)
    queued = {"waited": waited, "why": most if waited[most] else None, "ahead": record.ahead}
    stages: dict[str, tuple[float, Json]] = {
        "received": (entry.received, {}),
        "validated": (entry.validated, {}),
        "tokenized": (record.tokenized, {"num_tokens": record.num_prompt}),
        "queued": (record.queued, {**queued, "overtaken": record.overtaken}),
        "admitted": (first["time"], first),
        "finished": (record.finished, ended),
        "detokenized": (output.detokenized[1] * bool(output.reason), {"first": output.detokenized[0] or None}),
        "sent": (entry.sent, {"first": output.first or None}),
    }
    line = [
        {**more, "name": name, "time": when or None, "seconds": when - entry.received if when else None}
        for name, (when, more) in stages.items()
    ]
    about = {"index": index, "row": row, "state": state, "num_cached": first["num_cached"]}
    return {**msgspec.structs.asdict(record), **about, **ended, "stages": line}

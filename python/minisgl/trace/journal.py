"""What the API server sees of requests: when they come, when they go on, and when their answers are out."""

import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from minisgl.message.messages import TokenizeMsg, UserReply
from minisgl.trace.records import Event, Output

MAX_STORIES = 1024
MAX_PROMPT = 2**14  # bytes of a prompt that are kept, where any are
TRACE_HEADERS = ("traceparent", "tracestate")  # of the W3C: which trace a request is a part of


@dataclass(slots=True, eq=False)
class Story:
    """An HTTP request for outputs. headers: of `TRACE_HEADERS`. ids: its own, its answer's, and its owner. prompts: by
    the index of their first output, where they are kept. outputs: by index."""

    received: float
    headers: Mapping[str, str]
    validated: float = 0.0
    ids: Sequence[str] = ("", "", "")
    prompts: dict[int, str] = field(default_factory=dict)
    outputs: dict[int, Output] = field(default_factory=dict)

    def told(self, known: Mapping[int, Output], owner: str) -> dict[str, Any]:
        """As far as it has come. known: to rank 0, by uid. owner: who asks."""
        outputs = [output.joined(known.get(output.uid) or Output(output.uid)) for output in self.outputs.values()]
        ids = {"id": self.ids[0], "response_id": self.ids[1], "owner_is_you": self.ids[2] == owner}
        return {**ids, "prompt": "\n".join(self.prompts.values()) or None, "outputs": outputs}


_arrived: ContextVar[Story | None] = ContextVar("arrived", default=None)


def arrived(ids: Sequence[str]) -> Story:
    """The request that is being answered, which has these ids."""
    story = _arrived.get() or Story(time.time(), {})
    story.ids = ids or story.ids
    return story


class Journal:
    """The last requests. on_sent: is told when an answer is out."""

    def __init__(self) -> None:
        self.keep_prompts = False
        self.stories: deque[Story] = deque(maxlen=MAX_STORIES)
        self.on_sent: Callable[[Story], None] = lambda _: None

    def begin(self, story: Story, index: int, uid: int, message: TokenizeMsg) -> Output:
        """An output is sent on its way, perhaps once more."""
        if not story.validated:
            story.validated = time.time()
            self.stories.append(story)
        if self.keep_prompts and index % message.count == 0:
            story.prompts[index] = msgspec.json.encode(message.prompt)[:MAX_PROMPT].decode("utf-8", "ignore")
        why = None if message.params.grammar is None else "grammar"  # it may wait before rank 0 hears of it
        events = [Event("received", story.received), Event("validated", story.validated, why=why)]
        output = Output(uid, index, events=[*events, Event("detokenized", None), Event("sent", None)])
        story.outputs[index] = output
        return output

    def close(self, story: Story, state: Mapping[str, Any]) -> None:
        """An answer is out. state: of the request, with the HTTP error that it was `refused` with."""
        now, (status, param, code) = time.time(), state.get("refused", (0, None, None))
        if not story.outputs:
            story.ids = state["request_id"], "", state["owner"]
            events = [Event("received", story.received), Event("sent", None)]
            story.outputs[0] = Output(-int(1e6 * now), reason="refused", events=events)  # rank 0 has no such uid
            self.stories.append(story)
        for output in story.outputs.values():
            output.events[-1].time = now
            if status:
                output.events.insert(0, Event("refused", now, status=status, param=param, code=code))
                output.reason = "refused" if output.reason == "error" and status < 500 else output.reason
        self.on_sent(story)


def take(output: Output, reply: UserReply) -> None:
    """The first or the last text of an output is here."""
    detokenized, sent = output.events[-2:]
    detokenized.first, sent.first = detokenized.first or reply.detokenized, sent.first or time.time()
    output.num_output = reply.num_output_tokens
    if reply.finish_reason is not None:
        detokenized.time, output.reason = reply.detokenized, reply.finish_reason.value


class Arrivals:
    """Around the routes: notes when requests come, and when their answers are out. paths: of those for outputs."""

    def __init__(self, app: ASGIApp, journal: Journal, paths: Collection[str]) -> None:
        self._app, self._journal, self._paths = app, journal, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        story = Story(time.time(), {name: headers[name] for name in TRACE_HEADERS if name in headers})
        _arrived.set(story)
        try:
            await self._app(scope, receive, send)
        finally:
            if story.outputs or (scope["path"] in self._paths and "refused" in scope["state"]):
                self._journal.close(story, scope["state"])

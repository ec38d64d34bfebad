"""What the trace is made of. The API server and rank 0 note events of the same outputs, each what it sees. They encode
to the JSON of `docs/tracing.md`; the log, spans and charts are made of them."""

from pathlib import Path
from typing import Any

import msgspec

# By name: what it is, in which process, and the code that does it. The first eight are stages, the others repeat.
EVENTS: dict[str, dict[str, Any]] = msgspec.yaml.decode(Path(__file__).with_name("events.yaml").read_bytes())
STAGES = [*EVENTS][:8]


class Event(msgspec.Struct, omit_defaults=True):
    """Something that happens to an output. time: Unix seconds, None: to come. seconds: since the first event.

    Of a step: the output's row, and `num_new` tokens from position `start` on; what is before was computed, or cached
    (accepted: they had been guessed). num_tokens: of the prompt (tokenized), of the output (finished). ahead: requests
    that waited already; overtaken: how many that came later went first; why: what it waited for. first: when the first
    text was there. status, param, code: of the HTTP error (refused).
    """

    name: str
    time: float | None
    step: int | None = None
    row: int | None = None
    start: int | None = None
    num_new: int | None = None
    num_tokens: int | None = None
    ahead: int | None = None
    overtaken: int = 0
    why: str | None = None
    reason: str | None = None
    first: float | None = None
    status: int | None = None
    param: str | None = None
    code: str | None = None
    seconds: float | None = None


class Output(msgspec.Struct):
    """One of a request's outputs. reason: why it ended. Its events are bounded, and a sample where they repeat: `num_…`
    counts all."""

    uid: int
    index: int = 0
    reason: str | None = None
    num_prompt: int = 0
    num_cached: int = 0
    num_output: int = 0
    num_chunks: int = 0
    num_drafted: int = 0  # tokens that were guessed
    num_accepted: int = 0  # of these, those that were right
    num_retractions: int = 0
    events: list[Event] = []

    def joined(self, other: "Output") -> "Output":
        """What the API server knows of it, with what rank 0 does."""
        reason, dated = self.reason or other.reason, [(e.time, e) for e in self.events + other.events if e.time]
        dated.sort(key=lambda item: item[0])
        for when, event in dated:
            event.seconds = when - dated[0][0]
            event.reason = reason if event.name == "finished" else None
        events, num_output = [event for _, event in dated], max(self.num_output, other.num_output)
        return msgspec.structs.replace(other, index=self.index, reason=reason, num_output=num_output, events=events)


class Step(msgspec.Struct):
    """What was computed at once. rows: row, uid, number of new tokens, and 0 for decode, 1 for prefill, 2 where guesses
    are verified. Who is not the operator is told of their own rows, and of no `pages`, `running` and `waiting`."""

    step: int
    time: float
    num_decode: int
    num_tokens: int
    pages: dict[str, int] | None
    running: int | None
    waiting: int | None
    host_ms: float | None = None
    device_ms: float | None = None
    rows: list[tuple[int, int, int, int]] = []


class Recorded(msgspec.Struct):
    """Rank 0's answer to a `TraceMsg`. now: what `snapshot.look` sees."""

    outputs: list[Output]
    steps: list[Step]
    now: dict[str, Any] | None


encode_json, encode_recorded = msgspec.json.Encoder().encode, msgspec.msgpack.Encoder().encode
decode_recorded = msgspec.msgpack.Decoder(Recorded).decode

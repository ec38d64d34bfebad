"""How a scheduler hears of requests and reports tokens: over ZeroMQ in a server, in memory inside `LLM`.

Rank 0 receives messages from outside and passes them on to the other ranks, one numbered `RankBatch` for each turn of
its loop; the others take their turns from those. So every rank's planner sees the same calls in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from minisgl.core import FinishReason
from minisgl.errors import EngineError
from minisgl.message.backend import AbortMsg, FlushMsg, PingMsg, RankBatch, StatsMsg, backend_codec, rank_codec
from minisgl.message.frontend import ErrorReply, FrontendMsg, StatsReply, frontend_codec
from minisgl.message.tokenizer import DetokenizeMsg, TokenizerMsg, tokenizer_codec
from minisgl.scheduler.grammar import Grammars, PlannerMsg, Reply
from minisgl.utils.faults import fault
from minisgl.utils.sockets import Endpoints, PullSocket, PushSocket

_IDLE_SECONDS = 0.5  # between heartbeats while nothing happens


class Transport(Protocol):
    """One rank's connection to the rest of the system. Ranks above 0 say nothing.

    grammars: on rank 0, of its requests: see that what they have to match is compiled before anyone hears of them.
    """

    grammars: Grammars

    def receive(self, *, block: bool, digest: int) -> Sequence[PlannerMsg]:
        """The messages for this turn. With `block`, wait for at least one. `digest` is that of the last plan."""

    def pump(self, *, late: bool = False) -> None:
        """Called now and then while a step runs: answer health checks, show that this process is alive. late: the step
        should have ended long ago."""

    def send(self, messages: Sequence[Reply]) -> None:  # noqa: ARG002
        """To the detokenizer."""
        return

    def answer(self, message: FrontendMsg) -> None:  # noqa: ARG002
        """Tell the API server what it has asked for itself."""
        return


class RankFanout:
    """Rank 0's sockets to the other ranks."""

    def __init__(self, endpoints: Endpoints) -> None:
        self._sockets = [PushSocket(endpoint, rank_codec) for endpoint in endpoints.ranks]
        self._number = 0

    def send(self, messages: Sequence[PlannerMsg], digest: int) -> None:
        for socket in self._sockets:
            socket.send([RankBatch(self._number, list(messages), digest)])
        self._number += 1

    def close(self) -> None:
        for socket in self._sockets:
            socket.close()


class LeaderTransport(Transport):
    """Rank 0 of a server. stats: what to answer to whoever asks for the counts."""

    def __init__(
        self,
        endpoints: Endpoints,
        heartbeat: Callable[[], None],
        grammars: Grammars | None = None,
        stats: Callable[[int], StatsReply] | None = None,
    ) -> None:
        self._pull = PullSocket(endpoints.backend, backend_codec)
        self._push: PushSocket[TokenizerMsg] = PushSocket(endpoints.detokenizer, tokenizer_codec)
        self._push.send([FlushMsg(0)])  # of the scheduler before, where this one was started again
        self._frontend: PushSocket[FrontendMsg] = PushSocket(endpoints.frontend, frontend_codec)
        self._stats = stats
        self._fanout = RankFanout(endpoints)
        self._heartbeat = heartbeat
        self._received: list[PlannerMsg] = []
        self.grammars = grammars or Grammars(None)

    def receive(self, *, block: bool, digest: int) -> Sequence[PlannerMsg]:
        self._take(0.0)
        messages = self._admit()
        while block and not messages:
            if self.grammars.is_holding:
                self.grammars.wait()
            self._take(0.0 if self.grammars.is_holding else _IDLE_SECONDS)
            messages = self._admit()
        self._fanout.send(messages, digest)
        return messages

    def pump(self, *, late: bool = False) -> None:
        self._take(0.0, late)

    def send(self, messages: Sequence[Reply]) -> None:
        """What there is no memory for ends its own request."""
        try:
            fault("send")
            self._push.send(messages)
        except MemoryError:
            if len(messages) == 1:
                error, uid = "there is no memory for this output", messages[0].uid
                self._push.send([DetokenizeMsg(uid, b"", finish_reason=FinishReason.ERROR, error=error)])
                self._received.append(AbortMsg(uid))
            for message in messages if len(messages) > 1 else ():
                self.send([message])

    def answer(self, message: FrontendMsg) -> None:
        self._frontend.send([message])

    def _admit(self) -> list[PlannerMsg]:
        messages, self._received = self.grammars.admit(self._received), []
        replies = self.grammars.take_replies()
        if replies:
            self.send(replies)
        return messages

    def _take(self, timeout: float, late: bool = False) -> None:
        self._heartbeat()
        for message in self._pull.receive(timeout):
            if isinstance(message, PingMsg) and late:
                self.answer(ErrorReply(message.uid, "a step takes too long", status=503))
            elif isinstance(message, PingMsg):
                self._push.send([message])
            elif isinstance(message, StatsMsg):
                if self._stats is not None:
                    self.answer(self._stats(message.uid))
            else:
                self._received.append(message)


class FollowerTransport(Transport):
    """A rank above 0, in a server or under `LLM`: it only listens to rank 0."""

    def __init__(self, endpoints: Endpoints, rank: int, heartbeat: Callable[[], None]) -> None:
        self._pull = PullSocket(endpoints.ranks[rank - 1], rank_codec, strict=True)
        self._heartbeat = heartbeat
        self.grammars = Grammars(None)
        self._batches: list[RankBatch] = []
        self._number = 0

    def receive(self, *, block: bool, digest: int) -> Sequence[PlannerMsg]:  # noqa: ARG002
        """Raises: EngineError when this rank has missed a turn, or planned otherwise than rank 0."""
        self._heartbeat()
        while not self._batches:
            self._batches = self._pull.receive(_IDLE_SECONDS)
            self._heartbeat()
        batch = self._batches.pop(0)
        if batch.number != self._number:
            raise EngineError(f"rank 0 is at turn {batch.number}, this rank at {self._number}")
        if batch.digest != digest:
            raise EngineError(f"this rank's plan differs from rank 0's at turn {batch.number}")
        self._number += 1
        return batch.messages

    def pump(self, *, late: bool = False) -> None:  # noqa: ARG002
        self._heartbeat()

    def close(self) -> None:
        self._pull.close()


class LocalTransport(Transport):
    """Rank 0 inside the caller's process: messages are put in, outputs are taken out. pump: as the method."""

    def __init__(
        self, fanout: RankFanout | None = None, pump: Callable[[], None] | None = None, grammars: Grammars | None = None
    ) -> None:
        self._fanout, self._pump = fanout, pump
        self.grammars = grammars or Grammars(None)
        self._received: list[PlannerMsg] = []
        self._outputs: list[Reply] = []

    def put(self, messages: Sequence[PlannerMsg]) -> None:
        self._received += messages

    def take_outputs(self) -> list[Reply]:
        outputs, self._outputs = self._outputs, []
        return outputs

    def receive(self, *, block: bool, digest: int) -> Sequence[PlannerMsg]:
        messages, self._received = self.grammars.admit(self._received), []
        self._outputs += self.grammars.take_replies()
        if block and not messages and self.grammars.is_holding:
            self.grammars.wait()
        if self._fanout is not None:
            self._fanout.send(messages, digest)
        return messages

    def pump(self, *, late: bool = False) -> None:  # noqa: ARG002
        if self._pump is not None:
            self._pump()

    def send(self, messages: Sequence[Reply]) -> None:
        self._outputs += messages

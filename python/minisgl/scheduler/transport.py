"""How a scheduler hears of requests and reports tokens: over ZeroMQ in a server, in memory inside `LLM`.

Rank 0 receives messages from outside and passes them on to the other ranks, one numbered `RankBatch` for each turn of
its loop; the others take their turns from those. So every rank's planner sees the same calls in the same order."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from minisgl.core import FinishReason
from minisgl.errors import EngineError
from minisgl.message import messages as wire
from minisgl.message.sockets import Endpoints, PullSocket, PushSocket
from minisgl.scheduler.grammar import Grammars, Reply

Beat = Callable[[], None]
Answers = Mapping[type, Callable[[Any], wire.FrontendMsg]]  # to questions of this kind
_IDLE_SECONDS = 0.5  # between heartbeats while nothing happens


class Transport(ABC):
    """One rank's connection to the rest of the system. Ranks above 0 say nothing.

    beat: called now and then, to show that this process is alive. grammars: on rank 0, of its requests: see that what
    they have to match is compiled before anyone hears of them."""

    def __init__(self, beat: Beat, grammars: Grammars | None = None) -> None:
        self._beat, self.grammars = beat, grammars or Grammars(None)

    @abstractmethod
    def receive(self, *, block: bool) -> Sequence[wire.RankMsg]:
        """The messages for this turn. With `block`, wait a while for one."""

    def pump(self, *, late: bool = False) -> None:  # noqa: ARG002
        """Called now and then while a step runs. late: the step should have ended long ago."""
        self._beat()

    def send(self, messages: Sequence[Reply]) -> None:  # noqa: B027
        """To the detokenizer."""

    def answer(self, message: wire.FrontendMsg) -> None:  # noqa: B027
        """Tell the API server what it has asked for itself."""


class FollowerTransport(Transport):
    """A rank above 0, in a server or under `LLM`: it only listens to rank 0."""

    def __init__(self, endpoints: Endpoints, rank: int, beat: Beat) -> None:
        super().__init__(beat)
        self._pull = PullSocket(endpoints.ranks[rank - 1], wire.rank_codec, strict=True)
        self._batches: list[wire.RankBatch] = []
        self._number = 0

    def receive(self, *, block: bool) -> Sequence[wire.RankMsg]:  # noqa: ARG002
        """Raises: EngineError when this rank has missed a turn."""
        self._beat()
        while not self._batches:
            self._batches = self._pull.receive(_IDLE_SECONDS)
            self._beat()
        batch = self._batches.pop(0)
        if batch.number != self._number:
            raise EngineError(f"rank 0 is at turn {batch.number}, this rank at {self._number}")
        self._number += 1
        return batch.messages

    def close(self) -> None:
        self._pull.close()


class LocalTransport(Transport):
    """Rank 0, inside the caller's process: messages are put in, outputs are taken out. ranks: where the others are."""

    def __init__(self, ranks: Sequence[str] = (), beat: Beat = lambda: None, grammars: Grammars | None = None) -> None:
        super().__init__(beat, grammars)
        self._ranks, self._number = [PushSocket(endpoint, wire.rank_codec) for endpoint in ranks], 0
        self._received: list[wire.RankMsg] = []
        self._outputs: list[Reply] = []

    def put(self, messages: Sequence[wire.RankMsg]) -> None:
        self._received += messages

    def take_outputs(self) -> list[Reply]:
        outputs, self._outputs = self._outputs, []
        return outputs

    def receive(self, *, block: bool) -> Sequence[wire.RankMsg]:
        messages = self._admit(0.0)
        if block and not messages:
            messages = self._admit(0.0 if self.grammars.wait() else _IDLE_SECONDS)
        for socket in self._ranks:
            socket.send([wire.RankBatch(self._number, messages)])
        self._number += 1
        return messages

    def send(self, messages: Sequence[Reply]) -> None:
        self._outputs += messages

    def close(self) -> None:
        for socket in self._ranks:
            socket.close()

    def _admit(self, timeout: float) -> list[wire.RankMsg]:
        self._take(timeout)
        received, self._received = self._received, []
        messages, replies = self.grammars.admit(received)
        if replies:
            self.send(replies)
        return messages

    def _take(self, timeout: float) -> None:
        """Wait so many seconds for messages from outside, which are put in."""


class LeaderTransport(LocalTransport):
    """Rank 0 of a server, where messages come and go over sockets. answers: what those know who watch it."""

    def __init__(
        self, endpoints: Endpoints, beat: Beat, grammars: Grammars | None = None, answers: Answers | None = None
    ) -> None:
        super().__init__(endpoints.ranks, beat, grammars)
        self._pull = PullSocket(endpoints.backend, wire.backend_codec)
        self._push: PushSocket[wire.TokenizerMsg] = PushSocket(endpoints.detokenizer, wire.tokenizer_codec)
        self._push.send([wire.FlushMsg(0)])  # of the scheduler before, where this one was started again
        self._frontend: PushSocket[wire.FrontendMsg] = PushSocket(endpoints.frontend, wire.frontend_codec)
        self._answers = answers or {}

    def pump(self, *, late: bool = False) -> None:
        """Answer health checks."""
        self._take(0.0, late)

    def send(self, messages: Sequence[Reply]) -> None:
        """What there is no memory for ends its own request."""
        try:
            self._push.send(messages)
        except MemoryError:
            if len(messages) == 1:
                error, uid = "there is no memory for this output", messages[0].uid
                self._push.send([wire.DetokenizeMsg(uid, b"", finish_reason=FinishReason.ERROR, error=error)])
                self.put([wire.AbortMsg(uid)])
            for message in messages if len(messages) > 1 else ():
                self.send([message])

    def answer(self, message: wire.FrontendMsg) -> None:
        self._frontend.send([message])

    def close(self) -> None:
        super().close()
        for socket in (self._pull, self._push, self._frontend):
            socket.close()

    def _take(self, timeout: float, late: bool = False) -> None:
        self._beat()
        for message in self._pull.receive(timeout):
            if isinstance(message, wire.PingMsg) and late:
                self.answer(wire.ErrorReply(message.uid, "a step takes too long", status=503))
            elif isinstance(message, wire.PingMsg):
                self._push.send([wire.PingMsg(message.uid, back=True)])
            elif not isinstance(message, wire.StatsMsg | wire.TraceMsg):
                self.put([message])
            elif answer := self._answers.get(type(message)):
                self.answer(answer(message))

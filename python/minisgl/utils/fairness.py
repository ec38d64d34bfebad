"""Whose turn it is where several clients want the same: a function of the calls alone."""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

MAX_CLIENTS = 1024  # with nothing waiting, that are remembered


class FairQueue(Generic[T]):
    """What waits, by keys: a client's in order. Of several clients, it is the turn of the one that was charged least.

    Whoever had nothing waiting begins where the one whose turn was last has been: nobody saves up turns. `is_shared`:
    there is, or was a while ago, more than one client."""

    def __init__(self) -> None:
        self._queues: dict[str, OrderedDict[int, T]] = {}
        self._charged: dict[str, int] = {}
        self._least, self.is_shared = 0, False

    def __len__(self) -> int:
        return sum(map(len, self._queues.values())) if self._queues else 0

    def items(self) -> Iterator[tuple[int, T]]:
        return (item for queue in self._queues.values() for item in queue.items())

    def put(self, client: str, key: int, item: T, *, first: bool = False) -> None:
        """Behind all of the client's, or before them."""
        self.charge(client, 0)
        queue = self._queues.setdefault(client, OrderedDict())
        queue[key] = item
        if first:
            queue.move_to_end(key, last=False)

    def remove(self, client: str, key: int) -> None:
        del self._queues[client][key]
        if not self._queues[client]:
            del self._queues[client]

    def turn(self) -> OrderedDict[int, T]:
        """All that waits of the client whose turn it is."""
        client = min(self._queues, key=self._charged.__getitem__)
        self._least = self._charged[client]
        return self._queues[client]

    def charge(self, client: str, count: int) -> None:
        """The client has got so much."""
        before = self._charged.get(client, 0)
        self._charged[client] = (before if client in self._queues else max(before, self._least)) + count
        if len(self._charged) > MAX_CLIENTS + len(self._queues):
            self._charged = {client: self._charged[client] for client in self._queues}
        self.is_shared = len(self._charged) > 1

    def overtakes(self, client: str) -> bool:
        """Whether another client waits that was charged less than this one."""
        return min(map(self._charged.__getitem__, self._queues), default=0) < self._charged.get(client, 0)

"""Which replica a request goes to: the one where it begins soonest, by expected cached tokens and by load.

Nothing here knows of Ray, of HTTP, or of tokens' ids: a prompt is a chain of hashes of its text, block by block, so two
prompts with the same beginning have the same first blocks. What a replica has cached is what was sent to it, less what
it says that it has evicted, which it did by the same rule as we do: what was used least recently goes first, from the
end of a text on. How many bytes a token has is learned from answers.
"""

import math
import random
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

BLOCK_BYTES = 128  # of text; whatever comes behind the last whole one is not looked at
MAX_BLOCKS = 1024  # of one prompt
MAX_KNOWN = 2**20  # blocks of all replicas together; of a replica that has more than its share some are forgotten
MAX_SESSIONS = 2**16
POLICIES = ("prefix", "power-of-two", "random")
QUEUED_TOKENS = 8192.0  # that may wait at each replica before there is to be another one
KV_USE = 0.8  # share of the KV cache of each replica, likewise
RUNNING_TOKENS = 64.0  # of load that a request is while it decodes
_HOLDERS = 8  # of those that have most of the prompt, so many are compared
_STICKY_TOKENS = 4096  # by so many a session's replica may be further behind than the best one
_BYTES_PER_TOKEN = 4.0  # until answers tell
_RATE = 1 / 64  # of the newest answer in the mean


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is to be routed. blocks: see `text_blocks`; session: requests with the same go together, "": none;
    keeper: the session whose replica alone has what is asked for, or that replica."""

    blocks: Sequence[int]
    num_bytes: int
    session: str = ""
    keeper: str = ""


def text_blocks(text: bytes, salt: str = "", size: int = BLOCK_BYTES) -> list[int]:
    """A hash for each whole block, of all text up to its end. Of another salt, all are others.

    They are keyed by this process's secret (PYTHONHASHSEED), so that nobody makes up prompts that collide.
    """
    chain, blocks = hash(salt), list[int]()
    for end in range(size, min(len(text), size * MAX_BLOCKS) + 1, size):
        chain = hash((chain, text[end - size : end]))
        blocks.append(chain)
    return blocks


def wanted_replicas(queued_tokens: float, kv_use: float) -> int:
    """As many as keep queues short and KV caches from filling up, by the sums over all replicas."""
    return max(1, math.ceil(max(queued_tokens / QUEUED_TOKENS, kv_use / KV_USE)))


class PrefixRouter:
    """Knows the replicas that may be chosen, how much waits there, and which texts each has seen. It is not safe to be
    used by several threads at a time.

    loads: tokens that a replica has yet to compute before it comes to a new request, by its name. One that drains, or
    is not well, is taken out by `set_replicas`. sessions: the replica that each one's last request went to.
    """

    def __init__(self, policy: str = "prefix", seed: int | None = None, max_known: int = MAX_KNOWN) -> None:
        assert policy in POLICIES, policy
        self.loads: dict[str, float] = {}
        self.bytes_per_token = _BYTES_PER_TOKEN
        self._policy, self._random, self._max_known = policy, random.Random(seed), max_known
        self._names: list[str] = []
        self._holders: dict[int, dict[str, None]] = {}  # of each block
        self._known: dict[str, OrderedDict[int, None]] = {}  # blocks of each replica, the one to be evicted first
        self.sessions: OrderedDict[str, str] = OrderedDict()

    def set_replicas(self, names: Iterable[str]) -> None:
        """The replicas from now on. What is known of others is forgotten."""
        self._names = list(dict.fromkeys(names))
        for gone in self._known.keys() - set(self._names):
            self.forget(gone)
            del self._known[gone], self.loads[gone]
        for name in self._names:
            self._known.setdefault(name, OrderedDict())
            self.loads.setdefault(name, 0.0)

    def choose(self, prompt: Prompt, excluded: Collection[str] = ()) -> str | None:
        """The replica to send the prompt to, which is none of those excluded; None where no other is there."""
        names = [name for name in self._names if name not in excluded] if excluded else self._names
        names = self._random.sample(names, min(2, len(names)))
        if not names or self._policy == "random":
            return names[0] if names else None
        if self._policy == "power-of-two":
            return min(names, key=self.loads.__getitem__)
        lengths = self._cached(prompt.blocks, excluded)
        costs = {name: self.loads[name] - lengths.get(name, 0.0) for name in (*lengths, *names)}
        best = min(costs, key=costs.__getitem__)
        own = self.sessions.get(prompt.session)
        if own not in self.loads or own in excluded:
            return best
        return own if costs.get(own, self.loads[own]) <= costs[best] + _STICKY_TOKENS else best

    def place(self, name: str, prompt: Prompt) -> Callable[[float], None]:
        """The prompt goes to this replica, which has it from now on. Returns what is told how many tokens of its load
        this request is from then on: RUNNING_TOKENS, while it decodes; 0, when it has ended."""
        held, missing = 0.0, prompt.num_bytes / self.bytes_per_token - self.cached_tokens(name, prompt)

        def hold(tokens: float) -> None:
            nonlocal held
            if name in self.loads:
                self.loads[name] += tokens - held
            held = tokens

        self.learn(name, prompt)
        hold(RUNNING_TOKENS + max(0.0, missing))
        return hold

    def cached_tokens(self, name: str, prompt: Prompt) -> float:
        """How many tokens of the prompt a replica is expected to have."""
        count = 0
        while count < len(prompt.blocks) and name in self._holders.get(prompt.blocks[count], ()):
            count += 1
        return count * BLOCK_BYTES / self.bytes_per_token

    def learn(self, name: str, prompt: Prompt) -> None:
        """The prompt was sent to this replica, which has it from now on."""
        if (known := self._known.get(name)) is None:
            return
        for block in reversed(prompt.blocks):  # so that its end is evicted first
            known[block] = None
            known.move_to_end(block)
            self._holders.setdefault(block, {})[name] = None
        share = self._max_known // len(self._names)
        if len(known) > share:
            self._drop(name, len(known) - share)
        if prompt.session:
            self.sessions[prompt.session] = name
            self.sessions.move_to_end(prompt.session)
            if len(self.sessions) > MAX_SESSIONS:
                self.sessions.popitem(last=False)

    def forget(self, name: str, num_tokens: float = math.inf) -> None:
        """The replica has evicted so many tokens; unless told, all."""
        if name in self._known:
            count = num_tokens * self.bytes_per_token / BLOCK_BYTES
            self._drop(name, round(min(count, len(self._known[name]))))

    def calibrate(self, num_bytes: int, num_tokens: int) -> None:
        """An answer says how many tokens a prompt of so many bytes has."""
        if num_bytes > 0 and num_tokens > 0:
            self.bytes_per_token += (min(16.0, num_bytes / num_tokens) - self.bytes_per_token) * _RATE

    def _cached(self, blocks: Sequence[int], excluded: Collection[str]) -> dict[str, float]:
        """Some of the replicas that have most of these blocks, and how many tokens that is."""
        lengths: dict[str, float] = {}
        low, high = 0, len(blocks)
        while low < high:  # the first block that nobody has: who has one has those before it
            middle = (low + high) // 2
            low, high = (middle + 1, high) if blocks[middle] in self._holders else (low, middle)
        for index in range(low - 1, -1, -1):
            holders = self._holders.get(blocks[index], {})
            if len(holders) == len(lengths):
                continue  # the same as of the block behind it
            fresh = [name for name in holders if name not in lengths and name not in excluded]
            for name in fresh if len(fresh) <= _HOLDERS else self._random.sample(fresh, _HOLDERS):
                lengths[name] = (index + 1) * BLOCK_BYTES / self.bytes_per_token
            if len(lengths) >= _HOLDERS:
                break
        return lengths

    def _drop(self, name: str, count: int) -> None:
        known = self._known[name]
        for block in list(islice(known, count)):
            del known[block]
            holders = self._holders[block]
            del holders[name]
            if not holders:
                del self._holders[block]

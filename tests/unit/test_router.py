"""Which replica a request goes to."""

from __future__ import annotations

import random

import pytest

from minisgl.cluster.router import BLOCK_BYTES, PrefixRouter, Prompt, text_blocks

NAMES = ("a", "b", "c", "d")


def prompt(text: str, salt: str = "", session: str = "") -> Prompt:
    return Prompt(text_blocks(text.encode(), salt), len(text), session)


def words(seed: int, count: int) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(("so", "many", "words", "that", "differ")) for _ in range(count))


def router_of(names: tuple[str, ...] = NAMES, policy: str = "prefix") -> PrefixRouter:
    router = PrefixRouter(policy, seed=0)
    router.set_replicas(names)
    return router


def test_blocks_are_chained_and_salted() -> None:
    text = words(0, 400).encode()
    blocks = text_blocks(text)
    assert len(blocks) == len(text) // BLOCK_BYTES
    assert text_blocks(text[: 5 * BLOCK_BYTES + 7]) == blocks[:5]
    other = text_blocks(b"X" + text[1:])
    assert not set(other) & set(blocks), "a block is of all text up to its end"
    assert not set(text_blocks(text, "salt")) & set(blocks)


def test_a_conversation_comes_back_to_who_has_it() -> None:
    router = router_of()
    first = prompt(words(1, 500))
    home = router.choose(first)
    assert home is not None
    router.learn(home, first)
    longer = prompt(words(1, 500) + words(2, 200))
    assert {router.choose(longer) for _ in range(50)} == {home}
    assert router.cached_tokens(home, longer) == pytest.approx(len(first.blocks) * BLOCK_BYTES / router.bytes_per_token)
    salted = {router.choose(prompt(words(1, 500), salt="another")) for _ in range(100)}
    assert salted == {*NAMES}, "another tenant's prompt finds nothing"


def test_load_outweighs_what_is_cached() -> None:
    router = router_of()
    text = prompt(words(1, 500))
    router.learn("a", text)
    cached = router.cached_tokens("a", text)
    router.loads["a"] = cached - 1
    assert router.choose(text) == "a"
    router.loads["a"] = cached + 1
    assert "a" not in {router.choose(text) for _ in range(50)}


def test_of_two_the_less_loaded() -> None:
    router = router_of(policy="power-of-two")
    router.loads["a"] = 100.0
    chosen = [router.choose(prompt("")) for _ in range(400)]
    assert set(chosen) == {"b", "c", "d"}


def test_a_session_sticks_while_load_allows() -> None:
    router = router_of()
    router.learn("c", prompt("short", session="s"))
    assert {router.choose(prompt("another", session="s")) for _ in range(50)} == {"c"}
    router.loads["c"] = 1e6
    assert "c" not in {router.choose(prompt("another", session="s")) for _ in range(50)}


@pytest.mark.parametrize("policy", ["prefix", "power-of-two", "random"])
def test_never_who_is_excluded_or_gone(policy: str) -> None:
    router = router_of(policy=policy)
    text = prompt(words(1, 300), session="s")
    router.learn("a", text)
    for _ in range(100):
        assert router.choose(text, excluded=("a", "b")) in ("c", "d")
    assert router.choose(text, excluded=NAMES) is None
    router.set_replicas(("b",))
    assert {router.choose(text) for _ in range(20)} == {"b"}
    router.set_replicas(())
    assert router.choose(text) is None
    router.set_replicas(NAMES)
    assert router.cached_tokens("a", text) == 0, "who comes back has nothing"


def test_what_is_evicted_is_forgotten_from_the_end_of_the_oldest() -> None:
    router = router_of()
    old, new = prompt(words(1, 500)), prompt(words(2, 500))
    router.learn("a", old)
    router.learn("a", new)
    whole = router.cached_tokens("a", old)
    router.forget("a", whole / 2)
    assert router.cached_tokens("a", old) == pytest.approx(whole / 2, abs=BLOCK_BYTES)
    assert router.cached_tokens("a", new) == pytest.approx(len(new.blocks) * BLOCK_BYTES / router.bytes_per_token)
    router.forget("a")
    assert router.cached_tokens("a", new) == 0


def test_memory_is_bounded() -> None:
    router = PrefixRouter(seed=0, max_known=400)
    router.set_replicas(NAMES)
    texts = [prompt(words(seed, 300)) for seed in range(200)]
    for text in texts:
        name = router.choose(text)
        assert name is not None
        router.learn(name, text)
    for name in NAMES:
        known = sum(router.cached_tokens(name, text) for text in texts) * router.bytes_per_token / BLOCK_BYTES
        assert known <= 100


def test_answers_tell_how_long_tokens_are() -> None:
    router = router_of()
    for _ in range(500):
        router.calibrate(600, 100)
    assert router.bytes_per_token == pytest.approx(6, abs=0.1)

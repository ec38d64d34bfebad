"""The radix cache against a plain dictionary of prefixes, and its corner cases."""

from __future__ import annotations

import numpy as np
import pytest

from minisgl.kvcache.radix import PrefixCache, TokenIds


def ids(*tokens: int) -> TokenIds:
    return np.asarray(tokens, np.int32)


def put(cache: PrefixCache, tokens: TokenIds, pages: list[int], namespace: bytes = b"") -> None:
    """What a request does that computes `tokens` into `pages` and ends."""
    handle = cache.match(namespace, tokens).handle
    cache.lock(handle)
    cache.unlock(cache.insert(namespace, handle, tokens, pages))


def test_longest_prefix_in_whole_pages() -> None:
    cache = PrefixCache(page_size=2)
    put(cache, ids(1, 2, 3, 4, 5), [10, 11])
    assert len(cache.check([])) == 2, "a page that is not full is not cached"
    assert cache.match(b"", ids(1, 2, 3, 4, 5, 6)).pages == [10, 11]
    assert cache.match(b"", ids(1, 2, 3, 9)).pages == [10]
    assert cache.match(b"", ids(1, 9)).pages == []
    assert cache.match_len(b"", ids(1, 2, 3, 9)) == 2


def test_pages_that_differ_within_the_first_page_are_siblings() -> None:
    cache = PrefixCache(page_size=2)
    put(cache, ids(1, 2), [0])
    put(cache, ids(1, 3), [1])
    assert cache.match(b"", ids(1, 2)).pages == [0]
    assert cache.match(b"", ids(1, 3)).pages == [1]


def test_split_keeps_handles_locks_and_pages() -> None:
    cache = PrefixCache(page_size=1)
    tokens = ids(1, 2, 3, 4)
    handle = cache.match(b"", tokens).handle
    cache.lock(handle)
    handle = cache.insert(b"", handle, tokens, [0, 1, 2, 3])
    put(cache, ids(1, 2, 9), [7, 8, 5])
    assert cache.path_pages(handle) == [0, 1, 2, 3]
    assert cache.num_evictable == 1, "only the page of 9: the others are locked"
    assert cache.evict(10) == [5]
    cache.unlock(handle)
    assert sorted(cache.evict(10)) == [0, 1, 2, 3]
    assert cache.check([]) == []


def test_a_prefix_computed_twice_keeps_the_first_pages() -> None:
    cache = PrefixCache(page_size=1)
    first, second = cache.match(b"", ids(1, 2)).handle, cache.match(b"", ids(1, 2)).handle
    cache.lock(first)
    cache.lock(second)
    first = cache.insert(b"", first, ids(1, 2), [0, 1])
    second = cache.insert(b"", second, ids(1, 2), [2, 3])
    assert cache.path_pages(second) == [0, 1]
    assert len(cache.check([first, second])) == 2


def test_eviction_takes_the_least_recently_used_leaf_first() -> None:
    cache = PrefixCache(page_size=1)
    put(cache, ids(1, 2), [0, 1])
    put(cache, ids(1, 3), [0, 2])
    put(cache, ids(4), [3])
    cache.match(b"", ids(1, 2))
    assert cache.evict(1) == [2]
    assert cache.evict(1) == [3]
    assert cache.evict(1) == [1]
    assert cache.evict(1) == [0]
    assert cache.evict(1) == []


def test_discard_removes_only_what_nobody_else_uses() -> None:
    cache = PrefixCache(page_size=1)
    put(cache, ids(1, 2, 3), [0, 1, 2])
    put(cache, ids(1, 4), [0, 5])
    handle = cache.match(b"", ids(1, 2, 3)).handle
    assert sorted(cache.discard(handle)) == [1, 2]
    assert cache.match(b"", ids(1, 4)).pages == [0, 5]


def test_unlocking_twice_is_an_error() -> None:
    cache = PrefixCache(page_size=1)
    put(cache, ids(1), [0])
    with pytest.raises(AssertionError, match="unlocked twice"):
        cache.unlock(cache.match(b"", ids(1)).handle)


def test_a_popular_prefix_does_not_grow_the_heap() -> None:
    cache = PrefixCache(page_size=1)
    put(cache, ids(1, 2, 3), [0, 1, 2])
    for _ in range(10_000):
        handle = cache.match(b"", ids(1, 2, 3)).handle
        cache.lock(handle)
        cache.unlock(handle)
    assert len(cache.candidates) < 200
    assert sorted(cache.evict(3)) == [0, 1, 2]


def test_a_prefix_of_one_namespace_is_not_found_in_another() -> None:
    cache = PrefixCache(page_size=2)
    for number, namespace in enumerate((b"", b"a", b"b")):
        put(cache, ids(1, 2, 3, 4, 5, 6), [10 * number, 10 * number + 1, 10 * number + 2], namespace)
        put(cache, ids(1, 2, 3, 4, 8, 8), [10 * number, 10 * number + 1, 10 * number + 3], namespace)
    assert len(cache.check([])) == 12
    for number, namespace in enumerate((b"", b"a", b"b")):
        assert cache.match(namespace, ids(1, 2, 3, 4)).pages == [10 * number, 10 * number + 1]
        assert cache.match_len(namespace, ids(1, 2, 3, 4, 8, 8)) == 6
    assert cache.match(b"c", ids(1, 2)).pages == []
    assert cache.match_len(b"ab", ids(1, 2)) == cache.match_len(b"a", ids()) == 0
    assert len(cache.check([])) == 12


def test_no_namespace_looks_like_a_page_of_another() -> None:
    cache = PrefixCache(page_size=2)
    page = ids(0x61616161, 0x62626262)
    put(cache, page, [0])
    put(cache, page, [1], b"aaaabbbb")
    assert cache.match(b"aaaabbbb", ids()).pages == []
    assert cache.match(b"aaaabbbb", ids(1)).pages == []
    assert cache.match(b"aaaabbbb", page).pages == [1]
    assert cache.match(b"", ids(*page, *page)).pages == [0]


def test_eviction_is_one_for_all_namespaces_and_leaves_nothing_of_them() -> None:
    cache = PrefixCache(page_size=1)
    for number in range(1000):
        put(cache, ids(1, number), [2 * number, 2 * number + 1], b"tenant %d" % number)
    cache.match(b"tenant 0", ids(1, 0))
    assert cache.evict(2) == [2, 3], "tenant 1 is now the least recently used"
    assert len(cache.evict(cache.num_evictable)) == 1998
    assert cache.nodes()[0].children == {}
    assert cache.check([]) == []


@pytest.mark.parametrize("page_size", [1, 3])
def test_against_a_dictionary_of_prefixes(page_size: int) -> None:
    rng = np.random.default_rng(0)
    cache = PrefixCache(page_size)
    known: dict[tuple[bytes, bytes], int] = {}
    next_page = 0
    for _ in range(500):
        tokens, salt = rng.integers(0, 3, rng.integers(1, 12)).astype(np.int32), (b"a", b"b")[rng.integers(2)]
        expected = []
        for end in range(page_size, len(tokens) + 1, page_size):
            page = known.get((salt, tokens[:end].tobytes()))
            if page is None:
                break
            expected.append(page)
        assert cache.match(salt, tokens).pages == expected
        pages = list(expected)
        while len(pages) < len(tokens) // page_size:
            pages.append(next_page)
            next_page += 1
            known[salt, tokens[: len(pages) * page_size].tobytes()] = pages[-1]
        put(cache, tokens, pages, salt)
        assert sorted(cache.check([])) == sorted(known.values())

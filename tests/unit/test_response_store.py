"""What is kept of responses: by whom it is found, and what goes when there is too much."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from typing import Any

import pytest

from minisgl.errors import RequestError
from minisgl.server.bodies.responses import ResponsesRequest, ResponseStore, parse_responses


def response(number: int, text: str = "") -> dict[str, Any]:
    part = {"type": "output_text", "text": text}
    item = {"id": f"msg_{number}", "type": "message", "role": "assistant", "content": [part]}
    return {"id": f"resp_{number}", "output": [item]}


def found(store: ResponseStore, owner: str = "") -> list[int]:
    numbers = []
    for number in range(50):
        try:
            store.get(owner, f"resp_{number}")
            numbers.append(number)
        except RequestError:
            assert store.output(owner, f"msg_{number}") == []
    return numbers


def test_what_was_asked_for_last_stays() -> None:
    store = ResponseStore(max_entries=3)
    for number in range(3):
        store.put("", response(number), [{"id": "a"}])
    assert store.get("", "resp_0") == (response(0), [{"id": "a"}])
    store.put("", response(3), [])
    assert found(store) == [0, 2, 3]
    store.delete("", "resp_2")
    assert found(store) == [0, 3]
    assert store.output("", "msg_3") == response(3)["output"]


def test_bytes_are_bounded() -> None:
    store = ResponseStore(max_bytes=10_000)
    for number in range(50):
        store.put("", response(number, "ü" * 500), [])
    assert 5 <= len(found(store)) <= 9
    store.put("", response(50, "x" * 20_000), [])  # more than there is room for
    assert found(store) == []
    store.put("", response(1), [])
    assert found(store) == [1]


def test_nobody_finds_another_s() -> None:
    store = ResponseStore()
    store.put("a", response(1), [])
    assert (found(store, "a"), found(store, "b"), found(store)) == ([1], [], [])
    with pytest.raises(RequestError) as refused:
        store.delete("b", "resp_1")
    assert (refused.value.status, refused.value.code) == (404, "response_not_found")
    with pytest.raises(RequestError) as refused:
        parse(store, "b", previous_response_id="resp_1")
    assert (refused.value.status, refused.value.code) == (404, "previous_response_not_found")
    assert refused.value.param == "previous_response_id"
    assert parse(store, "b", input=[{"role": "user", "content": "x"}, REFERENCE]).items[1:] == []


REFERENCE = {"type": "item_reference", "id": "msg_1"}


def parse(store: ResponseStore, owner: str, **body: Any) -> ResponsesRequest:
    return parse_responses(json.dumps({"input": "hello", **body}).encode(), {}, None, store, owner)


def said(parsed: ResponsesRequest) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in parsed.prompts[0].messages]  # type: ignore[union-attr]


def test_a_conversation_goes_on_from_a_response() -> None:
    store = ResponseStore()
    first = parse(store, "", instructions="Be brief.")
    store.put("", response(1, "hi"), first.items)
    second = parse(store, "", previous_response_id="resp_1", input=[{"role": "user", "content": "more"}])
    assert said(second) == [("user", "hello"), ("assistant", "hi"), ("user", "more")]  # instructions are of one request
    store.put("", response(2, "yes"), second.items)
    third = parse(store, "", previous_response_id="resp_2", instructions="Be long.")
    assert said(third) == [("system", "Be long."), *said(second), ("assistant", "yes"), ("user", "hello")]
    assert all(item["id"] for item in third.items)
    with pytest.raises(RequestError) as refused:
        parse(store, "", previous_response_id="resp_1", input=[{"role": "king", "content": "x"}])
    assert refused.value.param == "input[0].role"


def test_references_stand_for_what_we_put_out() -> None:
    store = ResponseStore()
    store.put("", response(1, "hi"), [])
    asked = {"role": "user", "content": "x"}
    gone = {"type": "item_reference", "id": "msg_9"}
    parsed = parse(store, "", input=[asked, REFERENCE, gone, asked, REFERENCE])
    assert said(parsed) == [("user", "x"), ("assistant", "hi"), ("user", "x"), ("assistant", "hi")]


def test_threads_share_a_store() -> None:
    """Some put responses into it while others ask for them, and it has to forget: nothing is counted twice."""
    store, failed = ResponseStore(max_entries=8, max_bytes=4000), list[BaseException]()

    def use(thread: int) -> None:
        try:
            for index in range(1500):
                name = f"resp_{thread}_{index}"
                store.put("", {"id": name, "output": [{"id": f"msg_{name}"}]}, [{"text": "x" * (index % 300)}])
                with contextlib.suppress(RequestError):
                    store.get("", f"resp_{1 - thread}_{index}")
                if index % 3 == 0:
                    with contextlib.suppress(RequestError):
                        store.delete("", name)
        except BaseException as error:
            failed.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=use, args=(thread,)) for thread in range(2)]
        for one in threads:
            one.start()
        for one in threads:
            one.join(60)
    finally:
        sys.setswitchinterval(interval)
    assert not failed
    assert store._num_bytes == sum(map(len, store._entries.values()))
    assert len(store._of_item) == len(store._entries)

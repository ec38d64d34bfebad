"""What /v1/responses has answered, for clients that come back with its id."""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import Any

from minisgl.errors import RequestError
from minisgl.utils.json_line import dump_json

MAX_ENTRIES = 1024
MAX_BYTES = 64 * 2**20

Item = dict[str, Any]


class ResponseStore:
    """Responses and the conversations that they answer, as JSON: its bytes are what it costs. When there are too many,
    those go that nobody has asked for the longest. owner: whose they are; nobody else finds them."""

    def __init__(self, max_entries: int = MAX_ENTRIES, max_bytes: int = MAX_BYTES) -> None:
        self._max_entries, self._max_bytes = max_entries, max_bytes
        self._entries: OrderedDict[tuple[str, str], bytes] = OrderedDict()
        self._of_item: dict[tuple[str, str], str] = {}  # the id of the response that put it out
        self._num_bytes = 0

    def put(self, owner: str, response: dict[str, Any], items: list[Item]) -> None:
        data = self._entries[owner, response["id"]] = dump_json([response, items])
        self._of_item |= {(owner, item["id"]): response["id"] for item in response["output"]}
        self._num_bytes += len(data)
        while len(self._entries) > self._max_entries or self._num_bytes > self._max_bytes:
            self._forget(next(iter(self._entries)))

    def get(self, owner: str, response_id: str, *, previous: bool = False) -> tuple[dict[str, Any], list[Item]]:
        """The response, and the items that it answers. previous: a client goes on from it.

        Raises: RequestError when it is not there (any more).
        """
        data = self._entries.get((owner, response_id))
        if data is None:
            what, param = ("Previous response", "previous_response_id") if previous else ("Response", "response_id")
            code = f"{what.lower().replace(' ', '_')}_not_found"
            raise RequestError(f"{what} with id {response_id[:99]!r} not found.", param=param, code=code, status=404)
        self._entries.move_to_end((owner, response_id))
        response, items = json.loads(data)
        return response, items

    def output(self, owner: str, item_id: str) -> list[Item]:
        """What was put out together with the item of this id; nothing if that is not there (any more)."""
        response_id = self._of_item.get((owner, item_id))
        return [] if response_id is None else self.get(owner, response_id)[0]["output"]

    def delete(self, owner: str, response_id: str) -> None:
        """Raises: RequestError when it is not there."""
        self.get(owner, response_id)
        self._forget((owner, response_id))

    def _forget(self, key: tuple[str, str]) -> None:
        data = self._entries.pop(key)
        self._num_bytes -= len(data)
        for item in json.loads(data)[0]["output"]:
            del self._of_item[key[0], item["id"]]

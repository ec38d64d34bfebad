"""Routes of what /v1/responses has kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response

from minisgl.errors import RequestError
from minisgl.server.access import owner_of
from minisgl.server.bodies.responses import Item, ResponseStore
from minisgl.server.bodies.strict import shown
from minisgl.server.errors import json_response

MAX_PAGE = 100  # items


def add_stored(app: FastAPI, store: ResponseStore) -> None:
    """Of the responses in the store: whoever asks finds their own."""
    path = "/v1/responses/{response_id}"

    @app.get(path)
    async def retrieve(request: Request, response_id: str) -> Response:
        """A response that was stored."""
        if request.query_params.get("stream", "false").lower() == "true":
            raise RequestError("stream: what is stored is not streamed again", param="stream")
        return json_response(store.get(owner_of(request), response_id)[0])

    @app.delete(path)
    async def delete(request: Request, response_id: str) -> Response:
        """Forget a response."""
        store.delete(owner_of(request), response_id)
        return json_response({"id": response_id, "object": "response", "deleted": True})

    @app.get(f"{path}/input_items")
    async def input_items(request: Request, response_id: str) -> Response:
        """The items that it answers, the last one first."""
        return json_response(_page(store.get(owner_of(request), response_id)[1], request.query_params))

    @app.post(f"{path}/cancel")
    async def cancel(request: Request, response_id: str) -> Response:
        """Refused: none is made in the background. `/abort_request` ends one that is under way."""
        store.get(owner_of(request), response_id)
        raise RequestError("only a response that is made in the background can be cancelled", param="response_id")


def _page(items: list[Item], query: Mapping[str, str]) -> dict[str, Any]:
    order, limit, after = query.get("order", "desc"), query.get("limit", "20"), query.get("after")
    if order not in ("asc", "desc"):
        raise RequestError(f"order must be asc or desc, not {shown(order)!r}", param="order")
    if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:9]) <= MAX_PAGE):
        raise RequestError(f"limit must be a whole number from 1 to {MAX_PAGE}, not {shown(limit)!r}", param="limit")
    items = items if order == "asc" else items[::-1]
    ids = [item["id"] for item in items]
    first = ids.index(after) + 1 if after in ids else 0
    page = items[first : first + int(limit)]
    ends = [item["id"] for item in page] or [None]
    has_more = first + len(page) < len(items)
    return {"object": "list", "data": page, "first_id": ends[0], "last_id": ends[-1], "has_more": has_more}

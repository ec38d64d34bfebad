"""POST /v1/responses: what clients may send, turned into the chat that it means.

A conversation is sent as a whole each time, or goes on from a response that `ResponseStore` keeps. Items of `input` are
made the messages of a chat; what we put out may come back as it is.
"""

import json
import uuid
from collections import OrderedDict
from dataclasses import dataclass, field, fields
from reprlib import repr as quoted
from threading import RLock

from pydantic import Field

from minisgl.errors import RequestError
from minisgl.server.bodies.chat import GenerationRequest, chat_request
from minisgl.server.bodies.content import Describe, functions_of, kept_as_text, text_of, thought_of
from minisgl.server.bodies.fields import KEYS, OBJECTS, SCHEMAS, Body, Items, MaxTokens, Object, Reading, load, optional
from minisgl.server.bodies.sampling import Defaults, SamplingFields
from minisgl.server.errors import dump_json, refuse_unless

Item = Object
MAX_SENT_BACK, MAX_ENTRIES, MAX_BYTES = 64 << 10, 1024, 64 * 2**20
_LOGPROBS = "message.output_text.logprobs"
_SAME = ("model", "stream", "tool_choice", "parallel_tool_calls", "chat_template_kwargs", "reasoning")  # as in a chat
_KINDS = "message, reasoning, function_call, function_call_output, custom_tool_call, custom_tool_call_output"
_ROLES = ("user", "assistant", "system", "developer")


class ResponsesBody(Body, SamplingFields):
    """POST /v1/responses."""

    model: str | None = None
    input: str | Items[Object] = Field(json_schema_extra={"minItems": 1})
    instructions: str | None = None
    max_output_tokens: MaxTokens | None = optional("Most tokens of the output.")
    stream: bool | None = None
    text: Object | None = optional("What the output looks like.", **SCHEMAS["text"])
    tools: Items[Object] | None = None
    tool_choice: str | Object | None = None
    metadata: Object | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Object | None = None
    chat_template_kwargs: Object | None = None
    previous_response_id: str | None = optional("The conversation goes on from there; `input` is what is new.")
    store: bool | None = optional("false: the response is not kept.")
    include: Items[str] | None = optional("Without effect: nothing is added.", items={"not": {"const": _LOGPROBS}})
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


@dataclass(frozen=True, slots=True)
class ResponsesRequest(GenerationRequest):
    """Some of the body comes back in the answer. items: of the whole conversation."""

    body: ResponsesBody = field(kw_only=True)
    items: list[Item] = field(kw_only=True)

    @property
    def tools_used(self) -> list[Object]:
        """The tools that the model knows of."""
        typed = ({"type": "function", **tool} for tool in self.body.tools or ())
        return [tool for tool in typed if tool["type"] in tuple(_FUNCTIONS)]


def parse_responses(
    data: bytes,
    defaults: Defaults,
    reading: Reading | None = None,
    store: "ResponseStore | None" = None,
    owner: str = "",
) -> ResponsesRequest:
    """store, owner: where `previous_response_id` is. Raises: RequestError naming the field at fault."""
    reading = reading or Reading()
    body = load(ResponsesBody, data, reading)
    refuse_unless(_LOGPROBS not in (body.include or ()), f"include: {_LOGPROBS} is not supported", "include")
    for name in ("metadata", "user", "safety_identifier", "prompt_cache_key"):  # which come back with each answer
        is_short = len(dump_json(getattr(body, name))) <= MAX_SENT_BACK
        refuse_unless(is_short, f"{name} must have at most {MAX_SENT_BACK} bytes of JSON", name)
    items = _conversation(body, store or ResponseStore(), owner)
    form = (body.text or {}).get("format")
    if isinstance(form, dict) and form.get("type") == "json_schema":  # in a chat, its schema has an object of its own
        form = {"type": "json_schema", "json_schema": {key: form[key] for key in form if key != "type"}}
    told = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    chat = {
        **{name: getattr(body, name) for name in (*SamplingFields.model_fields, *_SAME)},
        "messages": told + messages_of(items),
        "max_completion_tokens": body.max_output_tokens,
        "response_format": form,
        "tools": functions_of(body.tools or (), _FUNCTIONS, reading, OBJECTS["flat_tool"]),
    }
    parsed = chat_request(chat, defaults, KEYS["ResponsesBody"])
    same = {part.name: getattr(parsed, part.name) for part in fields(parsed)}
    return ResponsesRequest(**same, body=body, items=items)


def _conversation(body: ResponsesBody, store: "ResponseStore", owner: str) -> list[Item]:
    """All items up to the answer, with what they refer to in its place; a reference to what is not kept is left out."""
    given = body.input if isinstance(body.input, list) else [{"role": "user", "content": body.input}]
    refuse_unless(given, "input must not be empty", "input")
    items: list[Item] = []
    if body.previous_response_id is not None:
        messages_of(given)  # what is wrong with them is told by their own numbers
        response, items = store.get(owner, body.previous_response_id, previous=True)
        items += response["output"]
    known: dict[str, Item] = {}
    for item in given:
        kind, item_id, content = item.get("type", "message"), item.get("id"), item.get("content")
        item_id = item_id if item_id and isinstance(item_id, str) else f"item_{uuid.uuid4().hex}"
        if kind == "item_reference":
            if item_id not in known:
                known |= {item["id"]: item for item in store.output(owner, item_id)}
            items += [known[item_id]] if item_id in known else []
            continue
        if kind == "message" and isinstance(content, str):
            text = "output_text" if item.get("role") == "assistant" else "input_text"
            item = {**item, "content": [{"type": text, "text": content}]}
        items.append({**item, "type": kind, "id": item_id})
    return items


def _function(tool: Object) -> Object:
    return {name: tool[name] for name in OBJECTS["function"].known if name in tool}


# What takes free text has one string.
_FREE = {"parameters": {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}}
_FUNCTIONS: dict[str, Describe] = {"function": _function, "custom": lambda tool: _function(tool) | _FREE}


def messages_of(items: list[Item]) -> list[Object]:
    """An assistant's reasoning, text and calls are one message of a chat, and several items here.

    Raises: RequestError naming the field at fault.
    """
    messages: list[Object] = []
    for index, item in enumerate(items):
        where, kind = f"input[{index}]", item.get("type", "message")
        is_known = isinstance(kind, str) and kind in OBJECTS["item"].kinds
        refuse_unless(is_known, f"{where}.type must be one of {_KINDS}, not {quoted(kind)}", f"{where}.type")
        said = messages[-1] if messages and messages[-1]["role"] == "assistant" else None  # and nobody since
        if kind == "message":
            message = _message(item, where)
            if message["role"] == "assistant" and said and ("tool_calls" in said or not said["content"]):
                said["content"] += message["content"]
            else:
                messages.append(message)
        elif kind == "reasoning":
            if thought := thought_of(item.get("content")) or thought_of(item.get("summary")):
                messages.append({"role": "assistant", "content": [], "reasoning_content": thought})
        elif kind in ("function_call", "custom_tool_call"):
            if said is None:
                messages.append(said := {"role": "assistant", "content": []})
            said.setdefault("tool_calls", []).append(_call(item, f"{where}.name"))
        elif kind in ("function_call_output", "custom_tool_call_output"):
            text = text_of(kept_as_text(item.get("output"), parts=False), f"{where}.output")
            result = {"role": "tool", "tool_call_id": item.get("call_id"), "content": text, "name": item.get("name")}
            messages.append(result)
        # the others came from tools that are not ours, and say nothing to this model
    return messages


def _message(item: Item, where: str) -> Object:
    role, content = item.get("role"), item.get("content")
    if role not in _ROLES:
        where = f"{where}.role"
        raise RequestError(f"{where} must be one of {', '.join(_ROLES)}, not {quoted(role)}", param=where)
    is_said = role == "assistant"
    text = text_of(kept_as_text(content) if is_said else content, f"{where}.content", [] if is_said else None)
    return {"role": role, "content": [text] if text else []}


def _call(item: Item, where: str) -> Object:
    refuse_unless(isinstance(item.get("name"), str), f"{where} must be a string", where)
    arguments = item.get("arguments", item.get("input"))
    if item["type"] == "custom_tool_call":  # a function of one string, as the model is told
        arguments = {"input": item.get("input")}
    function = {"name": item["name"], "arguments": arguments}
    return {"id": item.get("call_id", item.get("id")), "type": "function", "function": function}


class ResponseStore:
    """Responses and the conversations that they answer, as JSON: its bytes are what it costs. When there are too many,
    those go that nobody has asked for the longest. owner: whose they are; nobody else finds them. Threads share it."""

    def __init__(self, max_entries: int = MAX_ENTRIES, max_bytes: int = MAX_BYTES) -> None:
        self._max_entries, self._max_bytes, self._lock = max_entries, max_bytes, RLock()
        self._entries: OrderedDict[tuple[str, str], bytes] = OrderedDict()
        self._of_item: dict[tuple[str, str], str] = {}  # the id of the response that put it out
        self._num_bytes = 0

    def put(self, owner: str, response: Object, items: list[Item]) -> None:
        data = dump_json([response, items])
        with self._lock:
            self._entries[owner, response["id"]] = data
            self._of_item |= {(owner, item["id"]): response["id"] for item in response["output"]}
            self._num_bytes += len(data)
            while len(self._entries) > self._max_entries or self._num_bytes > self._max_bytes:
                self._forget(next(iter(self._entries)))

    def get(self, owner: str, response_id: str, *, previous: bool = False) -> tuple[Object, list[Item]]:
        """The response, and the items that it answers. previous: a client goes on from it.

        Raises: RequestError when it is not there (any more).
        """
        with self._lock:
            if (data := self._entries.get((owner, response_id))) is not None:
                self._entries.move_to_end((owner, response_id))
        if data is None:
            what, param = ("Previous response", "previous_response_id") if previous else ("Response", "response_id")
            code = f"{what.lower().replace(' ', '_')}_not_found"
            raise RequestError(f"{what} with id {response_id[:99]!r} not found.", param=param, code=code, status=404)
        response, items = json.loads(data)
        return response, items

    def output(self, owner: str, item_id: str) -> list[Item]:
        """What was put out together with the item of this id; nothing if that is not there (any more)."""
        response_id = self._of_item.get((owner, item_id))
        return [] if response_id is None else self.get(owner, response_id)[0]["output"]

    def delete(self, owner: str, response_id: str) -> None:
        """Raises: RequestError when it is not there."""
        with self._lock:
            self.get(owner, response_id)
            self._forget((owner, response_id))

    def _forget(self, key: tuple[str, str]) -> None:
        self._num_bytes -= len(data := self._entries.pop(key))
        for item in json.loads(data)[0]["output"]:
            del self._of_item[key[0], item["id"]]

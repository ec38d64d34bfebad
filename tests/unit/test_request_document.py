"""The list of fields in the documents: made of the code, and complete beside the client packages' own types."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

from minisgl.page.routes import DOCUMENT
from minisgl.server.bodies.fields import OBJECTS, Fields
from tools import openapi
from tools.request_fields import ALL_BODIES, TARGET, document

BODIES = {model.__name__: fields for model, fields in ALL_BODIES.items()}
BLOCK = BODIES["MessagesBody"].nested["messages"].nested["content"]


def types_of_clients() -> Iterator[tuple[Any, Fields]]:
    """What the packages name, and what we do. They are imported here: in seconds, which no other process of tests needs
    to spend."""
    import anthropic.types as anthropic
    import openai.types.chat as chat
    import openai.types.responses as responses
    from anthropic.types import message_create_params
    from openai.types import completion_create_params
    from openai.types.chat import completion_create_params as chat_create_params
    from openai.types.responses import response_create_params, response_input_item_param
    from openai.types.shared_params import FunctionDefinition, Reasoning

    yield from (
        (chat_create_params.CompletionCreateParamsBase, BODIES["ChatBody"]),
        (completion_create_params.CompletionCreateParamsBase, BODIES["CompletionBody"]),
        (response_create_params.ResponseCreateParamsBase, BODIES["ResponsesBody"]),
        (message_create_params.MessageCreateParamsBase, BODIES["MessagesBody"]),
        (chat.ChatCompletionContentPartTextParam, OBJECTS["part"]),
        (chat.ChatCompletionContentPartRefusalParam, OBJECTS["part"]),
        (chat.ChatCompletionMessageFunctionToolCallParam, OBJECTS["call"]),
        (chat.ChatCompletionMessageCustomToolCallParam, OBJECTS["call"]),
        (chat.ChatCompletionFunctionToolParam, OBJECTS["tool"]),
        (FunctionDefinition, OBJECTS["function"]),
        (chat.ChatCompletionStreamOptionsParam, OBJECTS["stream_options"]),
        (Reasoning, OBJECTS["reasoning"]),
        (responses.ResponseTextConfigParam, OBJECTS["text"]),
        (responses.FunctionToolParam, OBJECTS["flat_tool"]),
        (responses.ResponseOutputTextParam, OBJECTS["part"]),
        (responses.ResponseInputTextParam, OBJECTS["part"]),
        *(
            (kind, BLOCK)
            for kind in (anthropic.TextBlockParam, anthropic.ThinkingBlockParam, anthropic.ToolUseBlockParam)
        ),
        (anthropic.ToolResultBlockParam, BLOCK),
        (anthropic.ToolParam, BODIES["MessagesBody"].nested["tools"]),
    )
    for message in get_args(chat.ChatCompletionMessageParam):
        (role,) = get_args(get_type_hints(message)["role"])
        yield message, OBJECTS["message"].of({"role": role})
    for item in get_args(response_input_item_param.ResponseInputItemParam):
        kinds = [kind for kind in get_args(get_type_hints(item)["type"]) if isinstance(kind, str)]
        fields = OBJECTS["item"].kinds.get(kinds[0]) if kinds else None
        if fields is not None and not fields.left_out:
            yield item, fields


def test_the_list_is_up_to_date() -> None:
    """`python tools/request_fields.py` writes it."""
    assert TARGET.read_text(encoding="utf-8") == document()


def test_no_field_of_the_packages_is_unknown() -> None:
    """When a package has a new one, somebody has to decide what becomes of it."""
    pairs = [*types_of_clients()]
    assert len(pairs) > 30
    for kind, known in pairs:
        named = {*known.known, *known.refused, *known.ignored, *known.others}
        assert not (set(kind.__annotations__) | set(get_type_hints(kind))) - named, kind.__name__


def test_each_field_is_in_one_list() -> None:
    for fields in (*BODIES.values(), *OBJECTS.values()):
        assert not set(fields.known) & {*fields.refused, *fields.ignored, *fields.others}
        assert not set(fields.refused) & set(fields.ignored)
        assert set(fields.others.values()) & set(fields.known) or not fields.others


def test_the_openapi_document_is_current() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == openapi.text(), "run python -m tools.openapi"

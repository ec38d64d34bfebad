"""What chats say of tools and reasoning: the fields of a request, and of messages in both directions.

Everything here ends up in a chat template, so it must be data that templates and messages between processes can carry.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as quoted
from typing import Any, Literal

from pydantic import Field

from minisgl.errors import RequestError
from minisgl.message.codec import carried as can_be_carried
from minisgl.parser.forced import calls_form
from minisgl.server.bodies.fields import Fields, Reading
from minisgl.server.bodies.strict import Body, shown

Describe = Callable[[dict[str, Any]], dict[str, Any]]

MAX_TOOLS = 512
_NAME = re.compile(r"[\w.:/-]{1,128}")
_CHOICES = {"none": "none", "auto": "auto", "required": "required", "any": "required"}
# What the server says itself when it renders a template: no client may.
_RESERVED_KWARGS = """messages conversation tools documents chat_template add_generation_prompt continue_final_message
    tokenize tokenizer_kwargs padding truncation max_length return_tensors return_dict return_assistant_tokens_mask
    sanitize_control_tokens self"""


class FunctionSpec(Body):
    """A function that the client has. `parameters` is the JSON schema of its arguments.

    strict: honoured where a grammar has the calls, which follows the schema of forced ones always.
    """

    name: str = Field(json_schema_extra={"pattern": f"^{_NAME.pattern}$"})
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: FunctionSpec


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of a request, and how the model may use them.

    required: it must call one. allowed: only these may be called; None: all.
    """

    tools: tuple[dict[str, Any], ...]
    required: bool = False
    allowed: frozenset[str] | None = None
    parallel: bool = True

    @property
    def functions(self) -> dict[str, Any]:
        """The functions that may be called, and the schemas of their arguments."""
        functions = (tool["function"] for tool in self.tools)
        return {f["name"]: f.get("parameters") for f in functions if self.allowed is None or f["name"] in self.allowed}

    @property
    def shown(self) -> list[dict[str, Any]]:
        """The tools of which the model knows. Where it is free, it must not know of those that it may not call."""
        return [tool for tool in self.tools if self.required or tool["function"]["name"] in self.functions]

    def form(self, parser: str | None) -> Any:
        """What calls look like, in the format of `parser`."""
        return calls_form(parser, self.tools, self.functions, parallel=self.parallel, required=self.required)


def tool_use(tools: list[Tool] | None, choice: str | dict[str, Any] | None, parallel: bool | None) -> ToolUse | None:
    """None when the model is not to know of tools. Raises: RequestError naming the field at fault."""
    described = tuple(_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools or ()))
    names = [tool["function"]["name"] for tool in described]
    if len(described) > MAX_TOOLS:
        raise RequestError(f"tools must hold at most {MAX_TOOLS} tools, not {len(described)}", param="tools")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RequestError(f"tools: there are two functions with the name {twice!r}", param="tools")
    mode, allowed, single = _chosen(choice, names)
    if mode == "required" and not described:
        raise RequestError("tool_choice asks for a call, but there are no tools", param="tool_choice")
    unknown = next((name for name in allowed or () if name not in names), None)
    if unknown is not None:
        raise RequestError(f"tool_choice: there is no function {quoted(unknown)} in tools", param="tool_choice")
    if not described or mode == "none":
        return None
    return ToolUse(described, mode == "required", allowed, parallel is not False and not single)


def _chosen(choice: Any, names: Collection[str]) -> tuple[str, frozenset[str] | None, bool]:
    """What `tool_choice` asks for, in any form that clients have for it: how free the model is, of which functions
    (None: all), and whether there is one call only."""
    choice = "auto" if choice is None else choice
    kind = choice.get("type") if isinstance(choice, dict) else choice
    single = isinstance(choice, dict) and choice.get("disable_parallel_tool_use") is True  # Anthropic's
    if isinstance(kind, str) and kind in _CHOICES:
        return _CHOICES[kind], None, single
    if isinstance(choice, str) and choice in names:
        return "required", frozenset({choice}), True
    if isinstance(choice, dict) and kind == "allowed_tools":
        inner = choice.get("allowed_tools", choice)  # the Responses API has no object within
        tools = inner.get("tools") if isinstance(inner, dict) else None
        names_in = [_name(tool) for tool in tools] if isinstance(tools, list) else []
        allowed = [name for name in names_in if isinstance(name, str)]  # tools of other types are not ours
        mode = inner.get("mode") or "auto" if isinstance(inner, dict) else None
        if allowed and mode in ("auto", "required"):
            return mode, frozenset(allowed), single
    elif kind in ("function", "tool", "custom", None) and isinstance(name := _name(choice), str):
        return "required", frozenset({name}), True
    raise RequestError(
        f"tool_choice must be {', '.join(_CHOICES)}, name a function, or be of type allowed_tools, with mode and tools",
        param="tool_choice",
    )


def _name(value: Any) -> Any:
    """Of the function that an object names: by itself, or in an object `function` or `custom`."""
    inner = value.get("function", value.get("custom", value)) if isinstance(value, dict) else None
    return inner.get("name") if isinstance(inner, dict) else inner


def _tool(tool: Tool, where: str) -> dict[str, Any]:
    """As templates expect it."""
    function, named = tool.function, f"{where}.function.name"
    if not _NAME.fullmatch(function.name):
        raise RequestError(f"{named} must have 1 to 128 letters, digits or _ - . : /", param=named)
    carried(function.parameters, f"{where}.function.parameters")
    return {"type": "function", "function": {key: value for key, value in function if value is not None}}


def template_kwargs(given: dict[str, Any] | None) -> dict[str, Any]:
    """`chat_template_kwargs`. Raises: RequestError when a client would take the server's place."""
    reserved = sorted({*_RESERVED_KWARGS.split()}.intersection(given or {}))
    if reserved:
        raise RequestError(f"chat_template_kwargs must not have {reserved[0]}", param="chat_template_kwargs")
    return carried(given or {}, "chat_template_kwargs")


def carried(value: Any, where: str) -> Any:
    """The value itself. Raises: RequestError when it has a number that messages between processes cannot carry."""
    if not can_be_carried(value):
        raise RequestError(f"{where} has a number that is too large", param=where)
    return value


def functions_of(
    tools: Sequence[dict[str, Any]], kinds: Mapping[str, Describe], reading: Reading, known: Fields
) -> list[dict[str, Any]]:
    """Tools of another API as chats have them. kinds: what makes functions of them; without a kind, a tool is of the
    first. Other kinds are run by another server, or known to another model: they are ignored."""
    functions = []
    for index, tool in enumerate(tools):
        kind = tool.get("type", next(iter(kinds)))
        if isinstance(kind, str) and kind in kinds:
            functions.append({"type": "function", "function": kinds[kind](tool)})
        else:
            reading.ignore(f"tools[{index}].{shown(str(kind))}", known)
    return functions

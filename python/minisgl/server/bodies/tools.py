"""What chats say of tools: the fields of a request, whatever API's.

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
from minisgl.server.bodies.strict import Body, Object, at_most, refuse_unless, shown

Describe = Callable[[Object], Object]

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
    parameters: Object | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: FunctionSpec


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of a request, and how the model may use them.

    required: it must call one. allowed: only these may be called; None: all.
    """

    tools: tuple[Object, ...]
    required: bool = False
    allowed: frozenset[str] | None = None
    parallel: bool = True

    @property
    def functions(self) -> Object:
        """The functions that may be called, and the schemas of their arguments."""
        functions = (tool["function"] for tool in self.tools)
        return {f["name"]: f.get("parameters") for f in functions if self.allowed is None or f["name"] in self.allowed}

    @property
    def shown(self) -> list[Object]:
        """The tools of which the model knows. Where it is free, it must not know of those that it may not call."""
        return [tool for tool in self.tools if self.required or tool["function"]["name"] in self.functions]

    def form(self, parser: str | None) -> Any:
        """What calls look like, in the format of `parser`."""
        return calls_form(parser, self.tools, self.functions, parallel=self.parallel, required=self.required)


def tool_use(tools: Sequence[Tool], choice: str | Object | None, parallel: bool | None) -> ToolUse | None:
    """None when the model is not to know of tools. Raises: RequestError naming the field at fault."""
    described = tuple(_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools))
    names = [tool["function"]["name"] for tool in at_most(MAX_TOOLS, "tools", "tools", described)]
    twice = next((name for name in names if names.count(name) > 1), None)
    refuse_unless(twice is None, f"tools: there are two functions with the name {twice!r}", "tools")
    mode, allowed, single = _chosen(choice, names)
    refuse_unless(names or mode != "required", "tool_choice asks for a call, but there are no tools", "tool_choice")
    unknown = next((name for name in allowed or () if name not in names), None)
    refuse_unless(unknown is None, f"tool_choice: there is no function {quoted(unknown)} in tools", "tool_choice")
    if not described or mode == "none":
        return None
    return ToolUse(described, mode == "required", allowed, parallel is not False and not single)


def _chosen(choice: Any, names: Collection[str]) -> tuple[str, frozenset[str] | None, bool]:
    """What `tool_choice` asks for, in any form that clients have for it: how free the model is, of which functions
    (None: all), and whether there is one call only."""
    given = choice if isinstance(choice, dict) else {"type": "auto" if choice is None else choice}
    kind, single = given.get("type"), given.get("disable_parallel_tool_use") is True  # Anthropic's
    if isinstance(kind, str) and kind in _CHOICES:
        return _CHOICES[kind], None, single
    if isinstance(choice, str) and choice in names:
        return "required", frozenset({choice}), True
    if isinstance(choice, dict) and kind == "allowed_tools":
        inner = choice.get("allowed_tools", choice)  # the Responses API has no object within
        inner = inner if isinstance(inner, dict) else {}
        mode, tools = inner.get("mode") or "auto", inner.get("tools")
        found = map(_name, tools if isinstance(tools, list) else ())
        allowed = frozenset(name for name in found if isinstance(name, str))  # tools of other types are not ours
        if allowed and mode in ("auto", "required"):
            return mode, allowed, single
    elif kind in ("function", "tool", "custom", None) and isinstance(name := _name(choice), str):
        return "required", frozenset({name}), True
    expected = f"{', '.join(_CHOICES)}, name a function, or be of type allowed_tools, with mode and tools"
    raise RequestError(f"tool_choice must be {expected}", param="tool_choice")


def _name(value: Any) -> Any:
    """Of the function that an object names: by itself, or in an object `function` or `custom`."""
    inner = value.get("function", value.get("custom", value)) if isinstance(value, dict) else None
    return inner.get("name") if isinstance(inner, dict) else inner


def _tool(tool: Tool, where: str) -> Object:
    """As templates expect it."""
    function, named = tool.function, f"{where}.function.name"
    is_name = _NAME.fullmatch(function.name)
    refuse_unless(is_name, f"{named} must have 1 to 128 letters, digits or _ - . : /", named)
    _carried(function.parameters, f"{where}.function.parameters")
    return {"type": "function", "function": {key: value for key, value in function if value is not None}}


def template_kwargs(given: Object) -> Object:
    """`chat_template_kwargs`. Raises: RequestError when a client would take the server's place."""
    reserved = sorted({*_RESERVED_KWARGS.split()}.intersection(given))
    refuse_unless(not reserved, f"chat_template_kwargs must not have {[*reserved, ''][0]}", "chat_template_kwargs")
    _carried(given, "chat_template_kwargs")
    return given


def _carried(value: Any, where: str) -> None:
    """Raises: RequestError when it has a number that messages between processes cannot carry."""
    refuse_unless(can_be_carried(value), f"{where} has a number that is too large", where)


def functions_of(
    tools: Sequence[Object], kinds: Mapping[str, Describe], reading: Reading, known: Fields
) -> list[Object]:
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

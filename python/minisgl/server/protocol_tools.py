"""What chats say of tools and reasoning: the fields of a request, and of messages in both directions.

Everything here ends up in a chat template, so it must be data that templates and messages between processes can carry.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema

from minisgl.errors import RequestError
from minisgl.parser.forced import ForcedCall, forced_call
from minisgl.server.messages import carried as can_be_carried
from minisgl.server.strict import Body

MAX_TOOLS = 512
_NAME = re.compile(r"[\w.:/-]{1,128}")
_CHOICES = ("none", "auto", "required")
# What the server says itself when it renders a template: no client may.
_RESERVED_KWARGS = frozenset(
    (
        *("messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt"),
        *("continue_final_message", "tokenize", "tokenizer_kwargs", "padding", "truncation", "max_length"),
        *("return_tensors", "return_dict", "return_assistant_tokens_mask"),
    )
)


class FunctionSpec(Body):
    """A function that the client has. `parameters` is the JSON schema of its arguments.

    strict: honoured where a call is forced, which always follows the schema.
    """

    name: str = Field(json_schema_extra={"pattern": f"^{_NAME.pattern}$"})
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: FunctionSpec


_FUNCTION = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}
_NAMED = {
    "type": "object",
    "required": ["type", "function"],
    "properties": {"type": {"const": "function"}, "function": _FUNCTION},
}
ToolChoice = Annotated[str | dict[str, Any], WithJsonSchema({"anyOf": [{"enum": list(_CHOICES)}, _NAMED]})]


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of a request, and how the model may use them.

    required: it must call one; `function`: which one, if the client names it.
    """

    tools: tuple[dict[str, Any], ...]
    required: bool = False
    function: str | None = None
    parallel: bool = True

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool["function"]["name"] for tool in self.tools)

    def forced(self, parser: str | None) -> ForcedCall | None:
        """What the output must look like, in the format of `parser`; None when the model is free to call or not."""
        return forced_call(parser, self.tools, self.function, parallel=self.parallel) if self.required else None


def tool_use(tools: list[Tool] | None, choice: str | dict[str, Any] | None, parallel: bool | None) -> ToolUse | None:
    """None when the model is not to know of tools. Raises: RequestError naming the field at fault."""
    described = tuple(_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools or ()))
    names = [tool["function"]["name"] for tool in described]
    if len(described) > MAX_TOOLS:
        raise RequestError(f"tools must hold at most {MAX_TOOLS} tools, not {len(described)}", param="tools")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise RequestError(f"tools: there are two functions with the name {twice!r}", param="tools")
    function = _named(choice) if isinstance(choice, dict) else None
    if function is None and choice not in (None, *_CHOICES):
        raise RequestError(f"tool_choice must be {', '.join(_CHOICES)}, or name a function", param="tool_choice")
    required = function is not None or choice == "required"
    if required and not described:
        raise RequestError("tool_choice asks for a call, but there are no tools", param="tool_choice")
    if function is not None and function not in names:
        raise RequestError(f"tool_choice: there is no function {function!r} in tools", param="tool_choice")
    if not described or choice == "none":
        return None
    return ToolUse(described, required, function, parallel is not False)


def _named(choice: dict[str, Any]) -> str | None:
    """The function that it names, and nothing else."""
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) and choice == {"type": "function", "function": {"name": name}} else None


def _tool(tool: Tool, where: str) -> dict[str, Any]:
    """As templates expect it."""
    function = tool.function
    if not _NAME.fullmatch(function.name):
        raise RequestError(
            f"{where}.function.name must have 1 to 128 letters, digits or _ - . : /", param=f"{where}.function.name"
        )
    described = {
        "name": function.name,
        "description": function.description,
        "parameters": carried(function.parameters, f"{where}.function.parameters"),
        "strict": function.strict,
    }
    kept = {key: value for key, value in described.items() if value is not None}
    return {"type": "function", "function": kept}


def template_kwargs(given: dict[str, Any] | None) -> dict[str, Any]:
    """`chat_template_kwargs`. Raises: RequestError when a client would take the server's place."""
    reserved = sorted(_RESERVED_KWARGS.intersection(given or {}))
    if reserved:
        raise RequestError(f"chat_template_kwargs must not have {reserved[0]}", param="chat_template_kwargs")
    return carried(given or {}, "chat_template_kwargs")


def carried(value: Any, where: str) -> Any:
    """The value itself. Raises: RequestError when it has a number that messages between processes cannot carry."""
    if not can_be_carried(value):
        raise RequestError(f"{where} has a number that is too large", param=where)
    return value

"""What chats consist of: messages, as templates take them, and the tools of a request, whatever API's.

Everything here ends up in a chat template, so it must be data that templates and messages between processes can carry.
What a model has said is never refused, however it comes back.
"""

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as quoted
from typing import Annotated, Any, Literal

import msgspec
from pydantic import Field, WithJsonSchema
from pydantic_core import from_json

from minisgl.errors import RequestError
from minisgl.parser.tools import calls_form
from minisgl.server.bodies.fields import Body, Fields, Object, Reading
from minisgl.server.errors import at_most, refuse_unless, shown

MAX_MESSAGES = 16384
MAX_TOOLS = 512
_TABLE: Object = msgspec.yaml.decode(Path(__file__).with_suffix(".yaml").read_bytes())
_TEXTS: dict[str, str] = _TABLE["texts"]
_MEDIA: dict[str, str] = _TABLE["media"]
_CHOICES: dict[str, str] = _TABLE["choices"]
_RESERVED = frozenset(_TABLE["reserved_kwargs"].split())
ROLES: list[str] = _TABLE["schema"]["properties"]["role"]["enum"]
Message = Annotated[Object, WithJsonSchema(_TABLE["schema"])]
Describe = Callable[[Object], Object]


def text_of(content: Any, where: str, thoughts: list[str] | None = None) -> str:
    """The text of a message's content, one string or parts. Raises: RequestError naming `where` it is something else.

    Parts follow each other with nothing between them, as in templates that read lists of parts themselves.
    thoughts: given for what a model has said, whose reasoning is added to it. Parts without text are left out there.
    """
    if isinstance(content, str):
        return content
    refuse_unless(isinstance(content, list), f"{where} must be a string or a list of text parts", where)
    return "".join(_part(part, where, f"{where}[{index}]", thoughts) for index, part in enumerate(content))


def kept_as_text(content: Any, *, parts: bool = True) -> Any:
    """What a tool gave or a model said, where a client has kept JSON. parts: of these a list is, whatever it has."""
    taken = isinstance(content, list) and (parts or all(map(_is_part, content)))
    taken = taken or content is None or isinstance(content, str)
    return content or "" if taken else json.dumps(content, ensure_ascii=False)


def _is_part(item: Any) -> bool:
    """Objects of other lists may have a type as well, and be files."""
    if not isinstance(item, dict):
        return isinstance(item, str)
    kind = item.get("type", "text" if item.keys() == {"text"} else None)
    return kind in tuple(_TEXTS) or (kind in tuple(_MEDIA) and (kind in item or kind.startswith("input_")))


def _part(part: Any, where: str, here: str, thoughts: list[str] | None) -> str:
    if isinstance(part, str):
        return part
    given = part if isinstance(part, dict) else {"type": None}
    kind = given.get("type", "text")
    name = kind if isinstance(kind, str) else ""
    field = _TEXTS.get(name, "")
    if field and isinstance(given.get(field), str):
        return str(given[field])
    if thoughts is not None:
        thoughts.append(thought_of(part) if name in _TABLE["thoughts"] else "")
        return ""
    why = f": the type must be one of {', '.join(_TEXTS)}, not {quoted(kind)}"
    if field:
        why = f" must have a {field}"
    elif name in _MEDIA:
        why = f": this model is text-only and cannot take {_MEDIA[name]} ({name})"
    raise RequestError(here + why, param=where)


def thought_of(given: Any) -> str:
    """The text of reasoning, in any of the forms that servers and client libraries have for it."""
    if isinstance(given, list):
        return "".join(map(thought_of, given))
    if isinstance(given, dict):
        return thought_of(next((given[name] for name in _TABLE["in_thoughts"] if given.get(name)), None))
    return given if isinstance(given, str) else ""


def chat_messages(given: list[Object]) -> list[Object]:
    """Each with its text as one string, and what goes with the role. Raises: RequestError naming the field at fault."""
    at_most(MAX_MESSAGES, "messages", "messages", given)
    refuse_unless(given, "messages must not be empty", "messages")
    messages = [_message(message, f"messages[{index}]") for index, message in enumerate(given)]
    waiting: dict[str, None] = {}  # calls that have no result yet
    for index, message in enumerate(messages):
        for number, call in enumerate(message.get("tool_calls", ())):
            call["id"] = call["id"] or f"call_{index}_{number}"
            waiting[call["id"]] = None
        if message["role"] == "tool":
            message["tool_call_id"] = message["tool_call_id"] or next(iter(waiting), f"call_{index}")
            waiting.pop(message["tool_call_id"], None)
    return messages


def _message(given: Object, where: str) -> Object:
    role = given.get("role")
    if role not in ROLES:
        raise RequestError(f"{where}.role must be one of {', '.join(ROLES)}, not {quoted(role)}", param=f"{where}.role")
    template_role, content = _TABLE["template_roles"].get(role, role), given.get("content")
    thoughts: list[str] | None = [] if role == "assistant" else None
    if template_role in ("assistant", "tool"):  # it may be nothing, beside calls and of functions that give nothing
        said = _text(given.get("refusal")) if content is None else content
        content = kept_as_text(said, parts=template_role == "assistant")
    message = {"role": template_role, "content": text_of(content, f"{where}.content", thoughts)}
    if (name := given.get("name")) is not None:
        refuse_unless(isinstance(name, str), f"{where}.name must be a string", f"{where}.name")
        message["name"] = name
    if template_role == "tool":
        message["tool_call_id"] = _text(given.get("tool_call_id"))
    return message if thoughts is None else message | _said(given, thoughts, where)


def _said(given: Object, thoughts: list[str], where: str) -> Object:
    """Reasoning and calls of an assistant's message."""
    fields: Object = {}
    where = f"{where}.tool_calls"
    calls = given.get("tool_calls") or ([given["function_call"]] if given.get("function_call") else [])
    refuse_unless(isinstance(calls, list), f"{where} must be a list", where)
    if calls:
        fields["tool_calls"] = [_call(call, f"{where}[{index}].function.name") for index, call in enumerate(calls)]
    reasoning = next(filter(None, (thought_of(given.get(name)) for name in _TABLE["of_messages"])), "".join(thoughts))
    if reasoning or given.get("reasoning_content") == "":
        fields["reasoning_content"] = reasoning
    return fields


def _call(given: Any, where: str) -> Object:
    """A call: of a function, of a custom tool, or flat as the older API and some libraries have it."""
    call = given if isinstance(given, dict) else {}
    function = call.get("function", call.get("custom", call))
    function = function if isinstance(function, dict) else {}
    refuse_unless(isinstance(function.get("name"), str), f"{where} must be a string", where)
    arguments = next((function[key] for key in ("arguments", "input", "args") if key in function), None)
    called = {"name": function["name"], "arguments": sent(arguments)}
    return {"id": _text(call.get("id")), "type": "function", "function": called}


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def sent(arguments: Any) -> Object | str:
    """A call's arguments as messages between processes carry them: an object if that can be, otherwise their text."""
    value = arguments
    for _ in range(2):  # some clients write the text of JSON as JSON
        if isinstance(value, str):
            try:
                value = from_json(value) if value.strip() else {}
            except ValueError:
                break
    if isinstance(value, dict) and _is_carried(value):
        return value
    return {} if value is None else arguments if isinstance(arguments, str) else json.dumps(arguments)


_NAME = re.compile(r"[\w.:/-]{1,128}")


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
    """The name of a function: that of an object, or of its object `function` or `custom`."""
    inner = value.get("function", value.get("custom", value)) if isinstance(value, dict) else None
    return inner.get("name") if isinstance(inner, dict) else inner


def _tool(tool: Tool, where: str) -> Object:
    """A tool in the form that templates expect."""
    function, named = tool.function, f"{where}.function.name"
    refuse_unless(_NAME.fullmatch(function.name), f"{named} must have 1 to 128 letters, digits or _ - . : /", named)
    _carried(function.parameters, f"{where}.function.parameters")
    return {"type": "function", "function": {key: value for key, value in function if value is not None}}


def template_kwargs(given: Object) -> Object:
    """`chat_template_kwargs`. Raises: RequestError when a client would take the server's place."""
    reserved = sorted(_RESERVED.intersection(given))
    refuse_unless(not reserved, f"chat_template_kwargs must not have {[*reserved, ''][0]}", "chat_template_kwargs")
    _carried(given, "chat_template_kwargs")
    return given


def _is_carried(value: Any) -> bool:
    """Whether it has only numbers that messages between processes can carry."""
    try:
        msgspec.msgpack.encode(value)
    except (OverflowError, UnicodeEncodeError) as error:
        return isinstance(error, UnicodeEncodeError)  # which is about no number
    return True


def _carried(value: Any, where: str) -> None:
    refuse_unless(_is_carried(value), f"{where} has a number that is too large", where)


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

"""JSON schemas, in the part of the language that llguidance follows, and with objects closed.

What llguidance does not follow is said in other keywords where that means the same, or is refused by the path of the
property that has it; annotations are left out. An object has no properties but those that its schema names, unless
`additionalProperties` says otherwise: models invent them.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from copy import copy
from itertools import chain, compress
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import msgspec

Way = tuple[str, ...]  # to a schema within another
_DEFINITIONS = ("$defs", "definitions", "schemas")  # the last one in "components"
_MAPS = ("properties", "patternProperties", *_DEFINITIONS)  # of names and schemas
_IN_PLACE = ("allOf", "anyOf", "oneOf")  # their schemas hold for the same value
_LISTS = (*_IN_PLACE, "prefixItems", "items")
_NAMING = ("properties", "patternProperties")
_TABLE = msgspec.yaml.decode(Path(__file__).with_suffix(".yaml").read_bytes())
KINDS = {str: "string", bool: "boolean", int: "integer", float: "number", dict: "object", list: "array"}
_REFUSED: dict[str, list[Any]] = _TABLE["refused"]
_IDLE = ("then", "else", "minContains", "maxContains", "x-guidance")  # without those; and what is not a client's
_FORMATS = ("email", "hostname", "ipv4", "ipv6", "uuid", "uri")  # llguidance has them
_BOUNDS = (("minimum", "exclusiveMinimum", max, -(10**18)), ("maximum", "exclusiveMaximum", min, 10**18))
_DECIMAL = "^(?!^[-+.]*$)"  # how older versions of pydantic say that a decimal number has a digit


def _whole(pattern: str) -> str:
    return re.sub(r"<(\w+)>", lambda part: _whole(_TABLE["parts"][part[1]]), pattern)


# By format.
PATTERNS = {name: f"^({_whole(text)})$" for names, text in _TABLE["formats"].items() for name in names.split()}


class SchemaError(ValueError):
    """What is wrong with a schema, and where: "uniqueItems is not supported (at properties.tags)"."""

    def __init__(self, what: str, path: Way = ()) -> None:
        super().__init__(f"{what} (at {'.'.join(path)})" if path else what)


def children(schema: Mapping[str, Any]) -> Iterator[tuple[Way, Any]]:
    """The schemas in a schema, and the way to each."""
    for key, value in schema.items():
        if key in _MAPS and isinstance(value, dict):
            yield from (((key, name), inner) for name, inner in value.items())
        elif key in _LISTS and isinstance(value, list):
            yield from (((key, str(index)), inner) for index, inner in enumerate(value))
        elif key in ("items", "additionalItems", "additionalProperties", "components") and isinstance(value, dict):
            yield (key,), value


def resolved(schema: Any, root: Any) -> Any:
    """What a schema that is a reference within `root` stands for; the schema itself when it is none."""
    for _ in range(16):
        reference = _pointer(schema, root) if isinstance(schema, dict) else ""
        if reference[:2] not in ("#", "#/"):
            return schema
        target = root
        for step in filter(None, reference[1:].split("/")):
            if isinstance(target, list) and re.fullmatch("[0-9]{1,6}", step):
                target = (target[int(step) : int(step) + 1] or [None])[0]
            else:
                target = target.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(target, dict) else None
        if not isinstance(target, dict):
            return schema
        schema = target
    return schema


def _pointer(schema: Mapping[str, Any], root: Any) -> str:
    """Its reference, without what URIs escape, and without the name of `root`, which other libraries put before it."""
    document, sign, pointer = str(schema.get("$ref")).partition("#")
    own = str(root.get("$id", "") if isinstance(root, dict) else "").rstrip("#")
    return "#" + unquote(pointer) if document in ("", own, own.rpartition("/")[2]) else document + sign + pointer


def literals(schema: Any) -> list[Any]:
    """The only values that it allows, where it lists them."""
    if not isinstance(schema, dict):
        return []
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    return values if isinstance(values, list) else []


def json_kinds(schema: Any, root: Any, known: dict[int, tuple[Any, set[str]]]) -> set[str]:
    """The types of a schema's values, none where any may be; known: what was found, by `id`, beside its schema."""
    if id(one := resolved(schema, root)) not in known:
        known[id(one)] = one, _types(one)
        inner = listed(one, *_IN_PLACE) if isinstance(one, dict) and not _types(one) else []
        with suppress(RecursionError):  # any may be, as far as is seen
            if inner and all(kinds := [json_kinds(each, root, known) for each in inner]):
                known[id(one)] = one, set[str]().union(*kinds)
    return known[id(one)][1]


def _types(schema: Any) -> set[str]:
    given: dict[str, Any] = schema if isinstance(schema, dict) else {}
    kinds = [given["type"]] if isinstance(given.get("type"), str) else listed(given, "type")
    return {kind for kind in kinds if isinstance(kind, str)} or {KINDS.get(type(x), "null") for x in literals(given)}


def leaves(schema: Any, root: Any, branches: Callable[[dict[str, Any]], list[Any]]) -> list[Any]:
    """Of the alternatives within a schema, those that have none; each once, however often a client names it."""
    seen, waiting = dict[int, tuple[Any, list[Any]]](), [schema]  # by `id`; held, so that nothing else gets it
    while waiting:
        one = resolved(waiting.pop(), root)
        if id(one) not in seen:
            seen[id(one)] = one, (inner := branches(one) if isinstance(one, dict) else [])
            waiting += reversed(inner)
    return [one for one, inner in seen.values() if not inner]


def definitions(schema: Mapping[str, Any]) -> dict[str, Any]:
    """What references in a schema name, which its parts need too, and its own name."""
    return {key: schema[key] for key in ("$id", "$defs", "definitions", "components") if key in schema}


def followed(schema: Any) -> dict[str, Any]:
    """The schema as it is compiled. Raises: SchemaError."""
    made = _Follower(schema).node(schema, ())
    return ({} if made else {"enum": []}) if isinstance(made, bool) else made


class _Follower:
    """Copies one schema after the other. A composition (`allOf`; `$ref` or `anyOf` beside properties) is closed as a
    whole, by the names of all its parts, which stay open therefore; as definitions, wherever else they are used."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._used, self._open = set[str](), set[str]()  # references, and those to parts of compositions
        self._known = dict[int, tuple[Any, set[str]]]()
        self._collect(root, ())

    def _collect(self, schema: Any, path: Way) -> None:
        if not isinstance(schema, dict):
            return
        for key in (*_MAPS[:-1], "required", "enum", "prefixItems", *_IN_PLACE):  # "schemas" is no keyword by itself
            if not isinstance(schema.get(key), (dict if key in _MAPS else list) | None):
                raise SchemaError(f"{key} must be {'an object' if key in _MAPS else 'a list'}", path)
        self._used.add(_pointer(schema, self._root))
        if _is_composed(schema):
            self._open.update(_pointer(part, self._root) for part in (schema, *self._parts(schema, set())))
        for way, inner in children(schema):
            self._collect(inner, (*path, *way))

    def _parts(self, schema: Mapping[str, Any], seen: set[str]) -> Iterator[Mapping[str, Any]]:
        """The schemas that hold for the same value as this one."""
        inner = listed(schema, *_IN_PLACE)
        if "$ref" in schema and (reference := _pointer(schema, self._root)) not in seen:
            seen.add(reference)
            inner.append(resolved(schema, self._root))
        for part in inner:
            if isinstance(part, dict) and part is not schema:
                yield part
                yield from self._parts(part, seen)

    def node(self, schema: Any, path: Way, closing: str = "all", shared: frozenset[str] = frozenset()) -> Any:
        """closing: "all"; "inner": not this schema, which is a part of a composition; or "none": several parts have it.
        shared: names that several parts of a composition, of which this is one, have."""
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise SchemaError(f"a schema must be an object, not {schema!r:.40}", path)
        seals = schema.get("unevaluatedProperties") is False
        schema, composed = self._plain(schema, path), _is_composed(schema)
        names: list[str] | None = None
        if composed:
            parts = [*self._parts(schema, set())]
            first = next((key for key in schema if key in ("properties", "$ref", *_IN_PLACE)), "")
            parts.insert(0 if first == "properties" else len(parts), schema)
            named = [name for part in parts for name in listed(part, "properties")]
            shared |= {name for name in named if named.count(name) > 1}
            is_map = any("additionalProperties" in part or "patternProperties" in part for part in parts)
            if not is_map and any("properties" in part for part in parts):
                names = [*named, *(str(name) for part in parts for name in listed(part, "required"))]
        made = {key: copy(value) for key, value in schema.items()}
        for way, inner in children(schema):
            key, where = way[0], (*path, *way)
            pointer = "/".join(("#", *(step.replace("~", "~0").replace("/", "~1") for step in where)))
            if key in _IN_PLACE:
                is_part = closing == "all" and (composed or pointer in self._open)
                new = self.node(inner, where, "inner" if is_part else closing, shared)
            elif closing == "none" or (key == "properties" and way[1] in shared):
                new = self.node(inner, where, "none")
            elif key in _DEFINITIONS and pointer not in self._used:
                new = False  # if it cannot be followed, unless somebody names it all the same
                with suppress(SchemaError):
                    new = self.node(inner, where)
            else:
                new = self.node(inner, where, "inner" if pointer in self._open else "all")
            holder, step = (made, key) if len(way) == 1 else (made[key], way[1])
            holder[int(step) if isinstance(holder, list) else step] = new
        if names is not None and (closing == "all" or seals):
            made["properties"] = {**dict.fromkeys(names, True), **made.get("properties", {})}
            made["additionalProperties"] = False
        elif not composed and (seals or (closing == "all" and any(key in schema for key in _NAMING))):
            if made.keys().isdisjoint(("additionalProperties", "patternProperties")):  # what is required is no guess
                named = made.setdefault("properties", {})
                named |= {name: True for name in map(str, listed(schema, "required")) if name not in named}
            made.setdefault("additionalProperties", False)
        elif seals:
            raise SchemaError("unevaluatedProperties is not supported here", path)
        return made

    def _plain(self, schema: Mapping[str, Any], path: Way) -> dict[str, Any]:
        """Its own keywords, in those of llguidance."""
        gone = (*_IDLE, "uniqueItems") if schema.get("maxItems") in (0, 1) else _IDLE
        given = ((key, value) for key, value in schema.items() if value is not None or key == "const")
        made = {key: value for key, value in given if key not in gone}
        if isinstance(made.get("propertyNames"), dict) and not any(key in made for key in _NAMING):
            self._name(made)
        for key, neutral in _REFUSED.items():
            if key in made and made.pop(key) not in neutral:
                raise SchemaError(f"{key} is not supported", path)
        if "$ref" in made and (pointer := _pointer(made, self._root))[0] == "#":
            made["$ref"] = "#" + quote(pointer[1:], safe="/$")
        for bound, exclusive, nearer, end in _BOUNDS:
            for key in {bound, exclusive} & made.keys():  # no number that is sought is beyond these ends
                made[key] = nearer(made[key], end) if type(made[key]) in (int, float) else made[key]
            if isinstance(made.get(exclusive), bool) and made.pop(exclusive) and bound in made:  # as in draft 4
                made[exclusive] = made.pop(bound)
        patterns = [made.pop("pattern")] if "pattern" in made else []
        if patterns and str(patterns[0]).startswith(_DECIMAL):
            patterns = ["^" + patterns[0].removeprefix(_DECIMAL), "[0-9]"]
        elif patterns and made.get("format") in (*PATTERNS,) and re.search(r"\(\?<?[=!]", str(patterns[0])):
            patterns = []  # as Zod has them: it cannot be followed, but says what the format does
        if "format" in made and made["format"] not in _FORMATS:
            patterns += [PATTERNS[name] for name in (str(made.pop("format")),) if name in PATTERNS]
        if patterns:
            made["pattern"] = patterns.pop()
        if patterns:
            made["allOf"] = [*listed(made, "allOf"), *({"pattern": pattern} for pattern in patterns)]
        if "oneOf" in made and "anyOf" not in made and (branches := self._exclusive(made)):
            made = {("anyOf" if key == "oneOf" else key): value for key, value in made.items()}
            made["anyOf"] = branches
        return made

    def _name(self, schema: dict[str, Any]) -> None:
        """Make a map whose names match a schema of one with such properties, if there is a way."""
        names, values = resolved(schema["propertyNames"], self._root), schema.get("additionalProperties", True)
        pattern = names.get("pattern") or PATTERNS.get(str(names.get("format")))
        if known := literals(names):
            schema["properties"] = {name: values for name in known if isinstance(name, str)}
        elif isinstance(pattern, str) and not names.keys() & {"minLength", "maxLength", *_IN_PLACE}:
            schema["patternProperties"] = {pattern: values}
        else:
            return
        del schema["propertyNames"]
        schema["additionalProperties"] = False

    def _exclusive(self, schema: Mapping[str, Any]) -> list[Any] | None:
        """The branches of `oneOf`, where their types, or a property of theirs, say which one it is."""
        ones = [resolved(branch, self._root) if isinstance(branch, dict) else {} for branch in schema["oneOf"]]
        kinds = [{kind.replace("integer", "number") for kind in json_kinds(x, self._root, self._known)} for x in ones]
        are = [type(one.get("properties")) is dict and "object" in (kinds[i] or "object") for i, one in enumerate(ones)]
        objects = [*compress(ones, are)]  # of whose types "object" alone may be the same
        apart = all(kinds) and sum(map(len, kinds)) - len({*chain(*kinds)}) == max(len(objects) - 1, 0)
        if apart and len(objects) < 2:
            return list(schema["oneOf"])
        if not objects or not (apart or len(objects) == len(ones)):
            return None
        discriminator, known = schema.get("discriminator"), {} if apart else {"type": "object"}
        told = discriminator.get("propertyName") if isinstance(discriminator, dict) else None
        for tag in objects[0]["properties"] if told is None else (told,):
            tags = [literals(branch["properties"].get(tag)) for branch in objects]
            values = [value for some in tags for value in some]
            required = told is not None or all(tag in listed(branch, "required") for branch in objects)
            if required and all(tags) and all(values.count(value) == 1 for value in values):
                return [
                    {**one, **known, "required": [*listed(one, "required"), tag]} if is_object else one
                    for one, is_object in zip(schema["oneOf"], are, strict=True)
                ]
        return None


def listed(schema: Mapping[str, Any], *keys: str) -> list[Any]:
    """The members, or names, that these keywords have."""
    return [one for value in map(schema.get, keys) if isinstance(value, list | dict) for one in value]


def _is_composed(schema: Mapping[str, Any]) -> bool:
    own = any(key in schema for key in (*_NAMING, "required"))
    return own + len(listed(schema, "allOf")) + sum(key in schema for key in ("$ref", "anyOf", "oneOf")) > 1

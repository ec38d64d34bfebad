"""What becomes of fields of requests that no model of a body has: `fields.yaml` says it, for all bodies.

The names are those of OpenAI, Anthropic, vLLM, SGLang, llama.cpp, Ollama, TGI, text-generation-webui, OpenRouter and
others whose clients are pointed at this server.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml

from minisgl.server.strict import Body, Fields, Reading, load_object, validate

B = TypeVar("B", bound=Body)
Refused = dict[str, tuple[Any, ...]]
_TABLE = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
NO_EFFECT = frozenset(_TABLE["no_effect"].split())
OTHER_NAMES: dict[str, str] = _TABLE["other_names"]
NAMES: dict[str, dict[str, str]] = _TABLE["names_for_chats"]
EMPTY = tuple(_TABLE["refused"][0]["unless"])
UNSUPPORTED: Refused = {
    name: tuple(group["unless"])
    for group in _TABLE["refused"]
    for key in group.keys() - {"unless"}
    for name in group[key].split()
}


def _objects() -> dict[str, Fields]:
    made: dict[str, Fields] = {}
    for name, entry in _TABLE["objects"].items():
        words = {key: tuple(entry.get(key, "").split()) for key in ("known", "ignored", "refused")}
        entry |= {**words, "refused": dict.fromkeys(words["refused"], EMPTY)}
        entry["nested"] = {field: made[of] for field, of in entry.get("nested", {}).items()}
        entry["kinds"] = {kind: made[of] for of, kinds in entry.get("kinds", {}).items() for kind in kinds.split()}
        made[name] = Fields(**entry)
    return made


OBJECTS = _objects()
_WRAPPED = Fields((), {**UNSUPPORTED, **dict.fromkeys(_TABLE["wrapped"].split(), ())})
_NESTED = {name: OBJECTS[of] for name, of in _TABLE["nested"].items()}
_NESTED |= dict.fromkeys(_TABLE["wrappers"].split(), _WRAPPED)


def load(model: type[B], data: bytes, reading: Reading | None) -> B:
    """The body, checked. Raises: RequestError."""
    return validate(model, load_object(data, fields_of(model), reading))


@cache
def fields_of(model: type[Body]) -> Fields:
    """Of a body."""
    known, own = frozenset(model.model_fields), _TABLE["bodies"].get(model.__name__, {})
    if own.get("alone"):
        return Fields(known)
    refused: Refused = UNSUPPORTED | {name: tuple(values) for name, values in own.get("refused", {}).items()}
    refused |= dict.fromkeys(own.get("empty", "").split(), EMPTY)
    refused |= dict.fromkeys(_TABLE["wrapped"].split() if own.get("wrapped") else (), ())
    return Fields(
        known,
        {name: unless for name, unless in refused.items() if name not in known},
        NO_EFFECT - known,
        _NESTED
        | {name: OBJECTS[of] for name, of in own.get("nested", {}).items()}
        | {name: fields_of(inner) for name, inner in model.inner.items()},
        {name: of for name, of in (OTHER_NAMES | own.get("other_names", {})).items() if name not in known},
    )

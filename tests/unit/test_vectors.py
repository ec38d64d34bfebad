"""Bodies that ask for vectors."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from minisgl.config.pooling import Pooling
from minisgl.errors import RequestError
from minisgl.server.bodies.fields import Reading
from minisgl.server.routes.vectors import parse_embeddings


def parsed(is_normalized: bool, **more: Any) -> Any:
    model = SimpleNamespace(hidden_size=8, pooling=Pooling("last", False, "", is_normalized=is_normalized))
    config: Any = SimpleNamespace(engine=SimpleNamespace(model=model), scheduler=SimpleNamespace(max_seq_len=64))
    return parse_embeddings(config, json.dumps({"input": "a", **more}).encode(), {}, Reading(strict=True))


@pytest.mark.parametrize("is_normalized", [True, False])
def test_only_what_vectors_are_not_is_refused(is_normalized: bool) -> None:
    for more in ({}, {"normalize": None}, {"normalize": is_normalized}):
        assert len(parsed(is_normalized, **more).prompts) == 1
    with pytest.raises(RequestError, match=f"normalize must be {is_normalized} for".lower()) as caught:
        parsed(is_normalized, normalize=not is_normalized)
    assert caught.value.param == "normalize"

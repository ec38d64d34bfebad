"""Embeddings as OpenAI has them, reranking as Cohere and Jina, and vLLM's scores."""

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import orjson

from minisgl.config.runtime import ServerConfig
from minisgl.core import MAX_COUNT, Range
from minisgl.message.messages import UserReply
from minisgl.server.answers.renderer import Renderer
from minisgl.server.bodies.chat import GenerationRequest
from minisgl.server.bodies.fields import Body, Count, Ids, Items, MaxTokens, Object, Reading, load, optional
from minisgl.server.bodies.sampling import Defaults, RequestFields
from minisgl.server.errors import refuse_unless
from minisgl.tokenizer.pooling import pair_prompt, score_of, served, text_prompt, vector_of

MAX_TEXTS, MAX_PAIRED = 2048, 1 << 22  # OpenAI's limit; characters of all pairs, each with its query
RERANK_PATHS = ("/v1/rerank", "/v2/rerank", "/rerank")
VECTOR_PATHS = ("/v1/embeddings", *RERANK_PATHS, "/v1/score")
Show = Callable[[Sequence[bytes]], dict[str, Any]]


class EmbeddingsBody(Body, RequestFields):
    """POST /v1/embeddings."""

    model: str | None = optional("The id that /v1/models shows.")
    input: str | Items[str] | Ids | Items[Ids]
    encoding_format: str | None = optional("base64: of float32.", enum=[None, "float", "base64"])
    dimensions: MaxTokens | None = optional("So many numbers of each vector, the first ones.")
    truncate_prompt_tokens: Count | None = optional("So many tokens are kept; -1: the context.", Range(-1, MAX_COUNT))
    normalize: bool | None = optional("Whether vectors have length 1: as the model's files say, or it is refused.")
    prompt_name: str | None = optional("Of what comes before each text, of those that the model's files have.")


class RerankBody(Body, RequestFields):
    """POST /v1/rerank."""

    model: str | None = optional("The id that /v1/models shows.")
    query: str
    documents: Items[str | Object]
    top_n: MaxTokens | None = optional("So many results.")
    return_documents: bool | None = optional("false: results have no texts.")
    instruction: str | None = optional("What to look for.")


class ScoreBody(Body, RequestFields):
    """POST /v1/score: one text for all others, or one for each."""

    model: str | None = optional("The id that /v1/models shows.")
    text_1: str | Items[str]
    text_2: str | Items[str]
    instruction: str | None = optional("What to look for.")


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorRequest(GenerationRequest):
    """show: what the answer says, beside what all do, of the model's numbers for each prompt."""

    show: Show


class VectorRenderer(Renderer):
    """Any of the answers, which come as a whole: there is no event."""

    request: VectorRequest

    def body(self, choices: Sequence[Sequence[UserReply]]) -> dict[str, Any]:
        head = {"id": self.id, "object": "list", "created": self.created, "model": self.model, "usage": self.usage()}
        return {**head, **self.request.show([replies[-1].pooled for replies in choices])}


def parse_embeddings(config: ServerConfig, data: bytes, _: Defaults, reading: Reading) -> VectorRequest:
    """Raises: RequestError naming the field at fault."""
    given: Any = (body := load(EmbeddingsBody, data, reading)).input
    texts = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
    size, form, most = body.dimensions or 0, body.encoding_format or "float", body.truncate_prompt_tokens or 0
    refuse_unless(form in ("float", "base64"), "encoding_format must be float or base64", "encoding_format")
    pooling, params = served(config.engine.model, "embed", size)
    is_unit = pooling.is_normalized
    refuse_unless(body.normalize in (None, is_unit), f"normalize must be {is_unit} for this model".lower(), "normalize")
    most = min(most % MAX_COUNT, config.scheduler.max_seq_len)

    def told(data: bytes) -> Any:
        vector = vector_of(pooling, data, size)
        numbers = orjson.Fragment(orjson.dumps(vector, option=orjson.OPT_SERIALIZE_NUMPY))
        return numbers if form == "float" else base64.b64encode(vector.tobytes()).decode()

    def show(raw: Sequence[bytes]) -> dict[str, Any]:
        return {"data": [{"object": "embedding", "index": i, "embedding": one} for i, one in enumerate(map(told, raw))]}

    prompts = tuple(text_prompt(pooling, text, body.prompt_name or "", most) for text in _few(texts, "input"))
    params, names = replace(params, cache_salt=body.cache_salt or ""), {"prompt": "input"}
    return VectorRequest(prompts, params, model=body.model, timeout=body.timeout or 0.0, names=names, show=show)


def _few(texts: Sequence[Any], name: str) -> Sequence[Any]:
    refuse_unless(0 < len(texts) <= MAX_TEXTS, f"{name} must hold from 1 to {MAX_TEXTS} texts, not {len(texts)}", name)
    return texts


def parse_rerank(config: ServerConfig, data: bytes, _: Defaults, reading: Reading) -> VectorRequest:
    """Raises: RequestError naming the field at fault."""
    body = load(RerankBody, data, reading)
    texts = [one if isinstance(one, str) else one.get("text") for one in body.documents]
    refuse_unless(all(isinstance(text, str) for text in texts), "documents must be texts, or have a text", "documents")

    def show(labels: Sequence[bytes]) -> dict[str, Any]:
        found = [{"index": index, "relevance_score": score_of(one)} for index, one in enumerate(labels)]
        best = sorted(found, key=lambda result: -result["relevance_score"])[: body.top_n]
        with_texts = [{**result, "document": {"text": texts[int(result["index"])]}} for result in best]
        return {"results": best if body.return_documents is False else with_texts}

    return _pairs(config, body, [(body.query, text) for text in _few(texts, "documents")], show, "documents")


def parse_score(config: ServerConfig, data: bytes, _: Defaults, reading: Reading) -> VectorRequest:
    """Raises: RequestError naming the field at fault."""
    body = load(ScoreBody, data, reading)
    queries, texts = ([one] if isinstance(one, str) else one for one in (body.text_1, body.text_2))
    refuse_unless(len(queries) in (1, len(_few(texts, "text_2"))), "text_1 must be one, or as many as text_2", "text_1")

    def show(labels: Sequence[bytes]) -> dict[str, Any]:
        return {"data": [{"object": "score", "index": i, "score": score_of(one)} for i, one in enumerate(labels)]}

    return _pairs(config, body, [*zip(queries * (len(texts) // len(queries)), texts, strict=True)], show, "text_2")


def _pairs(
    config: ServerConfig, body: RerankBody | ScoreBody, pairs: Sequence[tuple[str, str]], show: Show, name: str
) -> VectorRequest:
    (pooling, params), more = served(config.engine.model, "score"), body.instruction or ""
    size = sum(len(query) + len(text) + len(more) for query, text in pairs)
    refuse_unless(size <= MAX_PAIRED, f"all pairs have {size} characters, more than {MAX_PAIRED}", name)
    prompts = tuple(pair_prompt(pooling, query, text, more) for query, text in pairs)
    params, names = replace(params, cache_salt=body.cache_salt or ""), {"messages": name}
    return VectorRequest(prompts, params, model=body.model, timeout=body.timeout or 0.0, names=names, show=show)


def vector_dialects(config: ServerConfig) -> dict[str, tuple[str, Callable[..., GenerationRequest], Any]]:
    """As `routes.app.DIALECTS`."""
    dialects = dict.fromkeys(RERANK_PATHS, ("Order documents by how well they answer a query.", parse_rerank))
    dialects |= {"/v1/embeddings": ("Vectors of texts.", parse_embeddings)}
    dialects |= {"/v1/score": ("How well texts answer others.", parse_score)}
    return {path: (about, partial(parse, config), VectorRenderer) for path, (about, parse) in dialects.items()}

"""What the planner has to tell of a request."""

from __future__ import annotations

from typing import NamedTuple

from minisgl.core import FinishReason, Req, StepResult, TokenLogprobs


class ReqOutput(NamedTuple):
    """New tokens of one request. The last output of a request, and only that, has a `finish_reason`.

    error_status: what an HTTP client is told of whose fault the error is.
    num_hidden: how many of the last ids are end-of-sequence tokens that ended it (0 or 1).
    logprobs: of `token_ids`; prompt_logprobs: of all prompt tokens but the first, with the first output. On rank 0, for
    requests that want them.
    """

    req: Req
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    num_hidden: int = 0
    error: str | None = None
    error_status: int = 500
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None


def with_logprobs(output: ReqOutput, result: StepResult, sample: int) -> ReqOutput:
    """The output of the step's sample of this number, with what it is to report."""
    logprobs = None if result.logprobs is None or not output.token_ids else result.logprobs.get(sample)
    prompt, output.req.prompt_logprobs = output.req.prompt_logprobs, []
    return output._replace(logprobs=logprobs, prompt_logprobs=prompt or None)

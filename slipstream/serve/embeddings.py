"""How is `/v1/embeddings` answered? Pooled hidden states as vectors of length 1, as OpenAI's are."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from fastapi import FastAPI
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from slipstream.core.checks import integer
from slipstream.core.outputs import RequestOutput
from slipstream.core.request import Request, RequestOptions
from slipstream.core.sampling_params import SamplingParams
from slipstream.engine.pooling import hidden_states_only, pool
from slipstream.engine.service import EngineService
from slipstream.serve.context import ServeContext
from slipstream.serve.json_body import read_body
from slipstream.serve.openapi import describe_body
from slipstream.serve.requests.completion import PromptItem, prompts_of
from slipstream.serve.requests.embedding import EmbeddingBody
from slipstream.serve.requests.sampling import options_of
from slipstream.serve.submission import AnswerHead, answers, check_fan_out

PATH = "/v1/embeddings"
MAX_DIMENSIONS = 1 << 20


def add_routes(app: FastAPI, context: ServeContext) -> None:
    async def create_embeddings(http: HttpRequest) -> Response:
        """Turn one or several texts into vectors."""
        return await embed(http, context)

    app.add_api_route(
        PATH, create_embeddings, methods=["POST"], tags=["embeddings"], **describe_body(EmbeddingBody)
    )


async def embed(http: HttpRequest, context: ServeContext) -> Response:
    service = context.check_open()
    body = await read_body(http, context, EmbeddingBody)
    head = AnswerHead("embd", context.check_model(body.model))
    if body.dimensions is not None:
        integer(body.dimensions, "dimensions", 1, MAX_DIMENSIONS)
    prompts = prompts_of(body.input, body.prompt_token_ids, "input")
    check_fan_out(len(prompts), 1, context)
    options = options_of(body.timeout, context.settings.request_timeout_s)
    requests = await context.off_loop(prepare, body, prompts, head, service, context, options)
    outputs = await answers(http, context, requests)
    return await context.json_off_loop(whole, outputs, body, head)


def prepare(
    body: EmbeddingBody,
    prompts: list[PromptItem],
    head: AnswerHead,
    service: EngineService,
    context: ServeContext,
    options: RequestOptions,
) -> list[Request]:
    """Tokenize and check every input. Raises RequestError for the first that cannot be served."""
    params = SamplingParams(
        max_tokens=1,
        detokenize=False,
        truncate_prompt_tokens=body.truncate_prompt_tokens,
        cache_salt=body.cache_salt,
        priority=body.priority or 0,
    )
    adds_special = body.add_special_tokens is not False
    return [
        service.create_request(
            context.prompts.encode(prompt, add_special_tokens=adds_special, param="input"),
            params,
            request_id=f"{head.id}-{place}",
            options=options,
            change=hidden_states_only,
        )
        for place, prompt in enumerate(prompts)
    ]


def whole(outputs: list[RequestOutput], body: EmbeddingBody, head: AnswerHead) -> dict[str, Any]:
    """Return the answer. Raises RequestError where an input was not computed to its end."""
    num_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": _vector(output, body)}
            for index, output in enumerate(outputs)
        ],
        "model": head.model,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }


def _vector(output: RequestOutput, body: EmbeddingBody) -> list[float] | str:
    is_unit = body.normalize is not False
    pooled = pool(output, body.pooling or "mean", normalize=is_unit and body.dimensions is None)
    if pooled.error is not None:
        raise pooled.error
    vector = pooled.embedding
    if body.dimensions is not None:
        integer(body.dimensions, "dimensions", 1, len(vector), "the model has no more")
        # Of a vector cut short, the length is made 1 again: that is what similarities assume.
        vector = vector[: body.dimensions].astype(np.float64)
        length = float(np.linalg.norm(vector)) if is_unit else 1.0
        vector = (vector / length if length else vector).astype(np.float32)
    if body.encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
    return vector.tolist()

"""How is `/v1/completions` answered? Prompts in any of OpenAI's forms, whole or streamed."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from slipstream.core.errors import ConfigError, RequestError
from slipstream.core.outputs import CompletionOutput, RequestOutput
from slipstream.core.request import Request
from slipstream.engine.prompts import Encoded
from slipstream.engine.service import EngineService
from slipstream.serve.completion_chunks import CompletionChunks, CompletionForm
from slipstream.serve.context import ServeContext
from slipstream.serve.json_body import read_body
from slipstream.serve.logprobs import TokenNames, prompt_fields
from slipstream.serve.openapi import describe_body
from slipstream.serve.requests.completion import CompletionBody, PromptItem, prompts_of
from slipstream.serve.streams import EventStreamResponse
from slipstream.serve.submission import AnswerHead, Usage, answers, begin, check_fan_out

PATH = "/v1/completions"
# Log-probabilities of prompts are records in memory until the answer is out.
MAX_PROMPT_LOGPROBS = 1 << 18


@dataclasses.dataclass(frozen=True, slots=True)
class Prepared:
    """A body's prompts, ready to be sent."""

    requests: list[Request]
    form: CompletionForm


def add_routes(app: FastAPI, context: ServeContext) -> None:
    async def create_completion(http: HttpRequest) -> Response:
        """Continue one or several prompts."""
        return await complete(http, context)

    app.add_api_route(
        PATH,
        create_completion,
        methods=["POST"],
        tags=["generation"],
        **describe_body(CompletionBody, streams=True),
    )


async def complete(http: HttpRequest, context: ServeContext) -> Any:
    service = context.check_open()
    body = await read_body(http, context, CompletionBody)
    head = AnswerHead("cmpl", context.check_model(body.model))
    body.check_stream()
    prompts = prompts_of(body.prompt, body.prompt_token_ids)
    check_fan_out(len(prompts), body.num_samples, context)
    prepared = await context.off_loop(prepare, body, prompts, head, service, context)
    if body.stream:
        stream, first = await begin(http, context, prepared.requests)
        return EventStreamResponse(stream, first, CompletionChunks(head, prepared.form))
    outputs = await answers(http, context, prepared.requests)
    return await context.json_off_loop(whole, outputs, head, prepared.form, body.prompt_logprobs)


def prepare(
    body: CompletionBody,
    prompts: list[PromptItem],
    head: AnswerHead,
    service: EngineService,
    context: ServeContext,
) -> Prepared:
    """Tokenize and check every prompt. Raises RequestError for the first that cannot be served."""
    if body.stream and body.prompt_logprobs is not None:
        raise RequestError(
            "prompt_logprobs do not come in a stream; leave stream out, or use echo with logprobs.",
            param="prompt_logprobs",
        )
    adds_special = body.add_special_tokens is not False
    options = body.to_options(context.settings.request_timeout_s)
    requests: list[Request] = []
    for place, prompt in enumerate(prompts):
        param = "prompt" if len(prompts) == 1 else f"prompt[{place}]"
        encoded = context.prompts.encode(prompt, add_special_tokens=adds_special, param=param)
        params = body.to_params(
            service.info.limits,
            service.info.default_sampling,
            max_tokens=body.max_tokens_after(_num_kept(encoded, body), service.info.limits.max_seq_len),
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if body.echo and body.prompt_logprobs is None else None,
        )
        requests.append(
            service.create_request(encoded, params, request_id=f"{head.id}-{place}", options=options)
        )
    check_prompt_logprobs(requests)
    form = CompletionForm(
        num_samples=requests[0].num_returned,
        num_logprobs=body.logprobs,
        names=token_names(service, as_ids=bool(body.return_tokens_as_token_ids)),
        echoes=[_echo(request, body, service) for request in requests] if body.echo else None,
        returns_ids=bool(body.return_token_ids),
        wants_usage=body.wants_usage,
        wants_running_usage=body.wants_running_usage,
    )
    return Prepared(requests, form)


def _num_kept(encoded: Encoded, body: CompletionBody) -> int:
    """Return how long a prompt is once it is cut as asked; what is wrong with the number is found later."""
    keep = body.truncate_prompt_tokens
    return len(encoded.token_ids) if keep is None or keep < 1 else min(keep, len(encoded.token_ids))


def check_prompt_logprobs(requests: list[Request]) -> None:
    """Refuse more records of prompt positions than a server should hold for one body. Raises RequestError."""
    num_records = sum(
        len(request.prompt_token_ids) * (request.sampling.prompt_logprobs + 1)
        for request in requests
        if request.sampling.prompt_logprobs >= 0
    )
    if num_records > MAX_PROMPT_LOGPROBS:
        raise RequestError(
            f"These prompts ask for {num_records} log-probabilities of prompt tokens, and at most "
            f"{MAX_PROMPT_LOGPROBS} are given at once; shorten the prompts or lower logprobs.",
            param="logprobs",
        )


def token_names(service: EngineService, *, as_ids: bool) -> TokenNames:
    try:
        return TokenNames(service.prompts.tokenizer, as_ids=as_ids)
    except ConfigError:
        return TokenNames(None, as_ids=True)


def _echo(request: Request, body: CompletionBody, service: EngineService) -> str:
    """Return a prompt's text: as it was sent, or as the ids that are left of it spell it."""
    if request.prompt is not None and body.truncate_prompt_tokens is None:
        return request.prompt
    return service.prompts.tokenizer.decode(
        request.prompt_token_ids, skip_special_tokens=body.skip_special_tokens is not False
    )


def whole(
    outputs: list[RequestOutput], head: AnswerHead, form: CompletionForm, prompt_logprobs: int | None
) -> dict[str, Any]:
    """Return the answer to a body that is not streamed."""
    usage = Usage()
    choices: list[dict[str, Any]] = []
    for position, output in enumerate(outputs):
        usage.add(position, output)
        for sample in output.outputs:
            choices.append(_choice(position, output, sample, form))
            if prompt_logprobs is not None:
                choices[-1]["prompt_logprobs"] = prompt_fields(output.prompt_logprobs or ())
    return {**head.fields("text_completion"), "choices": choices, "usage": usage.fields()}


def _choice(
    position: int, output: RequestOutput, sample: CompletionOutput, form: CompletionForm
) -> dict[str, Any]:
    echo = form.echoes[position] if form.echoes is not None else ""
    ids, entries = sample.token_ids, sample.logprobs
    if form.echoes is not None and entries is not None:
        ids = output.prompt_token_ids + ids
        entries = [*(output.prompt_logprobs or ()), *entries]
    logprobs = form.new_logprobs()
    choice: dict[str, Any] = {
        "index": position * form.num_samples + sample.index,
        "text": echo + sample.text,
        "logprobs": None if logprobs is None or entries is None else logprobs.take(ids, entries),
        "finish_reason": sample.finish_reason,
        "stop_reason": sample.stop_reason,
    }
    if form.returns_ids:
        choice |= {"prompt_token_ids": output.prompt_token_ids, "token_ids": sample.token_ids}
    return choice

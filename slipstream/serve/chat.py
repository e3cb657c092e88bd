"""How is `/v1/chat/completions` answered? A conversation, by the model's own template."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from slipstream.core.checks import refused
from slipstream.core.errors import RequestError
from slipstream.core.outputs import CompletionOutput, RequestOutput
from slipstream.core.request import Request
from slipstream.engine.prompts import Encoded
from slipstream.engine.service import EngineService
from slipstream.serve.chat_chunks import ChatChunks, ChatForm
from slipstream.serve.completions import check_prompt_logprobs, token_names
from slipstream.serve.context import ServeContext
from slipstream.serve.json_body import read_body
from slipstream.serve.logprobs import prompt_fields
from slipstream.serve.openapi import describe_body
from slipstream.serve.requests.chat import ChatBody, check_message_fields, check_template_kwargs
from slipstream.serve.requests.completion import prompts_of
from slipstream.serve.streams import EventStreamResponse
from slipstream.serve.submission import AnswerHead, Usage, answers, begin, check_fan_out

PATH = "/v1/chat/completions"


def add_routes(app: FastAPI, context: ServeContext) -> None:
    async def create_chat_completion(http: HttpRequest) -> Response:
        """Answer a conversation."""
        return await chat(http, context)

    app.add_api_route(
        PATH,
        create_chat_completion,
        methods=["POST"],
        tags=["generation"],
        **describe_body(ChatBody, streams=True),
    )


async def chat(http: HttpRequest, context: ServeContext) -> Any:
    service = context.check_open()
    body = await read_body(http, context, ChatBody)
    head = AnswerHead("chatcmpl", context.check_model(body.model))
    body.check_stream()
    check_fan_out(1, body.num_samples, context)
    request = await context.off_loop(prepare, body, head, service, context)
    form = ChatForm(
        num_logprobs=body.num_logprobs,
        names=token_names(service, as_ids=bool(body.return_tokens_as_token_ids)),
        returns_ids=bool(body.return_token_ids),
        wants_usage=body.wants_usage,
        wants_running_usage=body.wants_running_usage,
    )
    if body.stream:
        stream, first = await begin(http, context, [request])
        return EventStreamResponse(stream, first, ChatChunks(head, form))
    [output] = await answers(http, context, [request])
    return await context.json_off_loop(whole, output, head, form, body.prompt_logprobs)


def prepare(body: ChatBody, head: AnswerHead, service: EngineService, context: ServeContext) -> Request:
    """Render, tokenize and check the conversation. Raises RequestError."""
    body.check_chat()
    if body.stream and body.prompt_logprobs is not None:
        what = "do not come in a stream; leave stream out"
        raise refused("prompt_logprobs", what)
    params = body.to_params(
        service.info.limits,
        service.info.default_sampling,
        max_tokens=body.longest,
        logprobs=body.num_logprobs,
    )
    request = service.create_request(
        encode_body(body, context),
        params,
        request_id=f"{head.id}-0",
        options=body.to_options(context.settings.request_timeout_s),
    )
    check_prompt_logprobs([request])
    return request


def encode_body(body: ChatBody, context: ServeContext) -> Encoded:
    """Return the prompt of a body: its messages rendered, or the ids given instead of them."""
    if body.prompt_token_ids is not None:
        if body.chat_template_kwargs is not None or body.continue_final_message:
            raise RequestError(
                "prompt_token_ids is the whole prompt, so the template has nothing to do; leave out "
                "chat_template_kwargs and continue_final_message.",
                param="prompt_token_ids",
            )
        [ids] = prompts_of(body.messages, body.prompt_token_ids, "messages")
        return context.prompts.encode(ids, add_special_tokens=False)
    if body.messages is None:
        raise refused("messages", "is missing; give a list of messages with role and content")
    check_message_fields(body.messages)
    continues = bool(body.continue_final_message)
    return context.prompts.encode_chat(
        body.messages,
        add_generation_prompt=not continues and body.add_generation_prompt is not False,
        continue_final_message=continues,
        variables=check_template_kwargs(body.chat_template_kwargs, context.prompts.template_variables),
    )


def whole(
    output: RequestOutput, head: AnswerHead, form: ChatForm, prompt_logprobs: int | None
) -> dict[str, Any]:
    """Return the answer to a body that is not streamed."""
    usage = Usage()
    usage.add(0, output)
    answer = {
        **head.fields("chat.completion"),
        "choices": [_choice(sample, form) for sample in output.outputs],
        "usage": usage.fields(),
    }
    if prompt_logprobs is not None:
        answer["prompt_logprobs"] = prompt_fields(output.prompt_logprobs or ())
    if form.returns_ids:
        answer["prompt_token_ids"] = output.prompt_token_ids
    return answer


def _choice(sample: CompletionOutput, form: ChatForm) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "index": sample.index,
        "message": {"role": "assistant", "content": sample.text, "refusal": None},
        "logprobs": form.logprobs(sample),
        "finish_reason": sample.finish_reason,
        "stop_reason": sample.stop_reason,
    }
    if form.returns_ids:
        choice["token_ids"] = sample.token_ids
    return choice

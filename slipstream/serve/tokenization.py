"""How do `/tokenize` and its kin answer? As generation sees it, in vLLM's shapes."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from slipstream.core.checks import checked_ids, listed, refused
from slipstream.engine.service import EngineService
from slipstream.serve.context import ServeContext
from slipstream.serve.errors import JsonResponse
from slipstream.serve.json_body import read_body
from slipstream.serve.openapi import describe_answer, describe_body
from slipstream.serve.requests.chat import check_message_fields, check_template_kwargs
from slipstream.serve.requests.tokenization import DetokenizeBody, TokenizeBody

MAX_IDS = 1 << 20


def add_routes(app: FastAPI, context: ServeContext) -> None:
    async def tokenize(http: HttpRequest) -> Response:
        """Return the ids of a text or a conversation."""
        service = context.check_open()
        body = await read_body(http, context, TokenizeBody)
        context.check_model(body.model)
        return await context.json_off_loop(to_ids, body, service, context)

    async def detokenize(http: HttpRequest) -> Response:
        """Return the text of ids."""
        service = context.check_open()
        body = await read_body(http, context, DetokenizeBody)
        context.check_model(body.model)
        return await context.json_off_loop(to_text, body, service)

    async def tokenizer_info() -> Response:
        """Return what a client needs to know of the tokenizer: special tokens, size, chat template."""
        return JsonResponse(facts(context.service))

    tags: dict[str, Any] = {"methods": ["POST"], "tags": ["tokens"]}
    app.add_api_route("/tokenize", tokenize, **tags, **describe_body(TokenizeBody))
    app.add_api_route("/detokenize", detokenize, **tags, **describe_body(DetokenizeBody))
    app.add_api_route(
        "/tokenizer_info", tokenizer_info, methods=["GET"], tags=["tokens"], **describe_answer(400, 503)
    )


def to_ids(body: TokenizeBody, service: EngineService, context: ServeContext) -> dict[str, Any]:
    """Return what `/tokenize` answers. Raises RequestError."""
    ids = _chat_ids(body, context) if body.messages is not None else _text_ids(body, service, context)
    names = [service.prompts.tokenizer.token_text(token_id) for token_id in ids]
    return {
        "count": len(ids),
        "max_model_len": service.info.limits.max_seq_len,
        "tokens": ids,
        "token_strs": names if body.return_token_strs else None,
    }


def _text_ids(body: TokenizeBody, service: EngineService, context: ServeContext) -> list[int]:
    if body.prompt is None:
        raise refused("prompt", "is missing; give a text as prompt, or messages")
    for name in ("add_generation_prompt", "continue_final_message", "chat_template_kwargs"):
        if getattr(body, name) is not None:
            raise refused(name, "belongs to messages, and a prompt is given; leave it out")
    context.prompts.check_size(body.prompt, "prompt")
    return service.prompts.tokenizer.encode(
        body.prompt, add_special_tokens=body.add_special_tokens is not False
    )


def _chat_ids(body: TokenizeBody, context: ServeContext) -> list[int]:
    if body.prompt is not None:
        raise refused("messages", "and prompt are both given; give one of them")
    if body.add_special_tokens:
        what = "is true, and a chat's special tokens are the template's to write; leave it out"
        raise refused("add_special_tokens", what)
    check_message_fields(body.messages)
    continues = bool(body.continue_final_message)
    if continues and body.add_generation_prompt:
        raise refused("continue_final_message", "and add_generation_prompt exclude each other; give one")
    return context.prompts.encode_chat(
        body.messages,
        add_generation_prompt=not continues and body.add_generation_prompt is not False,
        continue_final_message=continues,
        variables=check_template_kwargs(body.chat_template_kwargs, context.prompts.template_variables),
    ).token_ids


def to_text(body: DetokenizeBody, service: EngineService) -> dict[str, Any]:
    """Return what `/detokenize` answers. Raises RequestError."""
    ids = checked_ids(listed(body.tokens, "tokens", MAX_IDS, "the cap"), service.info.limits, "tokens")
    return {"prompt": service.prompts.tokenizer.decode(ids, skip_special_tokens=False)}


def facts(service: EngineService) -> dict[str, Any]:
    """Return what `/tokenizer_info` answers, special tokens by the names that templates use."""
    tokenizer = service.prompts.tokenizer
    return {
        **tokenizer.special_tokens,
        "vocab_size": tokenizer.vocab_size,
        "model_max_length": service.info.limits.max_seq_len,
        "chat_template": tokenizer.chat_template,
    }

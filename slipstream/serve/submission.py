"""How do checked prompts become a running answer? Fan-out, place in the queue, submission, first output.

Invariants: keys share no cached prefixes; nothing is submitted unless every prompt of the body was accepted;
what a client could be told by a status is found out before the answer begins, so a stream starts with its
first output.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request as HttpRequest

from slipstream.core.outputs import RequestOutput
from slipstream.core.request import Request
from slipstream.serve.auth import key_name_of
from slipstream.serve.context import ServeContext
from slipstream.serve.errors import ApiError
from slipstream.serve.streams import AnswerStream, Arrival

TIMED_OUT = "The request ran out of time before its first token; send it again, or allow it more time."


class AnswerHead:
    """What every part of one answer repeats: its id, the model's name, and when it was made."""

    def __init__(self, prefix: str, model: str) -> None:
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self.model = model
        self.created = int(time.time())

    def fields(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def check_fan_out(num_prompts: int, num_samples: int, context: ServeContext) -> None:
    """Refuse more engine requests than one body may ask for. Raises ApiError."""
    allowed = context.settings.max_fan_out
    if num_prompts * num_samples > allowed:
        message = (
            f"{num_prompts} prompts with {num_samples} samples each are {num_prompts * num_samples} "
            f"sequences, and one request may ask for {allowed}; send several requests."
        )
        param = "prompt" if num_prompts > 1 else "n"
        raise ApiError(400, message, param=param, code="fan_out_exceeded")


async def submit(
    http: HttpRequest, context: ServeContext, requests: Sequence[Request], *, streams: bool = False
) -> AnswerStream:
    """Take a place in the queue and send the requests. Raises ApiError where there is none."""
    service = context.check_open()
    key = key_name_of(http.scope)
    requests = [in_namespace(request, key) for request in requests]
    num_tokens = sum(len(request.prompt_token_ids) for request in requests)
    assert context.admission is not None, "it is there before the engine is"
    ticket = context.admission.admit(
        key,
        num_requests=sum(request.num_samples for request in requests),
        num_tokens=num_tokens,
    )
    stream = AnswerStream(context.hub, service, on_close=ticket.release)
    stream.start(requests, streams=streams)
    stream.watch(http.receive)
    return stream


def in_namespace(request: Request, key: str) -> Request:
    """Return a request whose cached prefixes are its key's alone: nobody learns by a hit what others send."""
    if not key:
        return request
    # A key's name holds no space, so no two pairs of name and salt are spelled alike.
    spelled = f"{key} {request.cache_salt or ''}".encode()
    return dataclasses.replace(request, cache_salt=hashlib.sha256(spelled).hexdigest())


async def answers(
    http: HttpRequest, context: ServeContext, requests: Sequence[Request]
) -> list[RequestOutput]:
    """Return the last output of each request. Raises where one failed: nothing is half an answer."""
    stream = await submit(http, context, requests)
    try:
        outputs = await stream.last()
    finally:
        stream.close()
    for output in outputs:
        check_output(output)
        check_in_time(output)
    return outputs


async def begin(
    http: HttpRequest, context: ServeContext, requests: Sequence[Request]
) -> tuple[AnswerStream, list[Arrival]]:
    """Start a stream and wait for its first outputs, so that an early failure still has a status."""
    stream = await submit(http, context, requests, streams=True)
    try:
        first = await stream.next()
        for _, output in first:
            check_output(output)
            check_in_time(output)
    except BaseException:
        stream.close()
        raise
    return stream, first


def check_output(output: RequestOutput) -> None:
    """Raise what the engine said went wrong."""
    if output.error is not None:
        raise output.error


def check_in_time(output: RequestOutput) -> None:
    """Raise 504 for a request whose time ended before its first token."""
    if output.outputs and all(one.finish_reason == "timeout" and not one.token_ids for one in output.outputs):
        raise ApiError(504, TIMED_OUT, code="timeout")


class Usage:
    """Counts the tokens of an answer as its outputs come."""

    def __init__(self) -> None:
        self._prompts: dict[int, tuple[int, int]] = {}
        self._num_completion = 0

    def add(self, position: int, output: RequestOutput) -> None:
        """Count an output that holds only what is new, or the whole."""
        self._prompts[position] = (len(output.prompt_token_ids), output.num_cached_tokens)
        self._num_completion += sum(len(sample.token_ids) for sample in output.outputs)

    def fields(self) -> dict[str, Any]:
        num_prompt = sum(num for num, _ in self._prompts.values())
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": self._num_completion,
            "total_tokens": num_prompt + self._num_completion,
            "prompt_tokens_details": {"cached_tokens": sum(cached for _, cached in self._prompts.values())},
        }

"""Which fields may a body hold? Those its model declares; names from elsewhere are refused with a reason.

Invariant: nothing is accepted and ignored. A field that is not served passes only with a value that asks for
nothing (null, or what `Unserved.harmless` lists), and an unknown one is refused with the nearest name.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, WithJsonSchema

from slipstream.core.checks import shown
from slipstream.core.errors import nearest
from slipstream.serve.errors import ApiError

MAX_NAME = 64


class RequestBody(BaseModel):
    """Base of all bodies: JSON types are taken as they are, never converted."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())

    unserved: ClassVar[dict[str, Unserved]] = {}


@dataclasses.dataclass(frozen=True, slots=True)
class Unserved:
    """Why a known field is refused, and the values that mean "not asked for"."""

    advice: str
    harmless: tuple[Any, ...] = ()


def optional(schema: dict[str, Any]) -> WithJsonSchema:
    """Let the OpenAPI document show a field as `schema` or null, while any value passes here.

    For what the engine's own gate checks: pydantic would walk every id of a list, and name each wrong one.
    """
    return WithJsonSchema({"anyOf": [schema, {"type": "null"}]})


IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
IdList = Annotated[Any, optional(IDS)]


def check_fields(body: dict[str, Any], model: type[RequestBody]) -> None:
    """Refuse what `model` does not have, and drop from `body` what asks for nothing. Raises ApiError."""
    fields = model.model_fields
    for name in [name for name in body if name not in fields]:
        known = model.unserved.get(name)
        if known is None:
            raise _unknown(name, model)
        value = body.pop(name)
        if value is None or any(type(value) is type(h) and value == h for h in known.harmless):
            continue
        message = f"{name} is not served by this version; {known.advice}. Given: {shown(value)}."
        raise ApiError(400, message, param=name, code="unsupported")


def _unknown(name: str, model: type[RequestBody]) -> ApiError:
    short = name if len(name) <= MAX_NAME else name[:MAX_NAME] + "..."
    hint = nearest(short, model.model_fields)
    message = f"There is no field {short!r} here; see /openapi.json for those there are.{hint}"
    return ApiError(400, message, param=short, code="unknown_field")


LEAVE_OUT = "leave it out"
GUIDED = "output cannot be constrained yet; leave it out and ask for the format in the prompt"
TOOLS = "tools cannot be called yet; leave them out"
ADAPTERS = "merge the adapter into the checkpoint"
# Shared by all bodies that generate.
UNSERVED_GENERATION: dict[str, Unserved] = {
    **{
        name: Unserved(GUIDED)
        for name in (
            "guided_json",
            "guided_regex",
            "guided_choice",
            "guided_grammar",
            "guided_decoding_backend",
            "guided_whitespace_pattern",
            "guided_decoding",
            "structured_outputs",
            "structural_tag",
            "json_schema",
            "regex",
            "ebnf",
            "grammar",
        )
    },
    "response_format": Unserved(GUIDED, ({"type": "text"},)),
    "lora_request": Unserved(ADAPTERS),
    "lora_path": Unserved(ADAPTERS),
    "store": Unserved("nothing is stored; leave it out", (False,)),
    "metadata": Unserved("it labels stored answers, and nothing is stored; leave it out", ({},)),
    "service_tier": Unserved("there is one tier; leave it out", ("auto", "default")),
    "request_id": Unserved("send the header X-Request-Id instead"),
    "logits_processors": Unserved("code from requests is never run"),
    "return_hidden_states": Unserved(LEAVE_OUT, (False,)),
    "return_context_logits": Unserved("ask for prompt_logprobs", (False,)),
    "return_generation_logits": Unserved("ask for logprobs", (False,)),
    "kv_transfer_params": Unserved(LEAVE_OUT),
    "disaggregated_params": Unserved(LEAVE_OUT),
    "vllm_xargs": Unserved(LEAVE_OUT),
    "mm_processor_kwargs": Unserved("media are not served"),
    "return_perf_metrics": Unserved("timings are in /metrics", (False,)),
}
# Shared by all bodies with messages.
UNSERVED_CHAT: dict[str, Unserved] = {
    "tools": Unserved(TOOLS, ([],)),
    "tool_choice": Unserved(TOOLS, ("none",)),
    "parallel_tool_calls": Unserved(TOOLS),
    "functions": Unserved(TOOLS, ([],)),
    "function_call": Unserved(TOOLS, ("none",)),
    "chat_template": Unserved("the model's own template is used; code from requests is never run"),
    "documents": Unserved("put the documents into a message", ([],)),
}

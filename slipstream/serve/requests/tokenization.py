"""What may the bodies of `/tokenize` and `/detokenize` say?"""

from __future__ import annotations

from typing import ClassVar

from slipstream.serve.requests.base import UNSERVED_CHAT, IdList, RequestBody, Unserved
from slipstream.serve.requests.chat import Messages, Variables


class TokenizeBody(RequestBody):
    """A text, or messages as a chat would see them."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Variables = None

    unserved: ClassVar[dict[str, Unserved]] = UNSERVED_CHAT


class DetokenizeBody(RequestBody):
    """Ids to be turned into text; special tokens show."""

    model: str | None = None
    tokens: IdList = None

"""What may the body of `/v1/embeddings` say?"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from slipstream.serve.requests.base import IdList, RequestBody, Unserved, optional
from slipstream.serve.requests.completion import PROMPT

Input = Annotated[Any, optional(PROMPT)]


class EmbeddingBody(RequestBody):
    """The body of `/v1/embeddings`. `pooling` and `normalize` are as in `LLM.encode`."""

    model: str | None = None
    input: Input = None
    prompt_token_ids: IdList = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    pooling: Literal["mean", "last", "cls"] | None = None
    normalize: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    priority: int | None = None
    cache_salt: str | None = None
    user: str | None = None
    timeout: float | None = None

    unserved: ClassVar[dict[str, Unserved]] = {
        "messages": Unserved("give the text as input"),
        "embedding_types": Unserved("set encoding_format"),
        "input_type": Unserved("write what the model expects into the input"),
    }

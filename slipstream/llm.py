"""The Python door: `LLM` turns prompts into outputs, whole or streamed."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import uuid
import weakref
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from slipstream.core.errors import ConfigError, RequestError
from slipstream.core.outputs import CompletionOutput, RequestOutput
from slipstream.core.request import Request
from slipstream.core.sampling_params import SamplingParams
from slipstream.engine.assembly import Assembly, assemble
from slipstream.engine.client import InProcessClient
from slipstream.engine.config import EngineConfig
from slipstream.engine.generation import Generation
from slipstream.engine.output_processor import OutputProcessor
from slipstream.engine.progress import generating_bar, loading_bar
from slipstream.engine.pump import Pump
from slipstream.text.base import Tokenizer
from slipstream.text.chat_prompt import encode_chat
from slipstream.text.chat_template import ChatTemplate

logger = logging.getLogger(__name__)

Prompt = str | Sequence[int] | Mapping[str, Any]
Message = Mapping[str, Any]
PROMPT_KEYS = ("prompt", "prompt_token_ids")


@dataclasses.dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt as ids, or why it cannot be: an error here is this prompt's alone."""

    token_ids: list[int]
    text: str | None = None
    error: RequestError | None = None


class LLM:
    """A loaded model behind a batching engine.

    `model` is a `.gguf` file, a Hugging Face folder or a hub id; every other argument is an option of
    `EngineConfig` (an unknown one raises, with the nearest name). Methods may be called from any thread. Use
    it as a context manager or call `shutdown`; a deleted LLM stops by itself. Raises ConfigError,
    CheckpointError or OutOfMemoryError where the engine cannot start.
    """

    def __init__(self, model: Any, *, use_tqdm: bool | None = None, **options: Any) -> None:
        config = EngineConfig(model=model, **options)
        with loading_bar(use_tqdm) as progress:
            self._assembly = assemble(config, progress=progress)
        self._llm_id = f"llm-{uuid.uuid4().hex[:12]}"
        self._template = chat_template_of(self._assembly.tokenizer)
        self._seed = config.seed
        self._ordinals = itertools.count()
        processor = OutputProcessor(self._assembly.tokenizer, stream_interval=config.stream_interval)
        self._pump = Pump(InProcessClient(self._assembly.engine), processor)
        # Holds the pump, not self: a deleted LLM (or the interpreter's exit) ends the engine's thread.
        self._finalizer = weakref.finalize(self, Pump.stop, self._pump)

    @property
    def tokenizer(self) -> Tokenizer:
        tokenizer = self._assembly.tokenizer
        if tokenizer is None:
            raise ConfigError(
                "This LLM has no tokenizer: it was started with skip_tokenizer_init=True, or with "
                "load_format='dummy' from a folder without one. Give token ids as prompts, or name a folder "
                "with tokenizer=..."
            )
        return tokenizer

    @property
    def llm_id(self) -> str:
        return self._llm_id

    @property
    def startup(self) -> Assembly:
        """What was chosen at start and why, the memory ledger and the limits of a request."""
        return self._assembly

    def get_stats(self) -> dict[str, int]:
        """Return the engine's counters: executed and cached tokens, plans, preemptions, free pages, ..."""
        scheduler = self._assembly.engine.scheduler
        return {
            **dataclasses.asdict(scheduler.stats),
            "num_running": scheduler.num_running,
            "num_waiting": scheduler.num_waiting,
            "num_free_pages": scheduler.cache.pool.num_free,
            "num_pages": scheduler.cache.pool.num_usable,
        }

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | None = None,
        raise_on_error: bool = False,
    ) -> Any:
        """Complete one prompt (returns a RequestOutput) or a list of prompts (returns a list, in order).

        A prompt is a string, a list of token ids, {"prompt": str} or {"prompt_token_ids": ids}. One
        `sampling_params` serves all prompts, or a list gives one each. A refused or failed prompt has its
        `error` set and never loses the others, unless `raise_on_error`.
        """
        batch, is_single = split_prompts(prompts)
        encoded = [self._encode(prompt) for prompt in batch]
        outputs = self._run(encoded, sampling_params, use_tqdm, raise_on_error)
        return outputs[0] if is_single else outputs

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        use_tqdm: bool | None = None,
        raise_on_error: bool = False,
    ) -> Any:
        """Answer one conversation (a list of {"role", "content"}) or a list of conversations."""
        is_single = not messages or isinstance(messages[0], Mapping)
        conversations: Any = [messages] if is_single else messages
        encoded = [
            self._encode_chat(conversation, add_generation_prompt, chat_template_kwargs or {})
            for conversation in conversations
        ]
        outputs = self._run(encoded, sampling_params, use_tqdm, raise_on_error)
        return outputs[0] if is_single else outputs

    def generate_async(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        streaming: bool = False,
        request_id: str | None = None,
    ) -> Generation:
        """Start one prompt and return at once; iterate (`for`, `async for`), await or `result()` the handle.

        With `streaming` every update is an output, with `text_diff` and `token_ids_diff`; without it only the
        last. Raises RequestError where the prompt is refused.
        """
        return self._start(self._encode(prompt), sampling_params, streaming, request_id)

    def chat_async(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        streaming: bool = False,
        request_id: str | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Generation:
        """Start one conversation's answer; see `generate_async`."""
        encoded = self._encode_chat(messages, add_generation_prompt, chat_template_kwargs or {})
        return self._start(encoded, sampling_params, streaming, request_id)

    def _start(
        self, encoded: Encoded, params: SamplingParams | None, streaming: bool, request_id: str | None
    ) -> Generation:
        request = self._request(encoded, params or SamplingParams(), request_id)
        generation = Generation(request.request_id, self._pump.client.abort)
        self._pump.submit([(request, generation.put)], streams=streaming)
        return generation

    def _run(
        self,
        encoded: Sequence[Encoded],
        params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool | None,
        raise_on_error: bool,
    ) -> list[RequestOutput]:
        """Submit a batch together, wait for all of it, and return the outputs in order."""
        each = spread_params(params, len(encoded))
        slots: list[RequestOutput | Generation] = []
        batch: list[tuple[Request, Any]] = []
        for item, one in zip(encoded, each, strict=True):
            try:
                request = self._request(item, one, None)
            except RequestError as error:
                if raise_on_error:
                    raise
                slots.append(_failed(item, error))
                continue
            generation = Generation(request.request_id, self._pump.client.abort)
            slots.append(generation)
            batch.append((request, generation.put))
        self._pump.submit(batch)
        outputs = self._wait(slots, use_tqdm)
        for output in outputs:
            if raise_on_error and output.error is not None:
                raise output.error
        return outputs

    def _wait(
        self, slots: Sequence[RequestOutput | Generation], use_tqdm: bool | None
    ) -> list[RequestOutput]:
        outputs: list[RequestOutput] = []
        try:
            with generating_bar(len(slots), use_tqdm) as advance:
                for slot in slots:
                    outputs.append(slot if isinstance(slot, RequestOutput) else slot.result())
                    advance(sum(len(sample.token_ids) for sample in outputs[-1].outputs))
        except BaseException:
            # Ctrl-C or a failure: nobody waits for these any more.
            for slot in slots:
                if isinstance(slot, Generation):
                    slot.abort()
            raise
        return outputs

    def _request(self, encoded: Encoded, params: SamplingParams, request_id: str | None) -> Request:
        if encoded.error is not None:
            raise encoded.error
        ordinal = next(self._ordinals)
        request = Request.create(
            encoded.token_ids,
            params,
            self._assembly.limits,
            request_id=request_id or f"{self._llm_id}-{ordinal}",
            prompt=encoded.text,
            default_seed=None if self._seed is None else (self._seed + ordinal) % 2**63,
        )
        if request.stop and self._assembly.tokenizer is None:
            raise RequestError(
                "stop strings need a tokenizer, and this LLM has none; use stop_token_ids.",
                param="stop",
            )
        return request

    def _encode(self, prompt: Prompt) -> Encoded:
        """Turn a prompt of any accepted form into ids; a failure becomes this prompt's error."""
        try:
            text, token_ids = split_prompt(prompt)
            if token_ids is None:
                assert text is not None
                token_ids = self._tokenize(text)
            return Encoded(token_ids, text)
        except RequestError as error:
            return Encoded([], prompt if isinstance(prompt, str) else None, error)

    def _tokenize(self, text: str) -> list[int]:
        if not text:
            raise RequestError("The prompt is empty; give at least one character or token.", param="prompt")
        try:
            return self.tokenizer.encode(text)
        except (RequestError, ConfigError):
            raise
        except Exception as error:
            logger.exception("tokenizing a prompt failed")
            raise RequestError(
                f"The prompt cannot be tokenized: {type(error).__name__}.", param="prompt"
            ) from error

    def _encode_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool, template_kwargs: Mapping[str, Any]
    ) -> Encoded:
        try:
            chat = encode_chat(
                self.tokenizer,
                self._template,
                messages,
                add_generation_prompt=add_generation_prompt,
                **template_kwargs,
            )
            return Encoded(chat.token_ids, chat.text)
        except RequestError as error:
            return Encoded([], None, error)

    def shutdown(self) -> None:
        """Stop the engine; pending requests fail with code "engine_stopped". Idempotent."""
        self._finalizer()
        if self._template is not None:
            self._template.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()


def chat_template_of(tokenizer: Tokenizer | None) -> ChatTemplate | None:
    """Return a model's own chat template, or None where it has none."""
    if tokenizer is None or not tokenizer.chat_template:
        return None
    return ChatTemplate(tokenizer.chat_template, special_tokens=tokenizer.special_tokens)


def split_prompts(prompts: Any) -> tuple[list[Prompt], bool]:
    """Return (list of prompts, whether one was given by itself). A list of ids is one prompt."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts], True
    if not isinstance(prompts, Sequence) or not len(prompts):
        raise RequestError(
            "No prompt was given; pass a string, a list of token ids, {'prompt': ...}, "
            "{'prompt_token_ids': ...} or a non-empty list of these.",
            param="prompt",
        )
    if all(isinstance(item, (str, Mapping, Sequence)) for item in prompts):
        return list(prompts), False
    return [prompts], True


def split_prompt(prompt: Any) -> tuple[str | None, list[int] | None]:
    """Return (text, ids) of one prompt, one of the two at most None. Raises RequestError."""
    if isinstance(prompt, str):
        return prompt, None
    if isinstance(prompt, Mapping):
        unknown = [key for key in prompt if key not in PROMPT_KEYS]
        if unknown or not prompt:
            raise RequestError(
                f"A prompt dictionary has the keys {', '.join(PROMPT_KEYS)}; given: {list(prompt)}.",
                param="prompt",
            )
        text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        if (text is None and ids is None) or (text is not None and not isinstance(text, str)):
            raise RequestError("'prompt' must be a string, or give 'prompt_token_ids'.", param="prompt")
        return text, ids
    if isinstance(prompt, Sequence):
        return None, prompt  # type: ignore[return-value]
    raise RequestError(
        f"A prompt is a string, a list of token ids or a dictionary, not {type(prompt).__name__}.",
        param="prompt",
    )


def spread_params(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> Sequence[SamplingParams]:
    """Give each of `count` prompts its parameters. Raises RequestError where the counts differ."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise RequestError(
            f"{len(params)} sampling_params for {count} prompts; give one for all, or one for each.",
            param="sampling_params",
        )
    return params


def _failed(encoded: Encoded, error: RequestError) -> RequestOutput:
    return RequestOutput(
        request_id="",
        prompt=encoded.text,
        prompt_token_ids=encoded.token_ids,
        outputs=[CompletionOutput(0, finish_reason="error")],
        finished=True,
        error=error,
    )

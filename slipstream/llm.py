"""The Python door: `LLM` turns prompts into outputs, whole or streamed."""

from __future__ import annotations

import dataclasses
import itertools
import uuid
import weakref
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from slipstream.core.errors import RequestError
from slipstream.core.kv_retention import KvCacheRetentionConfig
from slipstream.core.outputs import CompletionOutput, RequestOutput
from slipstream.core.request import Request, RequestOptions
from slipstream.core.sampling_params import SamplingParams
from slipstream.engine.assembly import Assembly, assemble
from slipstream.engine.client import InProcessClient
from slipstream.engine.config import EngineConfig
from slipstream.engine.generation import Generation
from slipstream.engine.output_processor import OutputProcessor
from slipstream.engine.progress import generating_bar, loading_bar
from slipstream.engine.prompts import Encoded, Message, Prompt, PromptEncoder, split_prompts, spread_params
from slipstream.engine.pump import Pump
from slipstream.text.base import Tokenizer


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
        self._prompts = PromptEncoder(self._assembly.tokenizer)
        self._seed = config.seed
        self._ordinals = itertools.count()
        processor = OutputProcessor(self._assembly.tokenizer, stream_interval=config.stream_interval)
        self._pump = Pump(InProcessClient(self._assembly.engine), processor)
        # Holds the pump, not self: a deleted LLM (or the interpreter's exit) ends the engine's thread.
        self._finalizer = weakref.finalize(self, Pump.stop, self._pump)

    @property
    def tokenizer(self) -> Tokenizer:
        return self._prompts.tokenizer

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
        timeout_s: float | None = None,
        kv_cache_retention_config: KvCacheRetentionConfig | None = None,
    ) -> Any:
        """Complete one prompt (returns a RequestOutput) or a list of prompts (returns a list, in order).

        A prompt is a string, a list of token ids, {"prompt": str} or {"prompt_token_ids": ids}. One
        `sampling_params` serves all prompts, or a list gives one each. A refused or failed prompt has its
        `error` set and never loses the others, unless `raise_on_error`. What takes longer than `timeout_s`
        ends with finish_reason "timeout" and what it has.
        """
        batch, is_single = split_prompts(prompts)
        encoded = [self._prompts.encode(prompt) for prompt in batch]
        options = RequestOptions(timeout_s=timeout_s, kv_retention=kv_cache_retention_config)
        outputs = self._run(encoded, sampling_params, options, use_tqdm, raise_on_error)
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
        timeout_s: float | None = None,
        kv_cache_retention_config: KvCacheRetentionConfig | None = None,
    ) -> Any:
        """Answer one conversation (a list of {"role", "content"}) or a list of conversations."""
        is_single = not messages or isinstance(messages[0], Mapping)
        conversations: Any = [messages] if is_single else messages
        encoded = [
            self._prompts.encode_chat(conversation, add_generation_prompt, chat_template_kwargs or {})
            for conversation in conversations
        ]
        options = RequestOptions(timeout_s=timeout_s, kv_retention=kv_cache_retention_config)
        outputs = self._run(encoded, sampling_params, options, use_tqdm, raise_on_error)
        return outputs[0] if is_single else outputs

    def generate_async(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        streaming: bool = False,
        request_id: str | None = None,
        timeout_s: float | None = None,
        kv_cache_retention_config: KvCacheRetentionConfig | None = None,
    ) -> Generation:
        """Start one prompt and return at once; iterate (`for`, `async for`), await or `result()` the handle.

        With `streaming` every update is an output, with `text_diff` and `token_ids_diff`; without it only the
        last. Raises RequestError where the prompt is refused.
        """
        options = RequestOptions(timeout_s=timeout_s, kv_retention=kv_cache_retention_config)
        return self._start(self._prompts.encode(prompt), sampling_params, options, streaming, request_id)

    def chat_async(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        streaming: bool = False,
        request_id: str | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
        kv_cache_retention_config: KvCacheRetentionConfig | None = None,
    ) -> Generation:
        """Start one conversation's answer; see `generate_async`."""
        encoded = self._prompts.encode_chat(messages, add_generation_prompt, chat_template_kwargs or {})
        options = RequestOptions(timeout_s=timeout_s, kv_retention=kv_cache_retention_config)
        return self._start(encoded, sampling_params, options, streaming, request_id)

    def _start(
        self,
        encoded: Encoded,
        params: SamplingParams | None,
        options: RequestOptions,
        streaming: bool,
        request_id: str | None,
    ) -> Generation:
        request = self._request(encoded, params or SamplingParams(), options, request_id)
        generation = Generation(request.request_id, self._pump.client.abort)
        self._pump.submit([(request, generation.put)], streams=streaming)
        return generation

    def _run(
        self,
        encoded: Sequence[Encoded],
        params: SamplingParams | Sequence[SamplingParams] | None,
        options: RequestOptions,
        use_tqdm: bool | None,
        raise_on_error: bool,
    ) -> list[RequestOutput]:
        """Submit a batch together, wait for all of it, and return the outputs in order."""
        each = spread_params(params, len(encoded))
        slots: list[RequestOutput | Generation] = []
        batch: list[tuple[Request, Any]] = []
        for item, one in zip(encoded, each, strict=True):
            try:
                request = self._request(item, one, options, None)
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

    def _request(
        self, encoded: Encoded, params: SamplingParams, options: RequestOptions, request_id: str | None
    ) -> Request:
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
            options=options,
        )
        if request.stop and self._assembly.tokenizer is None:
            raise RequestError(
                "stop strings need a tokenizer, and this LLM has none; use stop_token_ids.",
                param="stop",
            )
        return request

    def shutdown(self) -> None:
        """Stop the engine; pending requests fail with code "engine_stopped". Idempotent."""
        self._finalizer()
        self._prompts.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()


def _failed(encoded: Encoded, error: RequestError) -> RequestOutput:
    return RequestOutput(
        request_id="",
        prompt=encoded.text,
        prompt_token_ids=encoded.token_ids,
        outputs=[CompletionOutput(0, finish_reason="error")],
        finished=True,
        error=error,
    )

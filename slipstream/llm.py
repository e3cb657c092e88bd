"""The Python door: `LLM` turns prompts into outputs, whole or streamed; `AsyncLLM` does so for asyncio."""

from __future__ import annotations

import asyncio
import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from slipstream.core.errors import EngineError, RequestError
from slipstream.core.kv_retention import KvCacheRetentionConfig
from slipstream.core.outputs import CompletionOutput, RequestOutput
from slipstream.core.request import Request, RequestOptions
from slipstream.core.sampling_params import SamplingParams
from slipstream.engine.assembly import Assembly
from slipstream.engine.config import EngineConfig
from slipstream.engine.generation import Answer, Generation
from slipstream.engine.pooling import check_pooling, hidden_states_only, pool
from slipstream.engine.progress import generating_bar, loading_bar
from slipstream.engine.prompts import Encoded, Message, Prompt, split_prompts, spread_params
from slipstream.engine.service import EngineService, local_service
from slipstream.engine.step_records import EngineTrace
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
            self._service = local_service(config, progress=progress)
        # Holds the service, not self: a deleted LLM (or the interpreter's exit) ends the engine's thread.
        self._finalizer = weakref.finalize(self, EngineService.close, self._service)

    @property
    def tokenizer(self) -> Tokenizer:
        return self._service.prompts.tokenizer

    @property
    def llm_id(self) -> str:
        return self._service.service_id

    @property
    def startup(self) -> Assembly:
        """What was chosen at start and why, the memory ledger and the limits of a request."""
        assert self._service.assembly is not None, "the engine is in this process"
        return self._service.assembly

    def get_stats(self) -> dict[str, Any]:
        """Return the engine's counters, all of one moment between two steps.

        Executed and cached tokens, plans, preemptions, free pages, `kv_cache_usage` and `prefix_hit_rate`
        (from 0 to 1), `finish_reasons` (samples ended, by reason) and more.
        """
        return self._service.stats().result()

    async def get_stats_async(self) -> dict[str, Any]:
        """Return the same as `get_stats` without blocking the event loop."""
        return await asyncio.wrap_future(self._service.stats())

    def get_trace(self) -> EngineTrace:
        """Return what the engine's last steps and their requests did, oldest first, as plain records.

        `slipstream.trace.page` draws them. What there is room for is bounded; the oldest goes first.
        """
        return self._service.command("trace").result()

    def get_kv_cache_events(self) -> list[dict[str, Any]]:
        """Return what the KV cache stored and removed since the last call, oldest first."""
        return self._service.command("kv_cache_events").result()

    async def get_kv_cache_events_async(self) -> list[dict[str, Any]]:
        """Return the same as `get_kv_cache_events` without blocking the event loop."""
        return await asyncio.wrap_future(self._service.command("kv_cache_events"))

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix, between two steps; what runs is not touched."""
        self._service.command("reset_prefix_cache").result()

    def sleep(self, level: int = 1) -> None:
        """Free the KV cache (level 1), or the weights too (level 2), once nothing runs; waits until then.

        Requests are refused until `wake_up`. Raises ConfigError for another level, or where the weights
        could not be read again.
        """
        self._service.command("sleep", level=level).result()

    def wake_up(self) -> None:
        """Allocate again what `sleep` freed; weights come from the checkpoint. Without effect when awake."""
        self._service.command("wake_up").result()

    def update_weights(self, source: str | Path | Mapping[str, Any]) -> None:
        """Replace the weights once nothing runs; later requests wait for it and reuse no earlier prefix.

        `source` is a checkpoint of the same configuration, or every tensor by its Hugging Face name. Raises
        CheckpointError where it does not fit: the old weights stay. If reading it fails half-way, requests
        are refused until an update succeeds.
        """
        self._service.command("update_weights", source=source).result()

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
        encoded = [self._service.prompts.encode(prompt) for prompt in batch]
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
            self._service.prompts.encode_chat(conversation, add_generation_prompt, chat_template_kwargs or {})
            for conversation in conversations
        ]
        options = RequestOptions(timeout_s=timeout_s, kv_retention=kv_cache_retention_config)
        outputs = self._run(encoded, sampling_params, options, use_tqdm, raise_on_error)
        return outputs[0] if is_single else outputs

    def encode(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: str = "mean",
        normalize: bool = False,
        use_tqdm: bool | None = None,
        raise_on_error: bool = False,
    ) -> Any:
        """Turn one prompt into an EmbeddingOutput, or a list of prompts into a list of them.

        `pooling` makes one vector of the hidden states after the final norm: their "mean", the "last" or the
        first ("cls"). `normalize` scales it to length 1. Raises ConfigError for another pooling.
        """
        check_pooling(pooling)
        batch, is_single = split_prompts(prompts)
        encoded = [self._service.prompts.encode(prompt) for prompt in batch]
        params = SamplingParams(max_tokens=1, detokenize=False)
        outputs = self._run(
            encoded, params, RequestOptions(), use_tqdm, raise_on_error, change=hidden_states_only
        )
        embeddings = [pool(output, pooling, normalize=normalize) for output in outputs]
        return embeddings[0] if is_single else embeddings

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
        return self._start(
            self._service.prompts.encode(prompt), sampling_params, options, streaming, request_id
        )

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
        encoded = self._service.prompts.encode_chat(
            messages, add_generation_prompt, chat_template_kwargs or {}
        )
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
        request = self._service.create_request(
            encoded, params or SamplingParams(), request_id=request_id, options=options
        )
        generation = Generation(request.request_id, self._service.abort)
        self._service.submit(request, generation.put, streams=streaming)
        return generation

    def _run(
        self,
        encoded: Sequence[Encoded],
        params: SamplingParams | Sequence[SamplingParams] | None,
        options: RequestOptions,
        use_tqdm: bool | None,
        raise_on_error: bool,
        *,
        change: Callable[[Request], Request] | None = None,
    ) -> list[RequestOutput]:
        """Submit a batch together, wait for all of it, and return the outputs in order."""
        each = spread_params(params, len(encoded))
        slots: list[RequestOutput | Generation] = []
        batch: list[tuple[Request, Any]] = []
        for item, one in zip(encoded, each, strict=True):
            try:
                request = self._service.create_request(item, one, options=options, change=change)
            except RequestError as error:
                if raise_on_error:
                    raise
                slots.append(_failed(item, error))
                continue
            generation = Generation(request.request_id, self._service.abort)
            slots.append(generation)
            batch.append((request, generation.put))
        outputs = self._wait(batch, slots, use_tqdm)
        for output in outputs:
            if raise_on_error and output.error is not None:
                raise output.error
        return outputs

    def _wait(
        self,
        batch: Sequence[tuple[Request, Any]],
        slots: Sequence[RequestOutput | Generation],
        use_tqdm: bool | None,
    ) -> list[RequestOutput]:
        outputs: list[RequestOutput] = []
        try:
            self._service.submit_batch(batch)
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

    def shutdown(self) -> None:
        """Stop the engine; pending requests fail with code "engine_stopped". Idempotent."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()


class AsyncLLM:
    """`LLM` for asyncio programs: the same engine, and nothing here blocks the event loop.

    `async with AsyncLLM(model=...) as llm`, or `llm = await AsyncLLM.create(model=...)`; arguments are those
    of `LLM`, and a wrong one raises at once. Cancelling a task that reads an answer aborts its request.
    """

    def __init__(self, model: Any, *, use_tqdm: bool | None = None, **options: Any) -> None:
        EngineConfig(model=model, **options)
        self._make: Callable[[], LLM] = lambda: LLM(model, use_tqdm=use_tqdm, **options)
        self._llm: LLM | None = None
        self._starting = asyncio.Lock()

    @classmethod
    async def create(cls, model: Any, *, use_tqdm: bool | None = None, **options: Any) -> Self:
        """Make one and load its model in a thread; see `LLM` for the arguments and what is raised."""
        llm = cls(model, use_tqdm=use_tqdm, **options)
        await llm.start()
        return llm

    async def start(self) -> None:
        """Load the model in a thread, once."""
        async with self._starting:
            if self._llm is None:
                self._llm = await asyncio.to_thread(self._make)

    @property
    def llm(self) -> LLM:
        """The synchronous engine behind this one, for what has no coroutine here."""
        if self._llm is None:
            raise EngineError(
                "This AsyncLLM is not started; use `async with AsyncLLM(...)`, `await AsyncLLM.create(...)` "
                "or `await llm.start()`."
            )
        return self._llm

    @property
    def tokenizer(self) -> Tokenizer:
        return self.llm.tokenizer

    @property
    def llm_id(self) -> str:
        return self.llm.llm_id

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        **options: Any,
    ) -> Answer:
        """Complete one prompt: `async for` streams its outputs, `await` returns the last one alone.

        The request is sent when it is first read; `options` are those of `LLM.generate_async`. Raises
        RequestError, then, where the prompt is refused.
        """
        start = functools.partial(
            self.llm.generate_async, prompt, sampling_params, request_id=request_id, **options
        )
        return Answer(lambda streaming: start(streaming=streaming))

    def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        **options: Any,
    ) -> Answer:
        """Answer one conversation; read it as `generate`. `options` are those of `LLM.chat_async`."""
        start = functools.partial(
            self.llm.chat_async, messages, sampling_params, request_id=request_id, **options
        )
        return Answer(lambda streaming: start(streaming=streaming))

    async def encode(self, prompts: Prompt | Sequence[Prompt], **options: Any) -> Any:
        """Embed prompts; see `LLM.encode`."""
        return await asyncio.to_thread(self.llm.encode, prompts, **options)

    def abort(self, request_id: str) -> None:
        """End a request; who reads it gets a last output with finish_reason "cancelled". Idempotent."""
        self.llm._service.abort(request_id)

    async def get_stats(self) -> dict[str, Any]:
        return await self.llm.get_stats_async()

    async def get_trace(self) -> EngineTrace:
        return await asyncio.wrap_future(self.llm._service.command("trace"))

    async def get_kv_cache_events(self) -> list[dict[str, Any]]:
        return await self.llm.get_kv_cache_events_async()

    async def reset_prefix_cache(self) -> None:
        await asyncio.wrap_future(self.llm._service.command("reset_prefix_cache"))

    async def sleep(self, level: int = 1) -> None:
        await asyncio.wrap_future(self.llm._service.command("sleep", level=level))

    async def wake_up(self) -> None:
        await asyncio.wrap_future(self.llm._service.command("wake_up"))

    async def update_weights(self, source: str | Path | Mapping[str, Any]) -> None:
        await asyncio.wrap_future(self.llm._service.command("update_weights", source=source))

    async def shutdown(self) -> None:
        """Stop the engine without blocking the event loop. Idempotent."""
        if self._llm is not None:
            await asyncio.to_thread(self._llm.shutdown)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.shutdown()


def _failed(encoded: Encoded, error: RequestError) -> RequestOutput:
    return RequestOutput(
        request_id="",
        prompt=encoded.text,
        prompt_token_ids=encoded.token_ids,
        outputs=[CompletionOutput(0, finish_reason="error")],
        finished=True,
        error=error,
    )

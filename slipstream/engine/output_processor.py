"""How do events become outputs? Detokenizing, stop strings and the n samples of a request, in one place.

Invariant: text and token ids end at the first stop, whatever the engine computed past it; an output never
shows the lag of an overlapped loop. A failure while processing one request is that request's error.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

from slipstream.core.errors import RequestError
from slipstream.core.outputs import (
    CompletionOutput,
    FinishReason,
    RequestMetrics,
    RequestOutput,
    TokenEvent,
)
from slipstream.core.plan import TokenLogprobs
from slipstream.core.request import Request
from slipstream.engine.prompt_extras import PromptExtras, joined_logits, logprob_entry
from slipstream.engine.request_counts import RequestCounts
from slipstream.text.base import Tokenizer
from slipstream.text.detokenizer import IncrementalDetokenizer
from slipstream.text.stop_strings import StopMatcher

logger = logging.getLogger(__name__)

Listener = Callable[[RequestOutput], None]
# Which updates a listener gets: only the last, all as they grow, or of each only what is new.
Streams = bool | Literal["delta"]


class Sample:
    """One of n outputs of a request, growing."""

    def __init__(self, request: Request, index: int, tokenizer: Tokenizer | None) -> None:
        params = request.params
        self.output = CompletionOutput(index)
        self._include_stop = params.include_stop_str_in_output
        self._tokenizer = tokenizer
        self._detokenizer: IncrementalDetokenizer | None = None
        if tokenizer is not None and params.detokenize:
            self._detokenizer = IncrementalDetokenizer(
                tokenizer,
                request.prompt_token_ids,
                skip_special_tokens=params.skip_special_tokens,
                spaces_between_special_tokens=params.spaces_between_special_tokens,
            )
        # Stop strings that are complete by then do not count.
        self._min_tokens = request.sampling.min_tokens
        self._matcher = StopMatcher(request.stop, include_stop=self._include_stop) if request.stop else None
        if request.sampling.logprobs >= 0:
            self.output.logprobs = []
            self.output.cumulative_logprob = 0.0
        self._logits: list[Any] | None = [] if "generation_logits" in request.logits else None
        self.last_token_s: float | None = None
        self.num_preemptions = 0
        self._shown_tokens = 0
        self._shown_text = 0
        self._has_shown_end = False

    @property
    def is_finished(self) -> bool:
        return self.output.finish_reason is not None

    @property
    def num_new_tokens(self) -> int:
        return len(self.output.token_ids) - self._shown_tokens

    def take(self, event: TokenEvent) -> bool:
        """Add an event's tokens; True where a stop string ended the sample before the engine did."""
        logits: list[Any] = []
        if event.extras:
            logits = [values for what, _, values in event.extras if what == "generation_logits"]
        is_stop_token = event.finish_reason == "stop" and event.stop_reason is not None
        last = len(event.new_token_ids) - 1
        for position, token in enumerate(event.new_token_ids):
            self.output.token_ids.append(token)
            if event.logprobs:
                self._take_logprobs(event.logprobs[position])
            if self._logits is not None:
                self._logits.append(logits[position])
            if self._detokenizer is None:
                continue
            is_hidden = is_stop_token and position == last and not self._include_stop
            stop = None if is_hidden else self._take_text(self._detokenizer, token)
            if stop is not None:
                self.output.finish_reason, self.output.stop_reason = "stop", stop
                return event.finish_reason is None
        if event.cumulative_logprob is not None:
            self.output.cumulative_logprob = event.cumulative_logprob
        if event.finish_reason is not None:
            self.finish(event.finish_reason, event.stop_reason)
        return False

    def finish(self, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """End the sample, releasing the text that was held back; a stop string in it still counts."""
        output = self.output
        output.finish_reason, output.stop_reason = reason, stop_reason
        if self._detokenizer is None:
            return
        rest = self._detokenizer.flush()
        if self._matcher is None:
            output.text += rest
            return
        released, stop = self._matched(self._matcher, rest)
        output.text += released
        if stop is None:
            output.text += self._matcher.flush()
        else:
            output.finish_reason, output.stop_reason = "stop", stop

    def _take_text(self, detokenizer: IncrementalDetokenizer, token: int) -> str | None:
        piece = detokenizer.append((token,))
        if self._matcher is None:
            self.output.text += piece
            return None
        released, stop = self._matched(self._matcher, piece)
        self.output.text += released
        return stop

    def _matched(self, matcher: StopMatcher, piece: str) -> tuple[str, str | None]:
        if len(self.output.token_ids) <= self._min_tokens:
            return matcher.skip(piece), None
        return matcher.feed(piece)

    def _take_logprobs(self, logprobs: TokenLogprobs) -> None:
        output = self.output
        assert output.logprobs is not None and output.cumulative_logprob is not None
        output.logprobs.append(logprob_entry(logprobs, self._tokenizer))
        output.cumulative_logprob += logprobs.logprob

    def snapshot(self, *, is_last: bool) -> CompletionOutput:
        """Return the output with what is new since the last one: a copy that later tokens do not change.

        After the last one there are none, and it is the output itself.
        """
        output = self.output
        if self._logits is not None and self.is_finished and output.generation_logits is None:
            output.generation_logits = joined_logits(self._logits)
            self._logits = None
        output.text_diff = output.text[self._shown_text :]
        output.token_ids_diff = output.token_ids[self._shown_tokens :]
        self._shown_text, self._shown_tokens = len(output.text), len(output.token_ids)
        if is_last:
            return output
        logprobs = None if output.logprobs is None else list(output.logprobs)
        return dataclasses.replace(output, token_ids=list(output.token_ids), logprobs=logprobs)

    def delta(self) -> CompletionOutput | None:
        """Return only what is new since the last one, None where nothing is. Its cost is that of the news."""
        output, start = self.output, self._shown_tokens
        ids, text = output.token_ids[start:], output.text[self._shown_text :]
        if self._has_shown_end or not (ids or text or self.is_finished):
            return None
        self._shown_text, self._shown_tokens = len(output.text), len(output.token_ids)
        self._has_shown_end = self.is_finished
        return CompletionOutput(
            output.index,
            text,
            ids,
            output.cumulative_logprob,
            None if output.logprobs is None else output.logprobs[start:],
            output.finish_reason,
            output.stop_reason,
            text,
            ids,
        )


class Pending:
    """A request between submission and its last token."""

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer | None,
        listener: Listener,
        *,
        streams: Streams,
        interval: int,
    ) -> None:
        self.request = request
        self.listener = listener
        self.streams = streams
        self.interval = interval
        self.samples = [Sample(request, index, tokenizer) for index in range(request.num_samples)]
        self.num_open = request.num_samples
        self.metrics = RequestMetrics(request.arrival_s)
        self.num_cached_tokens = 0
        self.prompt = PromptExtras(request, tokenizer) if request.logits else None
        self.error: RequestError | None = None
        self.hidden_states: list[Any] = []

    def output(self) -> RequestOutput:
        request = self.request
        is_finished = self.num_open == 0
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            outputs=self._shown(is_last=is_finished),
            finished=is_finished,
            prompt_logprobs=self.prompt.logprobs if self.prompt else None,
            context_logits=self.prompt.logits if self.prompt else None,
            num_cached_tokens=self.num_cached_tokens,
            metrics=self.metrics if is_finished else dataclasses.replace(self.metrics),
            error=self.error,
            hidden_states=self.hidden_states,
        )

    def delta(self) -> RequestOutput:
        """Return an update that holds only what is new; `metrics` comes with the last."""
        is_finished = self.num_open == 0
        news = [delta for sample in self.samples if (delta := sample.delta()) is not None]
        if self.request.params.logprobs is None:
            for output in news:
                output.logprobs = None
        return RequestOutput(
            self.request.request_id,
            self.request.prompt,
            self.request.prompt_token_ids,
            news,
            self.prompt.logprobs if self.prompt else None,
            is_finished,
            self.num_cached_tokens,
            dataclasses.replace(self.metrics) if is_finished else None,
            error=self.error,
        )

    @property
    def is_ranked(self) -> bool:
        """Say whether samples are generated only to be left out: then none is shown before the end."""
        return self.request.num_returned < len(self.samples)

    def _shown(self, *, is_last: bool) -> list[CompletionOutput]:
        shown = [sample.snapshot(is_last=is_last) for sample in self.samples]
        if self.is_ranked:
            # A sample that ended before its first token comes last.
            shown.sort(key=lambda output: (not output.token_ids, -(output.cumulative_logprob or 0.0)))
            del shown[self.request.num_returned :]
            for index, output in enumerate(shown):
                output.index = index
        if self.request.params.logprobs is None:
            for output in shown:
                output.logprobs = None
        return shown


class OutputProcessor:
    """Turns an engine's events into `RequestOutput`s and hands them to each request's listener.

    `process` and `fail_all` run on one thread; `add` may run on any, before the request is submitted.
    """

    def __init__(self, tokenizer: Tokenizer | None, *, stream_interval: int = 1) -> None:
        self._tokenizer = tokenizer
        self._interval = stream_interval
        self._pending: dict[str, Pending] = {}
        # How many samples have ended for each reason since the start.
        self.finish_reasons: Counter[str] = Counter()
        self.counts = RequestCounts(finished=self.finish_reasons)

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    def add(self, request: Request, listener: Listener, *, streams: Streams = False) -> None:
        """Expect events of a request; its `listener` gets every update (`streams`) or only the last.

        With "delta" an update holds only what is new: no text, token or log-probability comes twice.
        """
        if request.request_id in self._pending:
            raise RequestError(
                f"Request id {request.request_id!r} is in use; ids must be unique while they run.",
                param="request_id",
            )
        if streams and request.beams is not None:
            raise RequestError(
                "streaming does not combine with use_beam_search: no output is certain before the end; leave "
                "streaming off, or use sampling.",
                param="use_beam_search",
            )
        self._pending[request.request_id] = Pending(
            request, self._tokenizer, listener, streams=streams, interval=self._interval
        )

    def discard(self, request_id: str) -> None:
        """Forget a request that was not submitted after all; its listener hears nothing."""
        self._pending.pop(request_id, None)

    def process(self, events: Sequence[TokenEvent]) -> list[tuple[str, int]]:
        """Take events in; returns the (request id, sample) pairs that the engine must now abort."""
        aborts: list[tuple[str, int]] = []
        touched: dict[str, Pending] = {}
        now = time.monotonic()
        for event in events:
            pending = self._pending.get(event.request_id)
            if pending is None or pending.samples[event.index].is_finished:
                continue
            touched[event.request_id] = pending
            if self._take(pending, event, now):
                aborts.append((event.request_id, event.index))
        for request_id, pending in touched.items():
            if not self._emit(request_id, pending):
                aborts += self._drop(request_id, pending)
        return aborts

    def _take(self, pending: Pending, event: TokenEvent, now: float) -> bool:
        """Apply one event; True where the engine still works on a sample that is over here."""
        sample = pending.samples[event.index]
        self._count(pending, sample, event, now)
        if event.num_cached_tokens > pending.num_cached_tokens:
            pending.num_cached_tokens = event.num_cached_tokens
        if event.extras:
            pending.hidden_states += [values for what, _, values in event.extras if what == "hidden_states"]
        if event.error is not None:
            message, code = event.error
            pending.error = RequestError(message, code=code)
        try:
            if event.extras and pending.prompt is not None:
                pending.prompt.take(event.extras)
            must_abort = sample.take(event)
        except Exception as error:
            logger.exception("processing output of request %s failed", pending.request.request_id)
            pending.error = RequestError(
                f"Processing the output failed: {type(error).__name__}.", code="processing_error"
            )
            sample.output.finish_reason = "error"
            must_abort = event.finish_reason is None
        if sample.output.finish_reason is not None:
            self.finish_reasons[sample.output.finish_reason] += 1
            pending.num_open -= 1
            if pending.num_open == 0:
                self._count_finished(pending, now)
        return must_abort

    def _count(self, pending: Pending, sample: Sample, event: TokenEvent, now: float) -> None:
        """Take the times of an event. This runs once a token: keep it flat."""
        metrics = pending.metrics
        if event.admitted_s is not None:
            metrics.admitted_s = min(metrics.admitted_s or event.admitted_s, event.admitted_s)
            metrics.num_preemptions += event.num_preemptions - sample.num_preemptions
            sample.num_preemptions = event.num_preemptions
        if not event.new_token_ids:
            return
        self.counts.num_generation_tokens += len(event.new_token_ids)
        metrics.num_output_tokens += len(event.new_token_ids)
        metrics.last_token_s = now
        if metrics.first_token_s is None:
            metrics.first_token_s = now
            self.counts.ttft.add(metrics.ttft_s)
            self.counts.num_prompt_tokens += len(pending.request.prompt_token_ids)
        if sample.last_token_s is not None:
            self.counts.itl.add(now - sample.last_token_s)
        sample.last_token_s = now

    def _count_finished(self, pending: Pending, now: float) -> None:
        pending.metrics.finished_s = now
        if pending.metrics.first_token_s is None:
            self.counts.num_prompt_tokens += len(pending.request.prompt_token_ids)
        self.counts.add_finished(pending.metrics)

    def _emit(self, request_id: str, pending: Pending) -> bool:
        """Deliver what is due; False where the listener raised: its request goes, the engine stays."""
        if pending.num_open == 0:
            del self._pending[request_id]
        elif (
            not pending.streams
            or pending.is_ranked
            or all(s.num_new_tokens < pending.interval for s in pending.samples)
        ):
            return True
        try:
            is_delta = pending.streams == "delta" and not pending.is_ranked
            pending.listener(pending.delta() if is_delta else pending.output())
        except Exception:
            logger.exception("the listener of request %s failed", request_id)
            return False
        return True

    def _drop(self, request_id: str, pending: Pending) -> list[tuple[str, int]]:
        """Forget a request that nobody listens to; returns the samples that still run."""
        self._pending.pop(request_id, None)
        return [(request_id, sample.output.index) for sample in pending.samples if not sample.is_finished]

    def fail_all(self, message: str) -> None:
        """End every pending request with an error: the engine has stopped."""
        for request_id, pending in list(self._pending.items()):
            pending.error = RequestError(message, code="engine_stopped")
            for sample in pending.samples:
                if not sample.is_finished:
                    sample.output.finish_reason = "error"
                    self.finish_reasons["error"] += 1
            pending.num_open = 0
            self._emit(request_id, pending)

"""Where does one sample of one request stand? The mutable half of a frozen `Request`."""

from __future__ import annotations

import enum

from slipstream.cache.block_table import BlockTable
from slipstream.core.plan import LogitsKind, RequestInit
from slipstream.core.request import Request
from slipstream.engine.beam_search import BeamSearch


class State(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class BeamGroup:
    """The sequences of one beam search.

    `root` runs the prompt and stands for all of them wherever a request is one thing: in the queue, at its
    deadline, when it ends. `beams` carry the live hypotheses in their order, the root among them or not;
    `forks` are (beam without a row yet, beam it splits from), for the next plan. While `is_in_flight`, a
    planned step of theirs is not committed; results of steps up to `discard_through` are of an earlier try.
    """

    __slots__ = ("beams", "discard_through", "forks", "is_in_flight", "root", "search", "width")

    def __init__(self, root: Sequence, width: int) -> None:
        self.root = root
        self.width = width
        self.discard_through = -1
        self.restart()

    def restart(self) -> None:
        """Begin the search anew from the prompt."""
        request = self.root.request
        assert request.beams is not None
        self.search = BeamSearch(
            request.beams, max_tokens=request.max_tokens, stop_ids=request.stop_token_ids
        )
        self.beams: list[Sequence] = [self.root]
        self.forks: list[tuple[Sequence, Sequence]] = []
        self.is_in_flight = False

    @property
    def placed(self) -> list[Sequence]:
        """Beams that have a row."""
        return [beam for beam in self.beams if beam.row >= 0]


class Sequence:
    """Counters of one running or waiting sample.

    `tokens` are known on the host; `num_scheduled` of the sequence's tokens are computed by launched or
    planned steps, `num_computed` by committed ones; `num_in_flight` sampled tokens are not known here yet.
    `prefill_end` is where the prompt (after a preemption: everything known) ends, `last_decode_start` the
    last position whose successor may still be sampled. `order` is (priority, arrival), kept for
    life; `admission` counts admissions: a sequence reuses only what an earlier admission computes, and
    `admitted_s` is when it first ran. `group` is the beam search it belongs to.
    """

    __slots__ = (
        "admission",
        "admitted_s",
        "discard_through",
        "group",
        "last_decode_start",
        "last_step",
        "max_len",
        "num_cached_tokens",
        "num_computed",
        "num_in_flight",
        "num_preemptions",
        "num_prompt",
        "num_prompt_logits",
        "num_scheduled",
        "order",
        "prefill_end",
        "promised",
        "request",
        "row",
        "state",
        "stop_ids",
        "table",
        "tokens",
        "wants_generation_logits",
        "wants_prompt_logits",
    )

    def __init__(self, request: Request, order: tuple[int, int], table: BlockTable) -> None:
        self.request = request
        self.order = order
        self.table = table
        self.tokens = list(request.prompt_token_ids)
        self.num_prompt = len(self.tokens)
        self.max_len = self.num_prompt + request.max_tokens
        self.last_decode_start = self.max_len - 2
        self.stop_ids = request.stop_token_ids
        self.state = State.WAITING
        self.row = -1
        self.admission = -1
        self.admitted_s: float | None = None
        self.prefill_end = self.num_prompt
        self.num_scheduled = 0
        self.num_computed = 0
        self.num_in_flight = 0
        self.num_cached_tokens = -1
        self.num_preemptions = 0
        self.last_step = -1
        self.discard_through = -1
        self.promised: list[bytes] = []
        self.wants_generation_logits = "generation_logits" in request.logits
        self.wants_prompt_logits = bool(request.logits) and request.logits != ("generation_logits",)
        self.num_prompt_logits = 0
        self.group: BeamGroup | None = None
        if request.beams is not None:
            # Beams step together or not at all: the loop over decoding rows passes them over.
            self.last_decode_start = -1

    @property
    def num_rows(self) -> int:
        """How many rows it may come to need."""
        return 1 if self.group is None else self.group.width

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    def to_init(self) -> RequestInit:
        """Return what a runner needs to hold this sequence in its row as it stands now."""
        request = self.request
        return RequestInit(
            row=self.row,
            request_id=request.request_id,
            tokens=list(self.tokens),
            num_prompt=self.num_prompt,
            num_computed=self.num_computed,
            blocks=[list(pages) for pages in self.table.pages],
            sampling=request.sampling,
            seed=request.seed,
            sample_idx=request.sample_idx,
        )

    def logits_of_chunk(self, start: int, length: int) -> list[tuple[int, int, int, LogitsKind]]:
        """Return what a plan that runs this chunk must bring beside a token, each prompt position once."""
        if not self.request.logits:
            return []
        end = min(start + length, self.num_prompt)
        wanted: list[tuple[int, int, int, LogitsKind]] = []
        if end > self.num_prompt_logits:
            first = max(start, self.num_prompt_logits)
            for kind in self.request.logits:
                if kind != "generation_logits":
                    wanted.append((self.row, first, end - first, kind))
            self.num_prompt_logits = end
        if self.wants_generation_logits and start + length == self.prefill_end:
            wanted.append((self.row, start + length - 1, 1, "generation_logits"))
        return wanted

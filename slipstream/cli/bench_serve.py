"""How does a server do under load? `slipstream bench serve --url http://...`, any with OpenAI's API.

This file parses; how a request is timed and what the figures mean stands in the `bench` room.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slipstream.cli.bench import length_range
from slipstream.cli.console import note
from slipstream.cli.options import spread, text_option, tokens_option
from slipstream.cli.sizes import parse_counts

if TYPE_CHECKING:
    from slipstream.bench.serving_bench import ServingJob
    from slipstream.bench.serving_client import Target
    from slipstream.bench.serving_lengths import Lengths
    from slipstream.bench.serving_load import Bound, Load
    from slipstream.bench.serving_workload import ServingWorkload

DEFAULT_NUM_REQUESTS = 64
# A sweep point needs enough requests to be past its start; this many for each client.
REQUESTS_PER_CLIENT = 4
DEFAULT_NUM_WARMUPS = 4


def parse_rates(text: str) -> tuple[float, ...]:
    """Return the rates of a list such as `1,2.5,inf`. Raises typer.BadParameter."""
    try:
        rates = tuple(float(part) for part in str(text).split(","))
    except ValueError:
        rates = (0.0,)
    if not all(rate > 0 for rate in rates):
        raise typer.BadParameter(f"{text!r} is not a list of rates above 0; write e.g. 1,2.5,inf.")
    return rates


def parse_body(text: str) -> dict[str, Any]:
    """Return the fields of a JSON object. Raises typer.BadParameter."""
    try:
        fields = json.loads(str(text))
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise typer.BadParameter(f"{str(text)[:60]!r} is not a JSON object; write e.g. '{{\"top_k\": 20}}'.")
    return fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """Which server, and what each request to it says."""

    url: Annotated[str, text_option("URL", "The server (http://127.0.0.1:8000).")] = "http://127.0.0.1:8000"
    model: Annotated[str | None, text_option("NAME", "Model to ask for (the server's only one).")] = None
    api_key: Annotated[str | None, text_option("KEY", "Sent as a bearer token.")] = None
    endpoint: Annotated[str, text_option("NAME", "completions (the default) or chat.")] = "completions"
    temperature: Annotated[float, typer.Option(metavar="T", help="0 is greedy.")] = 0.0
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Ask for exactly the output tokens drawn.")
    ] = False
    extra_body: Annotated[
        Any,
        typer.Option(
            parser=parse_body, metavar="JSON", help="Fields to add to each request.", show_default=False
        ),
    ] = None
    timeout: Annotated[float, typer.Option(metavar="S", help="Seconds until a request has failed.")] = 600.0

    def to_target(self) -> Target:
        from slipstream.bench.serving_client import ROUTES, Target, root_url
        from slipstream.core.errors import ConfigError, nearest

        if self.endpoint not in ROUTES:
            raise ConfigError(
                f"--endpoint {self.endpoint!r} is none of {', '.join(ROUTES)}."
                f"{nearest(self.endpoint, ROUTES)}"
            )
        if not self.timeout > 0:
            raise ConfigError(f"--timeout {self.timeout:g} must be above 0 seconds.")
        extra: Mapping[str, Any] = self.extra_body or {}
        return Target(
            url=root_url(self.url),
            endpoint=self.endpoint,  # type: ignore[arg-type]
            model=self.model or "",
            api_key=self.api_key,
            temperature=self.temperature,
            ignore_eos=self.ignore_eos,
            timeout_s=self.timeout,
            extra_body=extra,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """When requests are sent: closed loop (--concurrency), open loop (--request-rate) or as a trace says."""

    concurrency: Annotated[
        Any,
        typer.Option(
            parser=parse_counts,
            metavar="N,N,...",
            help="Requests in flight, one load point each, e.g. 1,4,16 (1).",
            show_default=False,
        ),
    ] = None
    request_rate: Annotated[
        Any,
        typer.Option(
            parser=parse_rates,
            metavar="R,R,...",
            help="Requests a second, one load point each; inf sends all at once.",
            show_default=False,
        ),
    ] = None
    arrivals: Annotated[str, text_option("NAME", "poisson (the default) or constant, at --request-rate.")] = (
        "poisson"
    )
    num_requests: Annotated[
        int | None, text_option("N", "Requests a load point (64, or 4 for each of --concurrency).")
    ] = None
    duration: Annotated[
        float | None, text_option("S", "Begin no request after so many seconds of a load point.")
    ] = None
    num_warmups: Annotated[int, typer.Option(metavar="N", min=0, help="Requests before all others.")] = (
        DEFAULT_NUM_WARMUPS
    )

    def to_loads(self, workload: ServingWorkload, seed: int) -> list[Load]:
        from slipstream.bench.serving_load import ClosedLoop, OpenLoop
        from slipstream.bench.serving_trace_file import TraceWorkload
        from slipstream.core.errors import ConfigError

        if self.arrivals not in ("poisson", "constant"):
            raise ConfigError(f"--arrivals {self.arrivals!r} is none of poisson, constant.")
        if self.concurrency is not None and self.request_rate is not None:
            raise ConfigError(
                "--concurrency is a closed loop and --request-rate an open one; measure one at a time."
            )
        if self.request_rate is not None:
            return [OpenLoop(rate=rate, arrivals=self.arrivals, seed=seed) for rate in self.request_rate]
        if self.concurrency is None and isinstance(workload, TraceWorkload) and workload.has_times:
            return [OpenLoop(rate=None, arrivals=self.arrivals, seed=seed)]
        return [ClosedLoop(count) for count in self.concurrency or (1,)]

    def to_bound(self, *, is_trace: bool) -> Bound:
        from slipstream.bench.serving_load import Bound

        num_requests = self.num_requests
        if num_requests is None and self.duration is None and not is_trace:
            num_requests = max(DEFAULT_NUM_REQUESTS, REQUESTS_PER_CLIENT * max(self.concurrency or (1,)))
        return Bound(num_requests=num_requests, duration_s=self.duration)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """What is asked: random words (or ids) of drawn lengths, or the lines of a trace."""

    isl: Annotated[int | None, tokens_option("Prompt tokens a request (128).")] = None
    osl: Annotated[int | None, tokens_option("Output tokens a request (128).")] = None
    min_isl: Annotated[int | None, tokens_option("Draw prompt lengths from here to --max-isl.")] = None
    max_isl: Annotated[int | None, tokens_option("See --min-isl.")] = None
    min_osl: Annotated[int | None, tokens_option("Draw output lengths from here to --max-osl.")] = None
    max_osl: Annotated[int | None, tokens_option("See --min-osl.")] = None
    lengths: Annotated[
        str, text_option("NAME", "uniform (the default), or sharegpt: log-normal, as in chat traffic.")
    ] = "uniform"
    shared_prefix: Annotated[
        int | None, tokens_option("Begin each prompt with a text of so many tokens.")
    ] = None
    num_prefixes: Annotated[int, typer.Option(metavar="N", min=1, help="Different ones, in turn.")] = 1
    prompt_ids: Annotated[
        int | None, text_option("VOCAB", "Prompts of random token ids below this, of exact length.")
    ] = None
    trace: Annotated[
        Path | None,
        text_option("FILE", "JSON lines of timestamp (ms), input_length or prompt, and output_length."),
    ] = None
    trace_speed: Annotated[float, typer.Option(metavar="X", help="Replay the trace so much faster.")] = 1.0
    seed: Annotated[int | None, text_option("N", "Draw the same requests again (a new one each time).")] = (
        None
    )

    def to_workload(self, *, seed: int, limit: int | None) -> ServingWorkload:
        from slipstream.bench.serving_trace_file import read_trace
        from slipstream.bench.serving_workload import DrawnWorkload
        from slipstream.core.errors import ConfigError

        if self.trace is not None:
            self._require_no_lengths()
            return read_trace(self.trace, seed=seed, speed=self.trace_speed, limit=limit)
        if self.trace_speed != 1.0:
            raise ConfigError("--trace-speed needs a --trace.")
        if self.num_prefixes != 1 and self.shared_prefix is None:
            raise ConfigError("--num-prefixes needs --shared-prefix, the tokens of each.")
        prompt, output = self._distributions()
        return DrawnWorkload(
            prompt=prompt,
            output=output,
            seed=seed,
            shared_prefix=self.shared_prefix or 0,
            num_prefixes=self.num_prefixes,
        )

    def _distributions(self) -> tuple[Lengths, Lengths]:
        from slipstream.bench.serving_lengths import SHAREGPT, Uniform
        from slipstream.core.errors import ConfigError

        if self.lengths == "sharegpt":
            self._require_no_lengths(owner="--lengths sharegpt")
            return SHAREGPT
        if self.lengths != "uniform":
            raise ConfigError(f"--lengths {self.lengths!r} is none of uniform, sharegpt.")
        isl = length_range("isl", self.isl, self.min_isl, self.max_isl)
        osl = length_range("osl", self.osl, self.min_osl, self.max_osl)
        return Uniform(*isl), Uniform(*osl)

    def _require_no_lengths(self, owner: str = "--trace") -> None:
        names = ["isl", "osl", "min_isl", "max_isl", "min_osl", "max_osl"]
        if owner == "--trace":
            names.append("shared_prefix")
        given = [name for name in names if getattr(self, name) is not None]
        if given:
            option = given[0].replace("_", "-")
            raise typer.BadParameter(f"{owner} brings its own lengths; leave --{option} out.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """What is counted as good, and where the record goes."""

    slo: Annotated[
        str | None, text_option("LIST", "Objectives for goodput, e.g. ttft=500ms,tpot=50ms,e2e=10s.")
    ] = None
    json: Annotated[Path | None, text_option("FILE", "Write the record here.")] = None
    png: Annotated[Path | None, text_option("FILE", "Plot throughput against latency here.")] = None
    html: Annotated[Path | None, text_option("FILE", "The same as one self-contained page.")] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchServeJob:
    """One server to measure."""

    target: TargetOptions
    load: LoadOptions
    prompts: PromptOptions
    report: ReportOptions

    def __call__(self) -> None:
        from slipstream.bench.report import require_writable
        from slipstream.bench.serving_bench import require_answers, run_job
        from slipstream.bench.serving_client import import_aiohttp
        from slipstream.bench.serving_plot import import_matplotlib, write_html, write_png
        from slipstream.bench.serving_report import show_serving_table, write_serving_json

        # Whatever would keep the record from being written is said before anything is measured.
        import_aiohttp()
        if self.report.png is not None:
            import_matplotlib()
        for path in (self.report.json, self.report.png, self.report.html):
            if path is not None:
                require_writable(path)
        result = run_job(self.to_job(), notify=note)
        show_serving_table(result)
        if self.report.json is not None:
            write_serving_json(self.report.json, result)
        require_answers(result.points)
        if self.report.png is not None:
            write_png(self.report.png, result)
        if self.report.html is not None:
            write_html(self.report.html, result)

    def to_job(self) -> ServingJob:
        from slipstream.bench.serving_bench import ServingJob
        from slipstream.bench.serving_figures import parse_slo
        from slipstream.core.errors import ConfigError

        seed = self.prompts.seed if self.prompts.seed is not None else secrets.randbelow(1 << 31)
        target = self.target.to_target()
        workload = self.prompts.to_workload(seed=seed, limit=self.load.num_requests)
        is_trace = self.prompts.trace is not None
        sends_ids = self.prompts.prompt_ids is not None or getattr(workload, "needs_ids", False)
        if sends_ids and target.endpoint == "chat":
            raise ConfigError("A chat takes text, not token ids; use --endpoint completions.")
        return ServingJob(
            target=target,
            workload=workload,
            loads=self.load.to_loads(workload, seed),
            bound=self.load.to_bound(is_trace=is_trace),
            num_warmups=self.load.num_warmups,
            prompt_ids=self.prompts.prompt_ids,
            slo_s=parse_slo(self.report.slo) if self.report.slo else {},
        )


@spread
def serve(
    *, target: TargetOptions, load: LoadOptions, prompts: PromptOptions, report: ReportOptions
) -> BenchServeJob:
    """Measure a running server (this or any other with OpenAI's API) under one load or several.

    Closed loop: --concurrency clients, each with one request at a time. Open loop: --request-rate, whether or
    not the server follows; times count from when a request was due. Prompts are random words; how many tokens
    they are, the server says. Failed requests count, by kind; a slow client is reported.
    """
    return BenchServeJob(target=target, load=load, prompts=prompts, report=report)

"""Which options do several commands share? Records whose fields are options, and how a command takes them.

A command's parameter annotated with one of these records stands for all options of the record; `spread` is
what makes typer see them. Values are checked where they mean something: sizes here, the rest by
`EngineConfig` and `Request.create`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slipstream.cli.sizes import parse_byte_size, parse_tokens
from slipstream.core.aliases import aliases_of

if TYPE_CHECKING:
    from slipstream.core.sampling_params import SamplingParams

# Spellings from other engines, and what they are called here. Underscores count as dashes.
HABITS = aliases_of("command line")


def normalize_name(name: str) -> str:
    """Make dashes and underscores the same, and translate a spelling from habit."""
    dashed = name.replace("_", "-")
    return HABITS.get(dashed, dashed)


def tokens_option(help: str, *names: str) -> Any:
    return typer.Option(*names, help=help, parser=parse_tokens, metavar="TOKENS", show_default=False)


def text_option(metavar: str, help: str) -> Any:
    return typer.Option(help=help, metavar=metavar, show_default=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What the engine is started with; None leaves the choice to the file of --config, or to the engine."""

    config: Annotated[
        Path | None, text_option("FILE", "YAML file with any argument of LLM; options given here win.")
    ] = None
    device: Annotated[str | None, text_option("NAME", "auto (the default), cpu or cuda.")] = None
    dtype: Annotated[str | None, text_option("TYPE", "auto (the default), float32, bfloat16 or float16.")] = (
        None
    )
    max_seq_len: Annotated[int | None, tokens_option("Longest prompt + answer, e.g. 32k.")] = None
    max_batch_size: Annotated[
        int | None, typer.Option(metavar="N", help="Most requests in a step.", show_default=False)
    ] = None
    max_num_tokens: Annotated[int | None, tokens_option("Most tokens in a step.")] = None
    kv_cache_max_tokens: Annotated[int | None, tokens_option("Bound the KV cache, in tokens.")] = None
    kv_cache_max_bytes: Annotated[
        int | None,
        typer.Option(
            parser=parse_byte_size,
            metavar="BYTES",
            help="Bound the KV cache, in bytes, e.g. 40GiB.",
            show_default=False,
        ),
    ] = None
    gpu_memory_utilization: Annotated[
        float | None, text_option("SHARE", "Share of the GPU's memory this process may use.")
    ] = None
    attn_backend: Annotated[
        str | None,
        text_option("NAME", "Attention backend: auto (the default) or one of `slipstream models`."),
    ] = None
    load_format: Annotated[
        str | None, text_option("NAME", "auto (the default), safetensors, gguf or dummy (random weights).")
    ] = None
    tokenizer: Annotated[str | None, text_option("FOLDER", "Take the tokenizer from another folder.")] = None
    revision: Annotated[str | None, text_option("NAME", "Revision of a model on the hub.")] = None

    def to_llm_options(
        self, *, kv_defaults: Mapping[str, Any] | None = None, **overrides: Any
    ) -> dict[str, Any]:
        """Return the keyword arguments of `LLM`. What is typed here wins over the file of --config.

        `kv_defaults` are options of KvCacheConfig where neither says anything; `overrides` win over both.
        """
        from slipstream.cache.config import KvCacheConfig
        from slipstream.cli.config_file import read_config
        from slipstream.engine.config import SchedulerConfig

        options = {} if self.config is None else read_config(self.config)
        typed = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        typed.pop("config", None)
        kv = {
            "max_tokens": typed.pop("kv_cache_max_tokens", None),
            "max_gpu_total_bytes": typed.pop("kv_cache_max_bytes", None),
        }
        kv = {name: value for name, value in kv.items() if value is not None}
        kv = {**(kv_defaults or {}), **(options.pop("kv_cache_config", None) or {}), **kv, **overrides}
        if options.get("scheduler_config") is not None:
            options["scheduler_config"] = SchedulerConfig(**options["scheduler_config"])
        return {**options, **typed, "kv_cache_config": KvCacheConfig(**kv)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How an answer is drawn; greedy while none of temperature, top-p and top-k is given."""

    max_tokens: Annotated[int | None, tokens_option("Longest answer.")] = None
    min_tokens: Annotated[int, typer.Option(metavar="N", help="Shortest answer.")] = 0
    temperature: Annotated[float | None, text_option("T", "0 is greedy (the default).")] = None
    top_p: Annotated[
        float | None, text_option("P", "Draw from the fewest tokens that hold this probability.")
    ] = None
    top_k: Annotated[int | None, text_option("K", "Draw from the K likeliest tokens.")] = None
    min_p: Annotated[float | None, text_option("P", "Drop tokens below this share of the likeliest one.")] = (
        None
    )
    seed: Annotated[int | None, text_option("N", "Draw the same answer each time.")] = None
    stop: Annotated[list[str] | None, text_option("TEXT", "End before this text; may be repeated.")] = None
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end token.")] = False
    repetition_penalty: Annotated[float, typer.Option(metavar="X", help="1 turns it off.")] = 1.0
    presence_penalty: Annotated[float, typer.Option(metavar="X", help="0 turns it off.")] = 0.0
    frequency_penalty: Annotated[float, typer.Option(metavar="X", help="0 turns it off.")] = 0.0

    def to_params(self, *, default_max_tokens: int | None) -> SamplingParams:
        """Return the parameters; `default_max_tokens` counts where none is given (None fills the context)."""
        from slipstream.core.sampling_params import SamplingParams

        given = dataclasses.asdict(self)
        if given["max_tokens"] is None:
            given["max_tokens"] = default_max_tokens
        return SamplingParams(**given)


def spread(command: Callable[..., Any]) -> Callable[..., Any]:
    """Replace each parameter of `command` that is an option record by the fields of that record."""
    signature = inspect.signature(command, eval_str=True)
    records: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        if not dataclasses.is_dataclass(parameter.annotation):
            parameters.append(parameter)
            continue
        records[name] = parameter.annotation
        hints = typing.get_type_hints(parameter.annotation, include_extras=True)
        parameters += [
            parameter.replace(name=field.name, default=field.default, annotation=hints[field.name])
            for field in dataclasses.fields(parameter.annotation)
        ]

    def spread_command(**given: Any) -> Any:
        for name, record in records.items():
            given[name] = record(
                **{field.name: given.pop(field.name) for field in dataclasses.fields(record)}
            )
        return command(**given)

    functools.update_wrapper(spread_command, command)
    # typer must read the spread parameters, not follow back to the command's own.
    del spread_command.__wrapped__  # type: ignore[attr-defined]
    spread_command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    spread_command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return spread_command

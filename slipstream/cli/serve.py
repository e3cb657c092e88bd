"""How is a model served over HTTP? `slipstream serve MODEL` runs the server until it is told to stop."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slipstream.cli.console import note
from slipstream.cli.options import EngineOptions, spread, text_option, tokens_option
from slipstream.cli.sizes import parse_byte_size, parse_seconds
from slipstream.core import env
from slipstream.core.collector import freeze_collector
from slipstream.core.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from slipstream.engine.engine_info import EngineInfo
    from slipstream.serve.settings import ApiKey, ServeSettings

EXTRA_PACKAGES = ("fastapi", "uvicorn", "httptools", "zmq", "prometheus_client", "starlette", "pydantic")
MAX_KEY_FILE_BYTES = 1 << 20
# Readers notice when the time between tokens more than doubles.
DEFAULT_DECODE_STRETCH = 2.0


def count_option(help: str) -> Any:
    return typer.Option(help=help, metavar="N", show_default=False)


def seconds_option(help: str) -> Any:
    return typer.Option(help=help, parser=parse_seconds, metavar="TIME", show_default=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """The server's options; None leaves the choice to the file of --config, or to `ServeSettings`."""

    host: Annotated[str | None, text_option("ADDRESS", "Where to listen (127.0.0.1).")] = None
    port: Annotated[int | None, count_option("Port to listen at (8000); 0 takes a free one.")] = None
    uds: Annotated[str | None, text_option("PATH", "Listen at a unix socket instead.")] = None
    served_model_name: Annotated[
        list[str] | None, text_option("NAME", "What clients call the model; may be repeated.")
    ] = None
    api_key: Annotated[
        list[str] | None,
        text_option("KEY", "Key that clients must send; may be repeated. Others may see it: use a file."),
    ] = None
    api_key_file: Annotated[Path | None, text_option("FILE", "Keys, a line each: `NAME KEY` or `KEY`.")] = (
        None
    )
    admin_key: Annotated[
        list[str] | None, text_option("KEY", "Key for the management routes, which exist only then.")
    ] = None
    admin_key_file: Annotated[Path | None, text_option("FILE", "Admin keys, as in --api-key-file.")] = None
    api_workers: Annotated[int | None, count_option("HTTP processes (1).")] = None
    num_engines: Annotated[int | None, count_option("Engine processes (1).")] = None
    in_process: Annotated[
        bool, typer.Option("--in-process", help="Run the engine in the HTTP process, for debugging.")
    ] = False
    on_engine_failure: Annotated[
        str | None, text_option("exit|restart", "What follows when the engine ends (exit).")
    ] = None
    max_step_time: Annotated[
        float | None, seconds_option("A step that takes longer means a stuck engine (120s).")
    ] = None
    max_decode_stretch: Annotated[
        float | None,
        text_option(
            "X", "A step with prompts takes at most X times as long as its decoding (2; 0: no bound)."
        ),
    ] = None
    max_body_bytes: Annotated[
        int | None,
        typer.Option(
            parser=parse_byte_size,
            metavar="BYTES",
            help="Largest body of a request (16MiB).",
            show_default=False,
        ),
    ] = None
    max_connections: Annotated[int | None, count_option("Most connections of an HTTP process (4096).")] = None
    max_queued_requests: Annotated[
        int | None, count_option("Requests that may wait beyond those that run (1024).")
    ] = None
    max_queued_tokens: Annotated[
        int | None, tokens_option("Prompt tokens that may wait beyond the KV cache (4m).")
    ] = None
    max_fan_out: Annotated[int | None, count_option("Most prompts x n of a request (1024).")] = None
    per_key_share: Annotated[
        float | None, text_option("SHARE", "Share of the queue for a key while others want it (0.5).")
    ] = None
    request_timeout: Annotated[float | None, seconds_option("Longest life of a request (none).")] = None
    header_timeout: Annotated[float | None, seconds_option("Time for the head of a request (10s).")] = None
    idle_timeout: Annotated[float | None, seconds_option("Life of an unused connection (75s).")] = None
    slow_reader_timeout: Annotated[
        float | None, seconds_option("How long an answer may be left unread (30s).")
    ] = None
    drain_timeout: Annotated[
        float | None, seconds_option("What a stop leaves to answers under way (30s).")
    ] = None
    cors_origin: Annotated[
        list[str] | None, text_option("ORIGIN", "Origin whose pages may ask; may be repeated.")
    ] = None
    allowed_host: Annotated[
        list[str] | None, text_option("NAME", "Name by which a local server without keys may be called.")
    ] = None
    ssl_certfile: Annotated[str | None, text_option("FILE", "Certificate; the server then speaks TLS.")] = (
        None
    )
    ssl_keyfile: Annotated[str | None, text_option("FILE", "Key of the certificate.")] = None
    no_ui: Annotated[bool, typer.Option("--no-ui", help="Serve no page at /.")] = False
    docs: Annotated[bool, typer.Option("--docs", help="Serve the API's documentation at /docs.")] = False
    log_requests: Annotated[
        bool, typer.Option("--log-requests", help="Log a line for each request, without its text.")
    ] = False
    log_json: Annotated[bool, typer.Option("--log-json", help="Log as JSON, one object a line.")] = False
    otlp_traces_endpoint: Annotated[
        str | None, text_option("URL", "Send OpenTelemetry spans there (extra `otel`).")
    ] = None

    def to_settings(self, from_file: Mapping[str, Any]) -> ServeSettings:
        """Return the settings. What is typed wins over `from_file`. Raises ConfigError."""
        from slipstream.serve.settings import ServeSettings

        typed = {
            _SETTING_OF.get(name, name): value
            for name, value in vars(self).items()
            if name not in _OWN_MEANING and value is not None and value is not False
        }
        for name in ("served_model_names", "cors_origins", "allowed_hosts"):
            if name in typed:
                typed[name] = tuple(typed[name])
        if self.no_ui:
            typed["has_ui"] = False
        api_keys = read_keys(self.api_key, self.api_key_file, "key")
        if not api_keys and env.api_key() and "api_keys" not in from_file:
            api_keys = read_keys([env.api_key()], None, "key")
        if api_keys:
            typed["api_keys"] = api_keys
        admin_keys = read_keys(self.admin_key, self.admin_key_file, "admin")
        if admin_keys:
            typed["admin_keys"] = admin_keys
        return ServeSettings(**{**from_file, **typed})


_OWN_MEANING = ("api_key", "api_key_file", "admin_key", "admin_key_file", "no_ui", "max_decode_stretch")
_SETTING_OF = {
    "served_model_name": "served_model_names",
    "cors_origin": "cors_origins",
    "allowed_host": "allowed_hosts",
    "docs": "has_docs",
    "max_step_time": "max_step_s",
    **{
        f"{name}_timeout": f"{name}_timeout_s"
        for name in ("request", "header", "idle", "slow_reader", "drain")
    },
}


def read_keys(given: list[str] | None, file: Path | None, prefix: str) -> tuple[ApiKey, ...]:
    """Return the keys of an option and of a file; a key without a name is called `prefix` and its number."""
    from slipstream.serve.auth import read_key_file
    from slipstream.serve.settings import ApiKey

    keys = tuple(ApiKey(f"{prefix}-{number}", key) for number, key in enumerate(given or (), start=1))
    if file is None:
        return keys
    try:
        with file.open("rb") as opened:
            text = opened.read(MAX_KEY_FILE_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"{file} cannot be read: {why}; give a file of keys.") from None
    return keys + read_key_file(text, where=str(file), prefix=f"{prefix}-file" if keys else prefix)


def paced(engine_options: dict[str, Any], stretch: float | None) -> dict[str, Any]:
    """Return the options with streams kept fluent, unless they or `stretch` (0: no bound) say otherwise."""
    from slipstream.engine.config import SchedulerConfig

    scheduling = engine_options.get("scheduler_config") or SchedulerConfig()
    is_whole = engine_options.get("enable_chunked_prefill") is False
    if stretch is None:
        if is_whole or scheduling.max_decode_stretch is not None:
            return engine_options
        stretch = DEFAULT_DECODE_STRETCH
    scheduling = dataclasses.replace(scheduling, max_decode_stretch=stretch or None)
    return {**engine_options, "scheduler_config": scheduling}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeJob:
    """A server to run until it is told to stop."""

    model: str
    engine: EngineOptions
    options: ServeOptions

    def __call__(self) -> int:
        from slipstream.cli.config_file import read_serve_section

        try:
            from slipstream.engine.config import EngineConfig
            from slipstream.engine.progress import loading_bar
            from slipstream.serve.log_format import configure_server_log
            from slipstream.serve.running import run_server
        except ImportError as error:
            if (error.name or "").partition(".")[0] in EXTRA_PACKAGES:
                raise MissingExtraError(
                    f"`slipstream serve` needs {error.name}; pip install 'slipstream-llm[serve]'."
                ) from error
            raise
        from_file = {} if self.engine.config is None else read_serve_section(self.engine.config)
        settings = self.options.to_settings(from_file)
        engine_options = paced(self.engine.to_llm_options(), self.options.max_decode_stretch)
        config = EngineConfig(model=self.model, **engine_options)
        configure_server_log(as_json=settings.log_json)
        names = settings.served_model_names or (default_name(self.model),)
        settings = dataclasses.replace(settings, served_model_names=names)
        with contextlib.ExitStack() as bar:
            progress = bar.enter_context(loading_bar(None))

            def on_ready(address: str, info: EngineInfo) -> None:
                bar.close()
                freeze_collector()
                show_served(address, settings, info)

            return run_server(
                settings,
                config,
                on_listening=lambda address: note(f"listening at {address}; loading {self.model}"),
                on_progress=progress,
                on_ready=on_ready,
            )


def default_name(model: str) -> str:
    """Return what clients call a model that was given no name: a hub id as it is, of a path its last part."""
    path = Path(model)
    if not path.exists():
        return model
    name = path.resolve().name
    return name.removesuffix(".gguf") or model


def show_served(address: str, settings: ServeSettings, info: EngineInfo) -> None:
    """Say what is served, where, with what, and how to try it."""
    for line in info.report:
        note(line)
    note(f"serving {', '.join(settings.served_model_names)} at {address}")
    if settings.has_ui and settings.uds is None:
        note(f"a page to try it: {address}/")
    note(f"or: {curl_line(address, settings)}")
    if not settings.is_loopback and not settings.api_keys:
        note(f"warning: whoever reaches {settings.host} may use this server; --api-key-file asks for a key")


def curl_line(address: str, settings: ServeSettings) -> str:
    """Return a command that asks the server something, whole to be pasted into a shell."""
    where = f"{address}/v1/chat/completions"
    if settings.uds is not None:
        where = f"--unix-socket {shlex.quote(settings.uds)} http://localhost/v1/chat/completions"
    key = ' -H "Authorization: Bearer $SLIPSTREAM_API_KEY"' if settings.api_keys else ""
    messages = [{"role": "user", "content": "Why is the sky blue?"}]
    body = json.dumps({"model": settings.served_model_names[0], "messages": messages})
    return f"curl {where}{key} -H 'Content-Type: application/json' -d {shlex.quote(body)}"


@spread
def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A .gguf file, a folder or a hub id.")],
    *,
    server: ServeOptions,
    engine: EngineOptions,
) -> ServeJob:
    """Serve a model over HTTP, as OpenAI's API does, until Ctrl-C or SIGTERM.

    The first of them lets answers that are under way end; a second one ends at once. The file of --config may
    hold the server's options under `serve:`. SLIPSTREAM_API_KEY is the key where no option names one.
    """
    return ServeJob(model=model, engine=engine, options=server)

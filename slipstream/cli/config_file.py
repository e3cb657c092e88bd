"""What does a `--config` file say? Arguments of `LLM` in YAML, checked by name and type before a start.

Names are those of `EngineConfig` and its sections, with dashes or underscores, and the aliases those records
take; numbers of tokens may be written as `32k`. Read with YAML's safe loader: no tag builds an object.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from slipstream.cli.sizes import parse_tokens
from slipstream.core.aliases import aliases_of
from slipstream.core.errors import ConfigError
from slipstream.core.options import translate

# An engine's configuration is some lines long; YAML may expand a larger file without bounds.
MAX_BYTES = 1 << 20
# The server's options, beside the arguments of `LLM`.
SERVE_KEY = "serve"


def read_config(path: Path) -> dict[str, Any]:
    """Return keyword arguments of `LLM`; a section such as kv_cache_config is a dictionary of its options.

    Raises ConfigError for a file that cannot be read, and for a name or value that no argument has.
    """
    from slipstream.engine.config import EngineConfig

    given = parse_yaml(path)
    if isinstance(given, Mapping):
        given = {key: value for key, value in given.items() if normal_key(key) != SERVE_KEY}
    try:
        return read_section(given, EngineConfig)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def read_serve_section(path: Path) -> dict[str, Any]:
    """Return what the file says of a server, under `serve:`; other commands pass over it.

    Raises ConfigError as `read_config` does.
    """
    from slipstream.serve.settings import ServeSettings

    given = parse_yaml(path)
    section = {}
    if isinstance(given, Mapping):
        section = next((value for key, value in given.items() if normal_key(key) == SERVE_KEY), {})
    try:
        lists = _read_lists({} if section is None else section)
        plain = {key: value for key, value in (section or {}).items() if normal_key(key) not in lists}
        return {**read_section(plain, ServeSettings), **lists}
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _read_lists(section: Any) -> dict[str, tuple[str, ...]]:
    """Return the server's options that are lists of words. Raises ConfigError, also for keys in the open."""
    if not isinstance(section, Mapping):
        raise ConfigError(f"{SERVE_KEY} needs `name: value` lines, not {shown(section)}.")
    lists: dict[str, tuple[str, ...]] = {}
    for key, value in section.items():
        name = normal_key(key)
        if name in ("api_keys", "admin_keys"):
            raise ConfigError(
                f"{name} do not belong into this file; name a file of them with --api-key-file."
            )
        if name in ("served_model_names", "cors_origins", "allowed_hosts"):
            if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
                raise ConfigError(f"{name} must be a list of texts, not {shown(value)}.")
            lists[name] = tuple(value)
    return lists


def parse_yaml(path: Path) -> Any:
    """Return what the file holds; an empty one holds nothing. Raises ConfigError."""
    import yaml

    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_BYTES} bytes, too large for a configuration.")
        # Composed first, to see keys that are given twice: the loader would keep the last one in silence.
        text = data.decode("utf-8")
        check_keys(yaml.compose(text, Loader=yaml.SafeLoader), path, set())
        given = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; give --config a YAML file.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text (byte {error.start}); give --config a YAML file."
        ) from None
    except (yaml.YAMLError, RecursionError) as error:
        what = " ".join(str(error).split()) if isinstance(error, yaml.YAMLError) else "it nests too deeply"
        raise ConfigError(f"{path} is not valid YAML: {what}") from None
    return {} if given is None else given


def check_keys(node: Any, path: Path, visited: set[int]) -> None:
    """Raise ConfigError where a mapping has one key twice, in either spelling."""
    import yaml

    # Anchors share nodes, so one mapping may stand in a file exponentially often, or in itself.
    if not isinstance(node, yaml.MappingNode) or id(node) in visited:
        return
    visited.add(id(node))
    seen: set[str] = set()
    for key, value in node.value:
        name = normal_key(key.value) if isinstance(key, yaml.ScalarNode) else ""
        if name in seen:
            raise ConfigError(f"{path}: {name!r} is given twice; give it once.")
        seen.add(name)
        check_keys(value, path, visited)


def normal_key(key: Any) -> str:
    return str(key).replace("-", "_")


def read_section(given: Any, record: Any) -> dict[str, Any]:
    """Return the options of one record by our names, each checked against its declared type."""
    owner = record.__name__
    if not isinstance(given, Mapping):
        raise ConfigError(f"{owner} needs `name: value` lines, not {shown(given)}.")
    names = [field.name for field in dataclasses.fields(record)]
    if "model" in map(normal_key, given):
        raise ConfigError("the model stands on the command line, not in the file; take `model` out.")
    plain = {normal_key(key): value for key, value in given.items()}
    known = translate(plain, [name for name in names if name != "model"], aliases_of(owner), owner)
    hints = typing.get_type_hints(record)
    return {name: read_value(value, hints[name], f"{owner}({name}=...)") for name, value in known.items()}


def read_value(value: Any, hint: Any, where: str) -> Any:
    """Return `value` as the type that `hint` declares. Raises ConfigError where it is of another."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = typing.get_args(hint) if is_union else (hint,)
    if Any in kinds or (value is None and type(None) in kinds):
        return value
    section = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
    if section is not None:
        return read_section(value, section)
    if isinstance(value, str) and int in kinds and str not in kinds:
        try:
            return parse_tokens(value)
        except typer.BadParameter as error:
            raise ConfigError(f"{where} cannot be read: {error.message}") from None
    # bool is an int to Python, and a float may be written without its point.
    accepted = {int: (int,), float: (int, float)}
    for kind in kinds:
        is_bool_for_number = isinstance(value, bool) and kind in accepted
        if isinstance(kind, type) and isinstance(value, accepted.get(kind, kind)) and not is_bool_for_number:
            return value
    allowed = ", ".join("nothing" if kind is type(None) else kind.__name__ for kind in kinds)
    raise ConfigError(f"{where} must be {allowed}, not {shown(value)}.")


def shown(value: Any) -> str:
    return f"a {type(value).__name__}" if isinstance(value, (Mapping, list)) else repr(value)[:60]

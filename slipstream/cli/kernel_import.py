"""Which kernel does `module:name` or `file.py:name` mean? The record that `register_kernel` returned there.

Invariant: only what the command line names is imported, and with it whatever that file does.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from slipstream.core.errors import ConfigError, nearest

if TYPE_CHECKING:
    from slipstream.kernels.plugins import KernelPlugin


def import_kernel(place: str) -> KernelPlugin:
    """Import the module or file and return the kernel. Raises ConfigError saying what is missing."""
    from slipstream.kernels.plugins import KERNELS, KernelPlugin

    source, _, name = place.rpartition(":")
    if not source or not name:
        raise ConfigError(f"--kernel {place!r}: write module:name or file.py:name.")
    try:
        module = _import_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
    except (ImportError, OSError) as error:
        raise ConfigError(f"--kernel {place!r}: {source} cannot be imported: {error}.") from error
    found = getattr(module, name, None)
    if isinstance(found, KernelPlugin):
        return found
    # A name given to register_kernel serves too, where the module keeps no record of it.
    registered = {plugin.name: plugin for plugin in KERNELS.plugins()}
    if name in registered:
        return registered[name]
    here = [attribute for attribute, value in vars(module).items() if isinstance(value, KernelPlugin)]
    valid = sorted({*here, *registered})
    raise ConfigError(
        f"--kernel {place!r}: {source} has no kernel of that name; there are: {', '.join(valid) or 'none'}."
        f"{nearest(name, valid)}"
    )


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

"""Which quantisation methods are there? Lazy rows; a method is named as users name its scheme."""

from __future__ import annotations

from slipstream.core.registry import Registry

SCHEMES = Registry(
    "quantization scheme",
    {
        "unquantized": "slipstream.quant.unquantized:Unquantized",
        "gguf": "slipstream.quant.gguf:Gguf",
        "int8": "slipstream.quant.int8:Int8",
        "float32": "slipstream.quant.float32:Float32",
        "fixed_tiles": "slipstream.quant.fixed_tiles:FixedTiles",
    },
)

"""How is one op computed fast? One op per file. Import the file you need; outside kernels register here."""

from slipstream.kernels.plugins import KernelCapability as KernelCapability
from slipstream.kernels.plugins import KernelPlugin as KernelPlugin
from slipstream.kernels.plugins import register_kernel as register_kernel
from slipstream.kernels.plugins import unregister_kernel as unregister_kernel

"""How do the ops of this room run on an NVIDIA GPU? Triton kernels, one op per file. They need triton."""

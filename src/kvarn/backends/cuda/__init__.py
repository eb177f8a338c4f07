"""Programs on an NVIDIA GPU: Triton kernels, and cuBLAS through torch. See docs/dev/cuda.md."""

"""Programs on an NVIDIA GPU: Triton kernels, and cuBLAS through torch. See docs/dev/cuda.md.

Importing this loads neither torch nor Triton: plans are made without them.
"""

from kvarn.backends.cuda.backend import CudaBackend
from kvarn.backends.cuda.card import card_memory, check_device

__all__ = ["CudaBackend", "card_memory", "check_device"]

"""Programs on an NVIDIA GPU: Triton kernels, and cuBLAS through torch. See docs/dev/cuda.md.

Importing this loads neither torch nor Triton: plans are made without them.
"""

from kvarn.backends.cuda.backend import CudaBackend, check_device
from kvarn.backends.cuda.forms import DTYPE_BYTES, FORMS, WeightForm

__all__ = ["DTYPE_BYTES", "FORMS", "CudaBackend", "WeightForm", "check_device"]

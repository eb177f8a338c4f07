"""Element types of stored tensors. Quantized types store blocks of `block_size` elements in `block_bytes` bytes."""

from __future__ import annotations

import enum


class DType(enum.Enum):
    """An element type; value: (name, elements in a block, bytes of a block). Layouts: the GGUF specification."""

    F32 = ("F32", 1, 4)
    F16 = ("F16", 1, 2)
    BF16 = ("BF16", 1, 2)
    Q4_0 = ("Q4_0", 32, 18)
    Q4_1 = ("Q4_1", 32, 20)
    Q5_0 = ("Q5_0", 32, 22)
    Q5_1 = ("Q5_1", 32, 24)
    Q8_0 = ("Q8_0", 32, 34)
    Q2_K = ("Q2_K", 256, 84)
    Q3_K = ("Q3_K", 256, 110)
    Q4_K = ("Q4_K", 256, 144)
    Q5_K = ("Q5_K", 256, 176)
    Q6_K = ("Q6_K", 256, 210)

    @property
    def block_size(self) -> int:
        """Elements in a block."""
        return self.value[1]

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return self.value[2]

    @property
    def quantized(self) -> bool:
        """True for block-quantized integers."""
        return self.block_size > 1

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of `width` elements. Raises ValueError where width is no multiple of the block size."""
        blocks, rest = divmod(width, self.block_size)
        if rest:
            raise ValueError(f"a row of {width} elements is no multiple of {self.name}'s block of {self.block_size}")
        return blocks * self.block_bytes

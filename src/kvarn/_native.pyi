"""kvarn's native code: kernels, step plans and sampling for CPUs."""

from collections.abc import Sequence
from typing import Annotated, overload

import numpy
from numpy.typing import NDArray


def available_isas() -> list[str]:
    """Names of the instruction sets that run here, best first."""

def packed_bytes(format: str, rows: int, cols: int) -> int:
    """Bytes of a packed matrix."""

def quant_bytes(rows: int, cols: int) -> int:
    """Bytes of int8 activations with their scales and sums."""

def kv_bytes(slots: Sequence[tuple[int, int, int]], num_blocks: int, block_size: int, type: str) -> int:
    """Bytes of a KV cache."""

KEY_SPAN: int = 256

class Pool:
    """Threads that run step plans; the caller of a run is one of them."""

    def __init__(self, threads: int, pins: Sequence[Sequence[int]]) -> None: ...

    @property
    def threads(self) -> int: ...

def trim_heap() -> None:
    """
    Gives memory that was freed back to the system, where there is a way to.
    """

PACKED_LAYOUT: int = 3

class Pages:
    """
    Zeroed memory for packed matrices, in large pages where the system has them.
    """

    def __init__(self, nbytes: int) -> None: ...

class MappedFile:
    """A file mapped read-only."""

    def __init__(self, fd: int) -> None: ...

    @property
    def nbytes(self) -> int: ...

class PackedWeight:
    """
    A matrix or table in the form kernels read. Owns its memory, or shares a mapped file's.
    """

    @property
    def nbytes(self) -> int: ...

    @property
    def data(self) -> Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', writable=False)]:
        """A view of its panels."""

    @property
    def shape(self) -> tuple[int, int]: ...

def pack(format: str, rows: int, cols: int, data: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], pool: Pool, arena: Pages | None = None, offset: int = 0) -> PackedWeight:
    """
    Packs a stored row-major tensor, into an arena where there is one. Raises ValueError where the sizes disagree.
    """

def mapped_weight(format: str, rows: int, cols: int, file: MappedFile, offset: int) -> PackedWeight:
    """
    A matrix that was packed before. Raises ValueError where it does not lie within the file.
    """

class Vector:
    """float32 parameters."""

    def __init__(self, values: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> None: ...

    @property
    def data(self) -> Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', writable=False)]:
        """A view of its bytes."""

    def __len__(self) -> int: ...

class RotaryTable:
    """cos and sin of each position, (positions, 2, pairs)."""

    def __init__(self, values: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), order='C', device='cpu', writable=False)], interleaved: bool) -> None: ...

class KvCache:
    """Keys and values by blocks, with a slot for each layer of a KV group."""

    def __init__(self, slots: Sequence[tuple[int, int, int]], num_blocks: int, block_size: int, type: str) -> None: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def block_bytes(self) -> int: ...

    def commit(self) -> int: ...

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None: ...

    def move(self, pairs: Sequence[tuple[int, int]]) -> None: ...

    def read(self, block: int, out: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')]) -> None: ...

    def write(self, block: int, data: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> None: ...

class FloatBuffer:
    """A place for float32 rows; as made by default, none."""

    def __init__(self) -> None: ...

    @property
    def width(self) -> int: ...

class QuantBuffer:
    """A place for int8 rows with their scales; as made by default, none."""

    def __init__(self) -> None: ...

class Norm:
    """Parameters of a norm; as made by default, none."""

    @overload
    def __init__(self) -> None: ...

    @overload
    def __init__(self, weight: Vector, bias: Vector | None, eps: float, layer: bool, groups: int) -> None: ...

class HeadRecipe:
    """Norm and rotation of the heads of a buffer."""

    def __init__(self, x: FloatBuffer, norm: Norm, rope: RotaryTable | None) -> None: ...

class InputRecipe:
    """How a linear's int8 input is made from float rows."""

    def __init__(self, x: FloatBuffer, norm: Norm) -> None: ...

class LinearJob:
    """A linear, or a gate/up pair, and what follows it."""

    def __init__(self, weight: PackedWeight, up: PackedWeight | None = None, bias: Vector | None = None, up_bias: Vector | None = None, function: str | None = None, residual: FloatBuffer = ..., scale: float = 1.0, softcap: float = 0.0, out: FloatBuffer = ..., quants: QuantBuffer = ...) -> None: ...

TILE_TOKENS: int = 8

OWN_ROWS: int = 2

def attention_partial_bytes(heads: int, kv_heads: int, value_dim: int, max_model_len: int, threads: int) -> int:
    """
    Bytes where a decode step's attention, cut over threads, keeps its parts.
    """

def linear_scratch_bytes() -> int:
    """Bytes a linear asks of each thread for an item."""

def linear_own_bytes(cols: int) -> int:
    """
    Bytes a linear that prepares its input asks of each thread for the stage.
    """

def attention_scratch_bytes(group: int, key_dim: int, value_dim: int, type: str) -> int:
    """Bytes attention asks of each thread for an item."""

def thread_bytes(scratch: int, own: int) -> int:
    """
    Bytes a plan takes for each thread, from the largest that its stages ask for.
    """

class StepPlan:
    """Stages over buffers in one arena, run as one call per step."""

    def __init__(self, pool: Pool, kv: KvCache, isa: str, max_tokens: int, max_sequences: int, max_outputs: int, max_model_len: int, vocab_size: int, arena_bytes: int, windows: Sequence[int]) -> None: ...

    def float_buffer(self, offset: int, width: int, stride: int, outputs: bool) -> FloatBuffer: ...

    def quant_buffer(self, offset: int, cols: int, outputs: bool) -> QuantBuffer: ...

    def attention(self, kv_group: int, slot: int, q: HeadRecipe, k: HeadRecipe, v: FloatBuffer, write: bool, heads: int, scale: float, softcap: float, window: int, out: FloatBuffer, quants: QuantBuffer, partials: int) -> None: ...

    def linear(self, label: str, input: FloatBuffer, quants: QuantBuffer, recipe: InputRecipe | None, jobs: Sequence[LinearJob]) -> None: ...

    def finish(self) -> None: ...

    @property
    def arena_bytes(self) -> int: ...

    @property
    def scratch_bytes(self) -> int: ...

    @property
    def labels(self) -> list[str]: ...

    def run(self, token_ids: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], positions: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], slot_mapping: Annotated[NDArray[numpy.int64], dict(shape=(None, None), order='C', device='cpu', writable=False)], query_start: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], seq_lens: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], block_tables: Annotated[NDArray[numpy.int32], dict(shape=(None, None, None), order='C', device='cpu', writable=False)], output_rows: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], tree_parents: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)] | None) -> None:
        """
        Runs a step with the GIL released. Raises ValueError where the batch is out of range.
        """

    def count(self, on: bool) -> None:
        """Switches the counting of stages' times on or off, from zero."""

    def counters(self) -> list[tuple[int, int, int]]:
        """
        Per stage, in the order of `labels`: (ns, ns of all threads together, steps that it ran in).
        """

    def array(self, buffer: FloatBuffer, rows: int) -> Annotated[NDArray[numpy.float32], dict(shape=(None, None))]:
        """A view of a buffer's rows, float32 (rows, width)."""

    def embed(self, table: PackedWeight, out: FloatBuffer, scale: float) -> None: ...

    def position_embed(self, table: PackedWeight, x: FloatBuffer, out: FloatBuffer) -> None: ...

    def norm(self, norm: Norm, x: FloatBuffer, out: FloatBuffer) -> None: ...

    def rope(self, table: RotaryTable, x: FloatBuffer, out: FloatBuffer, heads: int) -> None: ...

    def kv_write(self, kv_group: int, slot: int, k: FloatBuffer, v: FloatBuffer) -> None: ...

    def activation(self, function: str, x: FloatBuffer, out: FloatBuffer) -> None: ...

    def gated_activation(self, function: str, gate: FloatBuffer, up: FloatBuffer, out: FloatBuffer) -> None: ...

    def add(self, a: FloatBuffer, b: FloatBuffer, out: FloatBuffer) -> None: ...

    def select_rows(self, x: FloatBuffer, out: FloatBuffer) -> None: ...

def read_sum(isa: str, data: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> int:
    """
    Sum of little-endian 32-bit words modulo 2^32, by the kernel that measures bandwidth.
    """

class Roofline:
    """Limits of one instruction set. Each call returns (amount, seconds)."""

    def __init__(self, isa: str, bytes: int, pool: Pool) -> None: ...

    def read(self, pool: Pool) -> tuple[float, float]:
        """One pass over the buffer: bytes."""

    def integer(self, pool: Pool, iterations: int, items: int) -> tuple[float, float]:
        """Multiply-adds of bytes."""

    def floating(self, pool: Pool, iterations: int, items: int) -> tuple[float, float]:
        """Multiply-adds of float32."""

class Sampler:
    """State and choice of all running sequences. Not thread-safe."""

    def __init__(self) -> None: ...

    def add(self, sequence: int, prompt: Sequence[int], temperature: float, top_k: int, top_p: float, min_p: float, repetition_penalty: float, presence_penalty: float, frequency_penalty: float, min_tokens: int, logprobs: int, seed: int, stream: int, bias: Sequence[tuple[int, float]], stop_tokens: Sequence[int], allowed: Sequence[int], forbidden: Sequence[Sequence[int]]) -> None: ...

    def remove(self, sequence: int) -> None: ...

    def sample(self, logits: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], sequences: Sequence[int], positions: Sequence[int], pool: Pool | None = None) -> list: ...

    def verify(self, logits: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], sequences: Sequence[int], positions: Sequence[int], drafts: Sequence[Sequence[int]], parents: Sequence[Sequence[int]], q: Sequence[Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)] | None], bits: Annotated[NDArray[numpy.uint32], dict(shape=(None, None), order='C', device='cpu', writable=False)] | None, mask_rows: Sequence[int] | None, pool: Pool | None = None) -> list: ...

    def logprobs(self, logits: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], tokens: Sequence[int], k: Sequence[int], pool: Pool | None = None) -> list: ...

    def guess(self, logits: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], vocab: int, sequences: Sequence[int], positions: Sequence[int], ahead: Sequence[Sequence[int]], q: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')], q_rows: Sequence[int], pool: Pool | None = None) -> list[int]: ...

def philox4x32(counter: Sequence[int], key0: int, key1: int) -> list[int]:
    """Philox4x32-10, for tests."""

def uniform(seed: int, stream: int, position: int, use: int = 0) -> float: ...

"""What torch, cuBLAS and CUDA take of the card by themselves: no tensor of this back-end, but part of its plan."""

from __future__ import annotations

from kvarn.backends.base import MemoryPart, MemoryUse, StepLimits
from kvarn.backends.cuda.graphs import Buckets
from kvarn.backends.cuda.launches import AttentionLaunch, Launch, LinearLaunch, LogitsLaunch, Lowered

CUBLAS_BYTES = 32 << 20
"""A workspace of cuBLAS on Hopper and Blackwell cards, as torch sizes it (`aten/src/ATen/cuda/CublasHandlePool.cpp`:
":4096:2:16:8", 8.1 MiB, on those before). There is one for each stream that multiplies. CUBLAS_WORKSPACE_CONFIG
changes it, which is not looked at."""
GRAPH_CUBLAS = 2
"""Workspaces because of graphs: on the stream that they are recorded on, and in their own pool, where torch lets go
of a stream's workspaces for a recording (some versions do from 2.12 on)."""
GRAPH_KERNEL_BYTES = 8 << 10
"""For each kernel of a graph that can be replayed. An estimate: it was 64 KiB up to CUDA 12.4 and driver 550 (PyTorch,
"CUDAGraph Trees"); what it is since is not documented. Outside of torch's allocator."""
CONTEXT_BYTES = 512 << 20
"""CUDA's context with the kernels of torch and cuBLAS: some 500 MB on a Hopper card, outside of torch's allocator. Who
asks a card what is free has paid for it; of a card that is elsewhere it is still to be taken off."""


GRAPHS = "CUDA graphs"


def allocated_bytes(use: MemoryUse) -> int:
    """What torch's allocator has at most of what is used: all but what CUDA keeps by itself."""
    return use.total - sum(part.num_bytes for part in use.parts if part.name == GRAPHS)


def library_parts(lowered: Lowered, limits: StepLimits, *, graphs: bool) -> tuple[MemoryPart, ...]:
    """For steps of these launches. graphs: whether they are recorded."""
    if not graphs:
        return (MemoryPart("cuBLAS", CUBLAS_BYTES, "a workspace, as torch sizes it for Hopper cards"),)
    buckets, kernels = Buckets(limits).count, sum(map(_kernels, lowered.launches))
    workspaces = 1 + GRAPH_CUBLAS
    return (
        MemoryPart(
            "cuBLAS", workspaces * CUBLAS_BYTES, f"{workspaces} workspaces, as torch sizes them for Hopper cards"
        ),
        MemoryPart(
            GRAPHS,
            buckets * kernels * GRAPH_KERNEL_BYTES,
            f"{buckets} at most, of {kernels} kernels; estimated at {GRAPH_KERNEL_BYTES >> 10} KiB each",
        ),
    )


def _kernels(launch: Launch) -> int:
    """Kernels that a launch is in a decode step, at most: with partial results that are added up, and a bias."""
    match launch:
        case AttentionLaunch() | LinearLaunch():
            return 2
        case LogitsLaunch():
            return 2 + (launch.scale != 1.0) + (launch.bias is not None) + 3 * (launch.softcap is not None)
        case _:
            return 1

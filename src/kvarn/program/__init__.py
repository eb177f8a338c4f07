"""A model is a `Program`: a short, typed, immutable list of coarse ops over named buffers (see ARCHITECTURE.md)."""

from kvarn.program.buffers import Buffer, KvLayer, Rows, Weight
from kvarn.program.kv_groups import KvGroups
from kvarn.program.ops import (
    Activation,
    Add,
    Attention,
    Embed,
    GatedActivation,
    Input,
    KvWrite,
    Linear,
    Logits,
    Norm,
    Op,
    PositionEmbed,
    Rope,
    RopeTable,
    SelectRows,
)
from kvarn.program.program import Program

__all__ = [
    "Activation",
    "Add",
    "Attention",
    "Buffer",
    "Embed",
    "GatedActivation",
    "Input",
    "KvGroups",
    "KvLayer",
    "KvWrite",
    "Linear",
    "Logits",
    "Norm",
    "Op",
    "PositionEmbed",
    "Program",
    "Rope",
    "RopeTable",
    "Rows",
    "SelectRows",
    "Weight",
]

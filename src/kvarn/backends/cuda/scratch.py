"""What kernels need beside their operands: one piece of memory for all of them, since they run one after the other."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from kvarn.backends.base import StepLimits
from kvarn.backends.cuda.forms import MatrixForm
from kvarn.backends.cuda.kernels.attention_plan import workspace_elements
from kvarn.backends.cuda.kernels.tiles import largest_workspace
from kvarn.backends.cuda.launches import AttentionLaunch, Launch, LinearLaunch, LogitsLaunch, Lowered
from kvarn.program import Program

LEAST = 512


def scratch_bytes(
    program: Program, lowered: Lowered, forms: Mapping[str, MatrixForm], limits: StepLimits
) -> int:
    """The most that any launch needs, in steps within the limits."""
    tables = lowered.others
    needs = (_needed(program, launch, forms, tables, limits) for launch in lowered.launches)
    return max(LEAST, *needs)


def _needed(
    program: Program,
    launch: Launch,
    forms: Mapping[str, MatrixForm],
    tables: Collection[str],
    limits: StepLimits,
) -> int:
    match launch:
        case AttentionLaunch():
            value_dim = program.kv_layers[launch.layer].value_dim
            return 4 * sum(
                workspace_elements(limits.max_num_sequences, launch.heads, value_dim, limits.max_model_len)
            )
        case LinearLaunch():
            kinds = _kinds(launch.weights[0], forms, tables)
            tokens = limits.max_num_tokens
        case LogitsLaunch():
            kinds = _kinds(launch.weight, forms, tables)
            tokens = limits.max_num_outputs
        case _:
            return 0
    return max(largest_workspace(kind, launch.out.width, launch.x.width, tokens) for kind in kinds)


def _kinds(name: str, forms: Mapping[str, MatrixForm], tables: Collection[str]) -> tuple[str, ...]:
    """The kinds that a matrix may have: any, where another executable holds it."""
    if name in tables:
        return ("dense",)
    return (forms[name].kind,) if name in forms else ("int4", "int8", "fp8")

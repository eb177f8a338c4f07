"""The memory plan as people read it: the same lines from `kvarn plan` and from `kvarn serve`."""

from __future__ import annotations

from collections.abc import Mapping

from kvarn.planning import MemoryPlan
from kvarn.planning.sizes import size_text


def memory_rows(plan: MemoryPlan) -> list[tuple[str, str]]:
    """What is taken, part by part, and what it is taken from."""
    use, sequences = plan.use, plan.full_sequences
    share = 100 * plan.total / plan.budget
    index = f"{size_text(plan.offload_index)}  to know what is in {size_text(plan.offload_bytes)} of disk"
    tier = [("second tier", index)] if plan.offload_bytes else []
    draft = [("draft model", f"{size_text(plan.drafter.total)}  {size_text(plan.drafter.kv_cache)} of it KV cache")] \
        if plan.drafter else []
    parts = [(part.name, f"{size_text(part.num_bytes)}  {part.source}") for part in use.parts]
    return [
        ("weights, packed", size_text(use.weights)),
        ("tables of positions", size_text(use.tables)),
        ("activations", f"{size_text(use.activations)}  steps of {plan.max_num_batched_tokens} tokens, "
                        f"{plan.max_num_seqs} sequences"),
        ("KV cache", f"{size_text(use.kv_cache)}  {plan.kv_dtype}, {plan.num_blocks:,} blocks of {plan.block_size}: "
                     f"{plan.cache_tokens:,} tokens, {_count(sequences)} of {plan.max_model_len:,}"),
        *parts,
        *draft,
        *tier,
        ("in total", f"{size_text(plan.total)}  {share:.0f} % of the {size_text(plan.budget)} that may be taken"),
        ("available", f"{size_text(plan.available.num_bytes)}  {plan.available.source}; "
                      f"{100 * plan.memory_utilization:g} % of it may be taken"),
    ]  # fmt: skip


def memory_table(plan: MemoryPlan) -> str:
    """The rows, names and values below one another."""
    rows = memory_rows(plan)
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def budget_table(num_bytes: int, plans: Mapping[str, MemoryPlan]) -> str:
    """What each of several models takes when it is loaded, and what they may take together."""
    width = max(map(len, plans))
    rows = [
        f"  {name:<{width}}  {size_text(plan.total):>9}  {size_text(plan.use.weights)} of weights, KV cache for "
        f"{_count(plan.full_sequences)} of {plan.max_model_len:,} tokens"
        for name, plan in plans.items()
    ]
    total = sum(plan.total for plan in plans.values())
    fit = "all fit" if total <= num_bytes else "not all fit: those used least lately are unloaded for others"
    return "\n".join([*rows, f"  {'in total':<{width}}  {size_text(total):>9}  of {size_text(num_bytes)}; {fit}"])


def _count(sequences: int) -> str:
    return "1 sequence" if sequences == 1 else f"{sequences:,} sequences"

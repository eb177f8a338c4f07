"""From a `SchedulerOutput` to arrays, through the program and the sampler, to a `StepOutput`."""

from kvarn.runner.ahead import Ahead, NeverAhead, StepsAhead
from kvarn.runner.batch import BatchBuilder
from kvarn.runner.block_file import BlockFile
from kvarn.runner.block_mover import BlockMover, MoveSeconds, measure_move
from kvarn.runner.drafter import BlocklessDrafter, Drafter, NullDrafter, Proposal, logits_rows
from kvarn.runner.pooler import HiddenStatePooler, NullPooler, Pooler
from kvarn.runner.runner import Runner

__all__ = [
    "Ahead", "BatchBuilder", "BlockFile", "BlockMover", "BlocklessDrafter", "Drafter", "HiddenStatePooler",
    "MoveSeconds", "NeverAhead", "NullDrafter", "NullPooler", "Pooler", "Proposal", "Runner", "StepsAhead",
    "logits_rows", "measure_move",
]  # fmt: skip

"""What a step costs: the record that a prediction is made from, and the protocol of whoever predicts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, Self

from kvarn.step import SchedulerOutput


@dataclass(frozen=True, slots=True)
class StepShape:
    """What of a step decides how long it takes."""

    num_tokens: int
    """Rows that go through the linears."""
    num_sequences: int
    num_sampled: int
    """Rows that go through the output layer and the sampler."""
    num_attended: int
    """Keys that the queries look at: for each token its position + 1, summed."""
    num_context: int = 0
    """Keys that are read, each once a sequence, however many of its queries look at them."""

    @classmethod
    def of(cls, scheduled: SchedulerOutput) -> Self:
        """The shape of a step that was decided."""
        parts = scheduled.sequences
        tokens = sampled = attended = context = 0
        for part in parts:
            drafts, start = len(part.draft), part.start
            rows = len(part.token_ids) + drafts
            end = start + rows
            tokens += rows
            attended += rows * (start + end + 1) // 2
            context += end
            if part.sample:
                sampled += 1 + drafts
            if part.prompt is not None:
                sampled += part.num_prompt_logits
        return cls(tokens, len(parts), sampled, attended, context)

    def plus(self, start: int, count: int) -> Self:
        """The shape with one sequence more: `count` tokens from position `start` on, the last of them sampled from."""
        attended = count * (2 * start + count + 1) // 2
        return replace(
            self,
            num_tokens=self.num_tokens + count,
            num_sequences=self.num_sequences + 1,
            num_sampled=self.num_sampled + 1,
            num_attended=self.num_attended + attended,
            num_context=self.num_context + start + count,
        )

    def drafted(self, start: int, count: int) -> Self:
        """The shape with `count` draft tokens from position `start` on, of a sequence that is in it already."""
        attended = count * (2 * start + count + 1) // 2
        return replace(
            self,
            num_tokens=self.num_tokens + count,
            num_sampled=self.num_sampled + count,
            num_attended=self.num_attended + attended,
            num_context=self.num_context + count,
        )


class StepCost(Protocol):
    """Predicts how long a step takes."""

    def seconds(self, shape: StepShape) -> float:
        """Wall time of a step of that shape, in seconds, above 0."""
        ...

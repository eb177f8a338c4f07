"""What the model says of prompts, from the rows of logits that a step has for that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from kvarn.runner.failures import not_finite
from kvarn.sampling import Sampler
from kvarn.step import FailedSequence, PromptLogprobs, ScheduledSequence

Values = Mapping[str, NDArray[np.float32]]


def take_prompts(
    values: Values, name: str, parts: Sequence[ScheduledSequence], sampler: Sampler
) -> tuple[Values, tuple[PromptLogprobs, ...], list[FailedSequence]]:
    """A step's values with those rows of logits that are sampled from, and what the others say, or whose do not.

    name: of the logits, which have `num_logits` rows for each of the parts.
    """
    asked = [part for part in parts if part.prompt is not None]
    if not asked:
        return values, (), []
    of_prompts = np.concatenate([np.arange(part.num_logits) < part.num_prompt_logits for part in parts])
    logits = values[name]
    targets = [token for part in asked if part.prompt for token in part.prompt.token_ids]
    counts = [part.prompt.count for part in asked if part.prompt for _ in part.prompt.token_ids]
    said = iter(sampler.logprobs(logits[of_prompts], targets, counts))
    found: list[PromptLogprobs] = []
    failed: list[FailedSequence] = []
    for part in asked:
        rows = [next(said) for _ in range(part.num_prompt_logits)]
        logprobs = tuple(row for row in rows if row is not None)
        if len(logprobs) == len(rows):
            found.append(PromptLogprobs(part.sequence_id, logprobs))
        else:
            failed.append(not_finite(part.sequence_id))
    return {**values, name: logits[~of_prompts]}, tuple(found), failed

"""The output side of a request: tokens to text, stop strings, and when all of it is finished."""

from __future__ import annotations

from collections.abc import Sequence as ListOf

from kvarn.engine.meter import RequestClock
from kvarn.request import FinishReason, Request, RequestOutput, SequenceOutput, TokenLogprob
from kvarn.scheduler import Sequence
from kvarn.step import SampledToken
from kvarn.text import IncrementalDetokenizer, Tokenizer


class RequestText:
    """The text of a request's sequences as it grows. Owns a detokenizer for each unfinished sequence."""

    def __init__(
        self, request: Request, sequences: ListOf[Sequence], tokenizer: Tokenizer, clock: RequestClock
    ) -> None:
        """clock: says when things happened, in the last output."""
        self.request = request
        self.clock = clock
        self.embedding: tuple[float, ...] | None = None
        """Goes into the next output."""
        self._sequences = sequences
        self._unfinished = {sequence.sequence_id: sequence for sequence in sequences}
        sampling = request.sampling
        self._detokenizers = {
            sequence.sequence_id: IncrementalDetokenizer(
                tokenizer,
                prompt_ids=request.prompt_token_ids,
                stop=sampling.stop,
                include_stop=sampling.include_stop_str_in_output,
                skip_special_tokens=sampling.skip_special_tokens,
                min_tokens=sampling.min_tokens,
            )
            for sequence in sequences
        }

        self.prompt_logprobs: list[TokenLogprob] = []
        """Of the prompt's tokens; told with the next output."""

    @property
    def num_unfinished(self) -> int:
        """Sequences that go on."""
        return len(self._unfinished)

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of the prompt that the prefix cache had."""
        return self._sequences[0].num_cached_tokens

    @property
    def finished(self) -> bool:
        """Whether every sequence has ended."""
        return not self._unfinished

    def is_unfinished(self, sequence_id: int) -> bool:
        """Whether the sequence is one of these and goes on."""
        return sequence_id in self._unfinished

    def append(self, sequence: Sequence, token: SampledToken) -> SequenceOutput:
        """The output of a sequence for its new token.

        Where that completes a stop string, the output says so; the scheduler does not know it yet. The text of a stop
        token is left out unless the request wants it, as that of a stop string is.
        """
        detokenizer = self._detokenizers[sequence.sequence_id]
        reason, stop = sequence.finish_reason, sequence.stop_reason
        ended_by_token = reason is FinishReason.STOP
        text = ""
        if not ended_by_token or self.request.sampling.include_stop_str_in_output:
            text = detokenizer.append(token.token_id)
        if reason is not None:
            text += detokenizer.finish()
        if detokenizer.stop_reason is not None:
            reason, stop = FinishReason.STOP, detokenizer.stop_reason
        if reason is not None:
            del self._unfinished[sequence.sequence_id], self._detokenizers[sequence.sequence_id]
        logprobs = () if token.logprob is None else (token.logprob,)
        return SequenceOutput(sequence.index, (token.token_id,), text, logprobs, reason, stop)

    def abort(self) -> RequestOutput:
        """The last output of a request that is broken off: what was held back of its unfinished sequences."""
        outputs = tuple(
            SequenceOutput(
                index=sequence.index,
                token_ids=(),
                text=self._detokenizers[sequence_id].finish(),
                finish_reason=FinishReason.ABORT,
            )
            for sequence_id, sequence in self._unfinished.items()
        )
        self._unfinished.clear()
        self._detokenizers.clear()
        return self.output(outputs)

    def output(self, outputs: tuple[SequenceOutput, ...]) -> RequestOutput:
        """The message that carries these."""
        first, drafted, accepted = self._sequences[0], 0, 0
        if self.finished:
            drafted = sum(sequence.num_draft_tokens for sequence in self._sequences)
            accepted = sum(sequence.num_accepted_tokens for sequence in self._sequences)
        prompt, self.prompt_logprobs = tuple(self.prompt_logprobs), []
        return RequestOutput(
            self.request.request_id, outputs, first.num_prompt_tokens, first.num_cached_tokens, self.finished, drafted,
            accepted, self.clock.times, prompt, self.embedding,
        )  # fmt: skip

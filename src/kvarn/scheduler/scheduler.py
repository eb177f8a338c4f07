"""`Scheduler`: one loop that gives each sequence some of a step's token budget, and takes its sampled token back."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Container, Iterable, Mapping

from kvarn.cache import BlockPool, PrefixCache, new_tables
from kvarn.config import SchedulerConfig
from kvarn.errors import RequestError
from kvarn.request import FinishReason, Request
from kvarn.scheduler.admission import Limits, check_deadline
from kvarn.scheduler.assembly import Group, StepAssembly
from kvarn.scheduler.budget import Budget, ConstantBudget
from kvarn.scheduler.drafting import NOTHING_WANTED, Drafting, DraftLimits
from kvarn.scheduler.forecast import Crowd, Forecast, NoForecast
from kvarn.scheduler.moves import Moves
from kvarn.scheduler.observer import Hold, NullObserver, Observer
from kvarn.scheduler.pending import PendingTokens
from kvarn.scheduler.policy import FirstComeFirstServed, Policy, order_key
from kvarn.scheduler.reuse import PrefixReuse
from kvarn.scheduler.sequence import Sequence
from kvarn.scheduler.speculation import NoSpeculation, Speculation
from kvarn.scheduler.state import SchedulerState
from kvarn.scheduler.steady import SteadySteps
from kvarn.step import SampledToken, ScheduledSequence, SchedulerOutput, StepOutput


class Scheduler(SchedulerState):
    """Queues, budget and blocks of one engine. Not thread-safe; `abort` and `finish` may come between any two calls.

    A step has a token of every running sequence that has one to compute. Prompts get what is left of its budget, those
    of running and of waiting sequences in the policy's order, each as many tokens as it can have: a long prompt is
    computed in chunks. When blocks run out, the last in the policy's order is preempted: it gives its blocks up, and
    later computes its tokens again, the sampled ones included, so what it says does not change. The first in order is
    never preempted, and every request is checked to fit the cache alone, so that all of them end.

    The sequences of a request with n > 1 share the prompt's blocks: the first computes them, then the others fork
    from it one token before the prompt's end, and compute that last token each to sample from.

    Blocks enter the prefix cache in the `update` after they are filled. A sequence that has more than its last token to
    compute looks there before each chunk, so that it goes on from what another has computed meanwhile. One that waits,
    and would compute in this step mostly what another computes in it, waits for the next.

    What was evicted may lie in the cache's second tier. Where moving is cheaper than computing (`Moves`), evicted
    blocks are saved there, and the blocks of a sequence that could be admitted are loaded in a step of their own, in
    which it waits; what turns out to be wrong then is computed. So a preempted sequence is swapped or recomputed,
    whichever takes less.

    A sequence may have a draft, tokens that were guessed to come next (`Drafting`). They are computed after its last
    token; those that are sampled in their places are gained in the same step, the others are forgotten.

    The next step may be scheduled before what came of one is known (`assume`), if back-ends compute steps in order: KV
    that a step is about to write is as good as written for whoever comes after it.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        pool: BlockPool,
        max_model_len: int,
        *,
        eos_token_ids: Iterable[int] = (),
        policy: Policy | None = None,
        budget: Budget | None = None,
        forecast: Forecast | None = None,
        prefix_cache: PrefixCache | None = None,
        moves: Moves | None = None,
        observer: Observer | None = None,
        speculation: Speculation | None = None,
        draft_limits: DraftLimits | None = None,
    ) -> None:
        """pool: all blocks of the KV cache, owned from now on. eos_token_ids: the model's own ends of text.

        policy, budget, forecast: first come first served, config.max_num_batched_tokens for every step, and no requests
        refused for their deadlines, unless given.
        prefix_cache: of that pool; owned from now on. moves: when its second tier is used; None: always.
        observer: told of every decision. speculation: how many tokens are guessed; None: none. draft_limits: of them;
        None: 64 in a step.
        """
        self._observer = observer or NullObserver()
        reuse = PrefixReuse(pool, prefix_cache, moves, self._observer)
        super().__init__(config, pool, policy or FirstComeFirstServed(), reuse)
        control = speculation or NoSpeculation()
        limits = draft_limits or DraftLimits(64, max_model_len)
        self.drafting = Drafting(control, pool, self.reuse, self._observer, limits)
        self.limits = Limits.of(pool, self.reuse.cache.num_reserved, config.max_num_batched_tokens, max_model_len)
        self.num_preemptions = 0
        self._eos_token_ids = frozenset(eos_token_ids)
        self._steady = SteadySteps(pool, self.policy, self.reuse)
        self._budget = budget or ConstantBudget(config.max_num_batched_tokens)
        self._forecast = forecast or NoForecast()
        self._pending = PendingTokens()
        self._step = 0
        self._next_sequence_id = itertools.count()
        self._next_arrival = itertools.count()

    def add(self, request: Request, *, seed: int = 0) -> list[Sequence]:
        """Queues a request; returns its `n` sequences.

        seed: used where the request has none. Raises RequestError where the id is in use or the request would not fit
        alone, QueueFullError where the queue is full, DeadlineError where its first token would come too late.
        """
        if request.request_id in self._groups:
            raise RequestError(f"request_id {request.request_id!r} is in use", field="request_id")
        self.limits.check(request)
        self.policy.check(request)
        self.drafting.control.check(request)
        self.backlog.check(self._config, len(request.prompt_token_ids))
        sampling, arrival = request.sampling, next(self._next_arrival)
        sequences = [
            Sequence(
                sequence_id=next(self._next_sequence_id),
                request=request,
                index=index,
                arrival=arrival,
                seed=seed if sampling.seed is None else sampling.seed,
                max_length=self.limits.max_length_of(request),
                eos_token_ids=frozenset() if sampling.ignore_eos else self._eos_token_ids,
                table=new_tables(self._pool),
                prefix=self.reuse.path(request),
            )
            for index in range(sampling.n)
        ]
        if not sequences[0].lacks_prompt_logprobs:
            sequences[0].expected_hit = sequences[0].prefix.peek(sequences[0].token_ids)
        self._check_deadline(sequences[0])
        group = Group({s.sequence_id: s for s in sequences}, forks=sequences[1:])
        self._groups[request.request_id] = group
        self._sequences.update(group.sequences)
        self.backlog.add(len(request.prompt_token_ids))
        self._waiting.add(sequences[0])
        for sequence in sequences:
            self._observer.queued(sequence)
        return sequences

    def abort(self, request_id: str, *, keep: bool = True) -> list[Sequence]:
        """Ends all sequences of a request and frees their blocks at once; returns them. Unknown ids are ignored.

        keep: whether the prefix cache may keep their KV; see `PrefixReuse.give_up_blocks`.
        """
        group = self._groups.get(request_id)
        sequences = list(group.sequences.values()) if group else []
        for sequence in sequences:
            self._end(sequence, FinishReason.ABORT, keep=keep)
        return sequences

    def finish(self, sequence_id: int, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        """Ends one sequence for a reason that is known outside (a stop string). Unknown and ended ids are ignored."""
        sequence = self._sequences.get(sequence_id)
        if sequence is not None:
            self._end(sequence, reason, stop_reason)

    def schedule(self) -> SchedulerOutput:
        """Decides the next step and takes the blocks it writes. Follow it by `update` with what came of it."""
        self._step += 1
        running = self._pending.without_ends(self._running.values())
        for sequence in running:
            self.reuse.catch_up(sequence)
        decodes = self.drafting.decodes(running, self._budget)
        step = StepAssembly(self._budget.open(decodes), deque(sorted(running, key=self._key)))
        self._schedule_running(step)
        self._admit_waiting(step)
        step.copies += self.drafting.put(step.sequences, self._running)
        if step.held is not None:
            self._observer.held(*step.held)
        finished, self._finished_ids = tuple(self._finished_ids), []
        return SchedulerOutput(
            self._step, tuple(step.sequences), tuple(step.new), finished, tuple(step.copies), *self.reuse.end_step()
        )

    def assume(self, scheduled: SchedulerOutput) -> None:
        """Books what a step computes before its result is there, so that the next one can be scheduled at once.

        It must be the last that was scheduled, sample from known probabilities only (no drafts) and load nothing. Each
        token that it samples is `PENDING` until `update` is called for it, which must come before the next `assume`.
        Sequences that end by their length are not in the next step; those that end otherwise are, for nothing: its
        `update` passes over them, so that what it computes for them is never taken for known.
        """
        self._book_computed(scheduled)
        sampled = (self._sequences.get(part.sequence_id) for part in scheduled.sequences if part.sample)
        self._pending.expect(scheduled.step, [sequence for sequence in sampled if sequence is not None])

    def spill(self) -> SchedulerOutput:
        """A step that computes nothing, but saves what the prefix cache holds to its second tier. For the end."""
        self._step += 1
        self.reuse.cache.spill_all()
        saves, _ = self.reuse.end_step()
        return SchedulerOutput(self._step, (), block_saves=saves)

    def update(
        self,
        scheduled: SchedulerOutput,
        result: StepOutput,
        stops: Callable[[Sequence, SampledToken], str | int | None] = lambda _sequence, _token: None,
    ) -> list[tuple[Sequence, SampledToken]]:
        """Books a step: computed tokens, sampled tokens, sequences that end by them.

        Returns the sampled tokens with their sequences, in order; `finish_reason` of those that ended is set. What
        belongs to sequences that were ended meanwhile is dropped, and so is what comes after a sequence's end. Who has
        failed in the step gains nothing; the caller ends its request (`abort`).
        stops: told of each token as it is booked; where it returns what ends the text there, the sequence ends.
        """
        if result.step != scheduled.step:
            raise ValueError(f"the result of step {result.step} for step {scheduled.step}")
        for load, count in zip(scheduled.block_loads, result.loaded, strict=True):
            self.reuse.book_load(load, count, self._sequences.get(load.sequence_id))
        if not self._pending.settle(scheduled.step):
            self._book_computed(scheduled, {failure.sequence_id for failure in result.failed if not failure.finite})
        sampled: list[tuple[Sequence, SampledToken]] = []
        for token in result.sampled:
            sequence = self._sequences.get(token.sequence_id)
            if sequence is None:
                continue
            if sampled and sampled[-1][0] is sequence:
                # The token before was a guess, and right: its KV was computed in this step.
                self.reuse.computed(sequence, sequence.num_tokens)
            sequence.token_ids.append(token.token_id)
            self.policy.charge_output(self.policy.lane(sequence))
            sampled.append((sequence, token))
            end = sequence.end_at(token.token_id)
            if end is not None:
                self._end(sequence, *end)
            stop = stops(sequence, token)
            if stop is not None and not sequence.finished:
                self._end(sequence, FinishReason.STOP, stop)
        self.drafting.book(scheduled, result, sampled, self._sequences)
        return sampled

    def steady_steps(self, limit: int) -> int:
        """How many of the coming steps, at most `limit`, are sure to be alike, if no token ends a sequence.

        In each of them every running sequence computes and samples one token; nobody is admitted, ends or is preempted.
        """
        if self.drafting.active or (self._waiting and len(self._running) < self._config.max_num_seqs):
            return 0
        return self._steady.count(self._running.values(), limit)

    def skip(self, steps: int, token_ids: Mapping[int, int]) -> None:
        """Books `steps` steady steps at once: everything is as if they had been taken one by one.

        token_ids: by sequence, what it samples in each of them. steps: at most what `steady_steps` says now.
        """
        self._steady.take(sorted(self._running.values(), key=self._key), steps, token_ids)
        self._step += steps

    def _check_deadline(self, sequence: Sequence) -> None:
        """Raises DeadlineError for a sequence that does not wait yet, if it is asked to come in time and will not."""
        if (asked := sequence.request.ttft_slo_ms or self._config.ttft_slo_ms) is not None:
            running, key = list(self._running.values()), self._key(sequence)
            crowd = Crowd(
                running=running,
                prompts=[s for s in running if s.num_uncomputed_tokens > 1 and self._key(s) < key],
                ahead=[*self._waiting.ahead(sequence)],
                max_num_seqs=self._config.max_num_seqs,
                free_blocks=self._pool.num_available,
                blocks_for=lambda tokens: self._pool.windows.most_blocks(tokens, self._config.max_num_batched_tokens),
            )
            check_deadline(asked, self._forecast.ttft(sequence, crowd))

    def _key(self, sequence: Sequence) -> tuple[float, ...]:
        return order_key(self.policy, sequence)

    def _schedule_running(self, step: StepAssembly) -> None:
        while step.pending:
            sequence, count = step.pending[0], 1
            if sequence.num_uncomputed_tokens > 1:
                count = self._chunk(step, sequence)
            if self._make_room(step, sequence, count):
                step.pending.popleft()
                self._put(step, sequence, count)

    def _chunk(self, step: StepAssembly, sequence: Sequence) -> int:
        """Takes tokens for the first pending sequence, after those whom the policy wants before it."""
        self._admit_waiting(step, before=sequence)
        # One token stays for each sequence after this one, so that a long prompt holds nobody up.
        after, start = self._chunked(step) - 1, sequence.num_computed_tokens
        count = max(1, step.budget.room(start, self._most(step, sequence), after))
        step.budget.take(start, count)
        return count

    def _most(self, step: StepAssembly, sequence: Sequence) -> int:
        """Tokens that rows of logits allow: everybody who runs has one, prompts' logprobs may have the others."""
        return sequence.computable(self._config.max_num_seqs - len(self._running) - step.prompt_rows)

    def _chunked(self, step: StepAssembly) -> int:
        """Pending sequences that are no decodes: one token is left for each."""
        return sum(s.num_uncomputed_tokens > 1 for s in step.pending)

    def _admit_waiting(self, step: StepAssembly, before: Sequence | None = None) -> None:
        """Admits waiting sequences in order, up to `before` where it is given, for as long as there is room."""
        step.held = None
        reserved = self._chunked(step)
        while self._waiting:
            sequence = self._waiting.first()
            if before is not None and self._key(sequence) > self._key(before):
                return
            hold = self._try_to_admit(step, sequence, reserved)
            if hold is not None:
                step.held = sequence, hold
                return

    def _try_to_admit(self, step: StepAssembly, sequence: Sequence, reserved: int) -> Hold | None:
        """Admits the first of the waiting sequences; or says why not."""
        if len(self._running) + step.prompt_rows >= self._config.max_num_seqs:
            return Hold.SEATS
        if not step.budget.room(0, 1, reserved):
            return Hold.BUDGET
        if self.reuse.loads(sequence):
            return Hold.LOADING
        if not self._may_fit() and not (self.drafting.give_back() and self._may_fit()):
            return Hold.BLOCKS
        forked = len(sequence.table) > 0
        found = self.reuse.adopt(sequence)
        count = step.budget.room(sequence.num_computed_tokens, sequence.num_uncomputed_tokens, reserved)
        hold = self._hold(sequence, count)
        if hold is not None:
            if not forked:
                # What it waits with cannot be evicted for those that run.
                self.reuse.give_up_blocks(sequence)
            return hold
        if not forked and not sequence.lacks_prompt_logprobs:
            self.reuse.num_queries += sequence.num_tokens
            self.reuse.count_hits(sequence, min(found, sequence.num_computed_tokens))
        if self.reuse.load(sequence, count):
            return Hold.LOADING
        start = sequence.num_computed_tokens
        # It may have given up a part of a block for want of another; then it has room for no fewer tokens.
        self._admit(step, sequence)
        count = step.budget.room(start, self._most(step, sequence), reserved)
        step.budget.take(start, count)
        self._put(step, sequence, count)
        return None

    def _hold(self, sequence: Sequence, count: int) -> Hold | None:
        """What keeps a sequence that would compute `count` tokens out of the step."""
        if not count:
            return Hold.BUDGET
        if self.reuse.repeats(sequence, count):
            return Hold.REPEATS
        return None if self._can_admit(sequence) else Hold.BLOCKS

    def _admit(self, step: StepAssembly, sequence: Sequence) -> None:
        self._waiting.remove(sequence)
        self._running[sequence.sequence_id] = sequence
        self._observer.admitted(sequence)
        if not sequence.announced:
            sequence.announced = True
            step.new.append(sequence.announcement())
        group = self._groups[sequence.request.request_id]
        if not group.started:
            group.started = True
            self.backlog.remove(sequence.num_prompt_tokens)

    def _book_computed(self, scheduled: SchedulerOutput, disowned: Container[int] = ()) -> None:
        """Books the known tokens that a step computes, but for sequences whose KV is not to be believed."""
        for part in scheduled.sequences:
            sequence = self._sequences.get(part.sequence_id)
            if sequence is not None and part.sequence_id not in disowned:
                self.reuse.computed(sequence, part.end)
                sequence.num_prompt_logprobs += part.num_prompt_logits
                self._release_forks(sequence)

    def _put(self, step: StepAssembly, sequence: Sequence, count: int) -> None:
        """Gives the sequence `count` tokens of the step; its blocks are known to be available."""
        start = sequence.num_computed_tokens
        end = start + count
        sample = end == sequence.num_tokens
        prompt = sequence.prompt_targets(start, end)
        if prompt is not None:
            step.prompt_rows += len(prompt.token_ids) - (not sample)
        wanted = self.drafting.wanted(sequence) if sample and self.drafting.active else NOTHING_WANTED
        self.reuse.computes(sequence, end)
        step.copies += self.reuse.take_blocks(sequence, start, end)
        if end >= sequence.num_prompt_tokens:
            self._charge_prompt(sequence, sequence.num_prompt_tokens)
        step.sequences.append(
            ScheduledSequence(
                sequence_id=sequence.sequence_id,
                token_ids=tuple(sequence.token_ids[start:end]),
                start=start,
                block_tables=sequence.table.ids,
                sample=sample,
                num_drafts_wanted=wanted.ahead,
                num_nodes_wanted=wanted.nodes,
                num_copies_wanted=wanted.copies,
                least_copied=wanted.least_copied,
                least_sure=wanted.least_sure,
                guess_cost=wanted.guess_cost,
                prompt=prompt,
            )
        )

    def _charge_prompt(self, sequence: Sequence, num_tokens: int) -> None:
        """Tells the policy once of the prompt tokens that were computed for the sequence."""
        if not sequence.prompt_charged:
            sequence.prompt_charged = True
            computed = max(0, num_tokens - sequence.num_cached_tokens)
            self.policy.charge_prompt(self.policy.lane(sequence), computed)

    def _may_fit(self) -> bool:
        """False where nobody can be admitted, whatever the prefix cache has."""
        return not self._running or self._pool.num_available > len(self._running) * len(self._pool.windows)

    def _can_admit(self, sequence: Sequence) -> bool:
        """Whether there are blocks for all tokens of the sequence and of the running ones, at least one more for each.

        Room for a first chunk would do, but then a long prompt would soon be preempted, its work lost. Where nothing
        runs, sequences that wait with shared blocks give theirs up, so that the first in order always gets in; so does
        a cached block that the sequence would write into the copy of.
        """
        while True:
            wanted = self._blocks_to_catch_up(sequence)
            least = len(self._pool.windows)
            wanted += sum(max(least, self._blocks_to_catch_up(running)) for running in self._running.values())
            if wanted <= self._pool.num_available:
                return True
            if self.drafting.give_back():
                continue
            if self._running:
                return False
            others = [s for s in self._waiting if len(s.table) and s is not sequence]
            if others:
                self._preempt(self._last(others))
            else:
                self.reuse.to_whole_blocks(sequence)

    def _blocks_to_catch_up(self, sequence: Sequence) -> int:
        chunk = self._config.max_num_batched_tokens
        return sequence.table.blocks_to_reach(sequence.num_computed_tokens, sequence.num_tokens, chunk)

    def _make_room(self, step: StepAssembly, sequence: Sequence, count: int) -> bool:
        """Frees blocks for `count` tokens of the first pending sequence; False where that one itself was preempted."""
        start = sequence.num_computed_tokens
        while sequence.table.blocks_needed(start, start + count) > self._pool.num_available:
            if self.drafting.give_back():
                continue
            # Those that are not pending are in this step already.
            victim = self._last(itertools.chain((step.pending[-1],), (s for s in self._waiting if len(s.table))))
            if victim is step.pending[-1]:
                step.pending.pop()
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _last(self, sequences: Iterable[Sequence]) -> Sequence:
        return max(sequences, key=self._key)

    def _preempt(self, sequence: Sequence) -> None:
        self._observer.preempted(sequence)
        self.reuse.give_up_blocks(sequence)
        sequence.draft = sequence.parents = ()
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        if self._running.pop(sequence.sequence_id, None) is not None:
            self._waiting.add(sequence)

    def _release_forks(self, sequence: Sequence) -> None:
        """Lets the other sequences of the request start where the first has computed what they share."""
        group = self._groups[sequence.request.request_id]
        shared = sequence.num_prompt_tokens - 1
        if not group.forks or sequence.num_computed_tokens < shared:
            return
        for fork in group.release_forks():
            fork.table, fork.prefix = sequence.table.fork(shared), sequence.prefix.fork(shared)
            fork.num_computed_tokens = shared
            self._waiting.add(fork)

    def _end(
        self, sequence: Sequence, reason: FinishReason, stop_reason: str | int | None = None, *, keep: bool = True
    ) -> None:
        sequence.finish_reason, sequence.stop_reason = reason, stop_reason
        self._observer.ended(sequence)
        if sequence.announced:
            self._charge_prompt(sequence, sequence.num_computed_tokens)
        if self._running.pop(sequence.sequence_id, None) is None and sequence in self._waiting:
            self._waiting.remove(sequence)
        self.reuse.give_up_blocks(sequence, keep=keep)
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._forecast.ended(sequence)
        if sequence.announced:
            self._finished_ids.append(sequence.sequence_id)
        del self._sequences[sequence.sequence_id]
        group = self._groups[sequence.request.request_id]
        del group.sequences[sequence.sequence_id]
        if sequence.index == 0:  # where it ends before its prompt is computed, the others compute it themselves
            for fork in group.release_forks():
                self._waiting.add(fork)
        if not group.sequences:
            del self._groups[sequence.request.request_id]
            if not group.started:
                self.backlog.remove(sequence.num_prompt_tokens)

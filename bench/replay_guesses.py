"""What guesses would bring, counted over answers that were recorded once: settings are compared in seconds.

    python bench/replay_guesses.py record MODEL ANSWERS --data question.jsonl [--prompts 8] [--tokens 128] [--batch 8]
        [--draft MODEL --draft-vocab 32768]
    python bench/replay_guesses.py replay ANSWERS --speculative k=auto --speculative k=auto,max_k=16,ngram_max=16

`record` answers prompts greedily; with --draft, a draft model says after each token what it holds for the next one, and
how sure it is: up to its first mistake that is what it would guess. `replay` goes through the answers with the real
lookup and the real controller (methods ngram, draft, ngram+draft; the model named there is not read), and a step of M
rows takes what --costs says (ROWS:COST of a plain step, as `kvarn bench spec` prints them), a guess of the draft model
--guess, a token of a prompt --prompt and one that the draft model reads --read. Two speedups: of the tokens after the
first, and of whole answers. Each task's prompts are told in two halves, even and odd ones: what is chosen by one half
can be judged by the other. The first round is to learn from and not counted.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from kvarn.bench.spec import OFF
from kvarn.bench.spec_lane import Lane, Setup
from kvarn.bench.spec_prompts import encode, read_texts
from kvarn.cli.speculative import speculative_config
from kvarn.draft_tree import chain
from kvarn.eval.session import open_session
from kvarn.request import SamplingParams
from kvarn.scheduler import MeasuredCost, StepShape, make_speculation
from kvarn.scheduler.costly import NEARLY
from kvarn.spec import make_drafter
from kvarn.spec.chain import probability_of
from kvarn.step import NewSequence, SampledToken, ScheduledSequence, SchedulerOutput
from kvarn.text import load_tokenizer
from kvarn.weights import open_model

COSTS = "1:1,2:1.15,3:1.25,4:1.29,5:1.38,8:1.62,12:2.1,16:2.6,32:4.8"
"""Of Qwen2.5-Coder-1.5B on two threads of one core, from docs/dev/perf-log.md; beyond 8 rows by its prompts."""
STEP = 0.05
"""Seconds of a plain step: only ratios matter."""


def main() -> None:
    summary, _, details = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="answer prompts")
    recording.add_argument("model", type=Path, help="a .gguf file or a folder")
    recording.add_argument("answers", type=Path, help="the file to write")
    recording.add_argument("--data", type=Path, action="append", required=True, help="see `kvarn bench spec --help`")
    recording.add_argument("--prompts", type=int, default=8, help="of each task")
    recording.add_argument("--tokens", type=int, default=128, help="of an answer at most")
    recording.add_argument("--batch", type=int, default=8, help="prompts that come together")
    recording.add_argument("--draft", type=Path, help="a draft model with the same vocabulary")
    recording.add_argument("--draft-vocab", type=int, default=0, help="it says its first so many tokens only")
    replaying = commands.add_parser("replay", help="count what settings bring")
    replaying.add_argument("answers", type=Path, help="a file of `record`")
    replaying.add_argument("--speculative", action="append", required=True, help="settings, as `kvarn serve` has them")
    replaying.add_argument("--costs", default=COSTS, help="ROWS:COST,… of a step")
    for name, cost in (("guess", 0.24), ("read", 0.036), ("prompt", 0.11)):
        replaying.add_argument(f"--{name}", type=float, default=cost, help=f"of a plain step; unless given {cost}")
    options = parser.parse_args()
    if options.command == "record":
        record(options)
        return
    answers = [json.loads(line) for line in options.answers.read_text().splitlines()]
    rows = [(int(rows), float(cost)) for rows, cost in (pair.split(":") for pair in options.costs.split(","))]
    machine = Machine(rows, options.guess, options.read, options.prompt)
    for settings in options.speculative:
        told = replay(speculative_config(settings), answers, machine)
        print(settings)
        for task, halves in told.items():
            print(f"  {task:16}", "   ".join(f"{decoding:.2f} {whole:.2f}" for decoding, whole in halves))


def record(options) -> None:
    with open_model(options.model) as files:
        prompts = encode(read_texts(options.data, options.prompts), load_tokenizer(files), raw=False)
    longest = max(len(prompt.token_ids) for prompt in prompts)
    lane = Lane.load(OFF, Setup(options.model, 0, options.batch, options.tokens, longest + options.tokens))
    records = []
    for start in range(0, len(prompts), options.batch):
        some = prompts[start : start + options.batch]
        _, said = lane.answer([prompt.token_ids for prompt in some], options.tokens, "")
        for prompt, answer in zip(some, said, strict=True):
            records.append({"task": prompt.task, "prompt": prompt.token_ids, "answer": answer})
    lane.close()
    if options.draft:
        with open_session(options.draft, context=longest + options.tokens) as session:
            for one in records:
                one["draft"], one["sure"] = held(session, one, options.draft_vocab)
    options.answers.write_text("".join(json.dumps(one) + "\n" for one in records))


def held(session, one, vocab):
    """What the draft model holds for each token of an answer, and with which probability."""
    prompt, answer = one["prompt"], one["answer"]
    tokens, sure = [], []
    text = np.array([*prompt, *answer[:-1]], np.int32)
    for _, logits in session.logits(text, len(prompt) - 1):
        for row in logits[:, : vocab or None]:
            tokens.append(int(row.argmax()))
            sure.append(probability_of(row, tokens[-1]))
    return tokens, sure


@dataclass(frozen=True)
class Machine:
    """What things take against a plain step."""

    rows: list[tuple[int, float]]
    guess: float
    read: float
    prompt: float

    def step(self, rows):
        """Of so many rows."""
        for (below, less), (above, more) in pairwise(self.rows):
            if rows <= above:
                return less + (more - less) * (rows - below) / (above - below)
        raise SystemExit(f"--costs must go to {rows} rows")


def replay(config, answers, machine):
    """By task, of its even and its odd prompts, how much faster tokens after the first and whole answers are."""
    cost = MeasuredCost()
    control = make_speculation(config, cost)
    lookup = make_drafter(replace(config, method="ngram", model="", draft_vocab=0, p_min=0.0))
    for _ in range(2):
        plain, taken = defaultdict(float), defaultdict(float)
        prompts, numbers = defaultdict(float), defaultdict(int)
        for one in answers:
            task = one["task"]
            for half in ((task, numbers[task] % 2), ("all", numbers[task] % 2)):
                plain[half] += len(one["answer"]) - 1
                prompts[half] += len(one["prompt"]) * machine.prompt
            seconds = Answer(control, lookup, config, cost, one, machine).seconds()
            for half in ((task, numbers[task] % 2), ("all", numbers[task] % 2)):
                taken[half] += seconds / STEP
            numbers[task] += 1
    return {
        task: [
            (plain[half] / taken[half], (plain[half] + prompts[half]) / (taken[half] + prompts[half]))
            for half in ((task, 0), (task, 1)) if taken[half]
        ]
        for task in [*numbers, "all"]
    }  # fmt: skip


class Answer:
    """One answer, said again in steps of a machine whose times are given."""

    def __init__(self, control, lookup, config, cost, one, machine):
        self.control, self.lookup, self.config, self.cost, self.machine = control, lookup, config, cost, machine
        self.one, self.answer, self.text = one, one["answer"], list(one["prompt"])
        self.seen = len(self.text)
        """Tokens that the lookup was told of."""
        self.sequence = SimpleNamespace(
            draft=(), parents=(), copied=False, num_tokens=len(self.text), acceptance={}, num_output_tokens=0,
            num_accepted_copies=0, num_drafter_tokens=0, drafter_reads=False, sequence_id=0,
            max_length=len(self.text) + len(self.answer),
            sampling=SimpleNamespace(num_speculative_tokens=None, greedy=True),
        )  # fmt: skip

    def seconds(self):
        """That it takes after its first token."""
        count = len(self.text)
        self.lookup.add(NewSequence(0, tuple(self.text), SamplingParams(), 0, 0))
        self.took(StepShape(count, 1, 1, count**2 // 2, count), self.machine.prompt * count)
        self.say(self.answer[:1])
        self.copies(0)
        seconds = 0.0
        while self.sequence.num_output_tokens < len(self.answer):
            seconds += self.step()
        self.lookup.remove(0)
        self.control.ended(self.sequence)
        return seconds

    def took(self, shape, steps):
        """A step took as long as so many plain ones; seconds of it."""
        self.cost.observe(shape, STEP * steps)
        self.control.timed(shape, STEP * steps)
        return STEP * steps

    def say(self, tokens):
        """These come."""
        self.text += tokens
        self.sequence.num_tokens += len(tokens)
        self.sequence.num_output_tokens += len(tokens)

    def left(self):
        """Tokens that may be guessed: the last one comes in any case."""
        return max(0, len(self.answer) - self.sequence.num_output_tokens - 1)

    def step(self):
        """Computes the draft, and makes the next one; seconds of both."""
        sequence, control = self.sequence, self.control
        said, length = sequence.num_output_tokens, len(self.text)
        shape = StepShape(1, 1, 1, length, length)
        control.plan([sequence], shape)
        (count,) = control.choose([sequence], shape, 64) if sequence.draft else (0,)
        wanted, (most, least) = control.wanted(sequence), control.copies(sequence)
        sure = sum(control.least_sure(sequence))
        right = 0
        while right < min(count, self.left()) and sequence.draft[right] == self.answer[said + right]:
            right += 1
        computed = self.config.costly and not sequence.copied
        told = sequence.draft[:count] if computed else sequence.draft
        new = self.answer[said : said + right + 1]
        control.compare(sequence, told, chain(len(told)), new)
        sequence.num_accepted_copies += right * sequence.copied
        seconds = self.took(shape.drafted(length, count), self.machine.step(1 + count))
        self.say(new)
        return seconds + self.propose(wanted, most, least, sure)

    def propose(self, wanted, most, least, sure):
        """Makes the next draft; seconds that it takes."""
        sequence = self.sequence
        found = self.copies(most if self.config.costly else wanted)
        if not self.config.costly:
            return 0.0
        sequence.copied = len(found) >= max(1, least)
        if sequence.copied:
            return 0.0
        unread = sequence.num_tokens - sequence.num_drafter_tokens if wanted else 0
        reading = unread * self.machine.read * STEP if unread > NEARLY else 0.0
        if wanted:
            sequence.num_drafter_tokens, sequence.drafter_reads = sequence.num_tokens, False
        sequence.draft = self.guess(wanted, sure)
        sequence.parents = chain(len(sequence.draft))
        guessing = len(sequence.draft) * self.machine.guess * STEP
        self.control.proposed([(wanted, len(sequence.draft))] if wanted else [], guessing, reading)
        return guessing + reading

    def copies(self, most):
        """What is found to be copied, which becomes the draft."""
        part = ScheduledSequence(0, (self.text[-1],), len(self.text) - 1, ((),), sample=True, num_drafts_wanted=most)
        new = [SampledToken(0, token) for token in self.text[self.seen :]]
        self.seen = len(self.text)
        found = self.lookup.propose(SchedulerOutput(0, (part,)), new, {})
        draft = found[0].token_ids[: self.left()] if found else ()
        self.sequence.draft, self.sequence.parents = draft, chain(len(draft))
        return draft

    def guess(self, wanted, sure):
        """What the draft model says, as far as it is to go."""
        said, draft, believed = self.sequence.num_output_tokens, [], 1.0
        while len(draft) < min(wanted, self.left()) and believed >= sure:
            believed *= self.one["sure"][said + len(draft)]
            draft.append(self.one["draft"][said + len(draft)])
        return tuple(draft)


if __name__ == "__main__":
    main()

"""What prompt lookup would bring, counted over answers that were recorded once: settings are compared in seconds.

    python bench/replay_guesses.py record MODEL ANSWERS --data question.jsonl [--prompts 8] [--tokens 128] [--batch 8]
    python bench/replay_guesses.py replay ANSWERS --speculative k=auto --speculative k=auto,max_k=16,ngram_max=16

`record` answers prompts greedily. `replay` goes through the answers with the real drafter and the real controller, and
a step of M rows takes what --costs says (ROWS:COST of a plain step, as `kvarn bench spec` prints them). Speedups are of
the tokens after the first, so prompts are not in them. Each task's prompts are told in two halves, even and odd ones:
what is chosen by one half can be judged by the other. The first round is to learn from and not counted.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

from kvarn.bench.spec import OFF
from kvarn.bench.spec_lane import Lane, Setup
from kvarn.bench.spec_prompts import encode, read_texts
from kvarn.cli.speculative import speculative_config
from kvarn.draft_tree import chain
from kvarn.request import SamplingParams
from kvarn.scheduler import MeasuredCost, StepShape, make_speculation
from kvarn.spec import make_drafter
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
    replaying = commands.add_parser("replay", help="count what settings bring")
    replaying.add_argument("answers", type=Path, help="a file of `record`")
    replaying.add_argument("--speculative", action="append", required=True, help="settings of method=ngram")
    replaying.add_argument("--costs", default=COSTS, help="ROWS:COST,… of a step")
    options = parser.parse_args()
    if options.command == "record":
        record(options)
        return
    answers = [json.loads(line) for line in options.answers.read_text().splitlines()]
    costs = [(int(rows), float(cost)) for rows, cost in (pair.split(":") for pair in options.costs.split(","))]
    for settings in options.speculative:
        told = replay(speculative_config(settings), answers, costs)
        print(f"{settings:40}", "  ".join(f"{task} {even:.2f} {odd:.2f}" for task, (even, odd) in told.items()))


def record(options) -> None:
    with open_model(options.model) as files:
        prompts = encode(read_texts(options.data, options.prompts), load_tokenizer(files), raw=False)
    longest = max(len(prompt.token_ids) for prompt in prompts)
    lane = Lane.load(OFF, Setup(options.model, 0, options.batch, options.tokens, longest + options.tokens))
    with options.answers.open("w") as file:
        for start in range(0, len(prompts), options.batch):
            some = prompts[start : start + options.batch]
            _, said = lane.answer([prompt.token_ids for prompt in some], options.tokens, "")
            for prompt, answer in zip(some, said, strict=True):
                print(json.dumps({"task": prompt.task, "prompt": prompt.token_ids, "answer": answer}), file=file)
    lane.close()


def replay(config, answers, costs):
    """By task the speedups of its even and its odd prompts."""
    cost = MeasuredCost()
    control, drafter = make_speculation(config, cost), make_drafter(config)
    told = {}
    for _ in range(2):
        tokens, seconds, numbers = defaultdict(int), defaultdict(float), defaultdict(int)
        for record in answers:
            half = record["task"], numbers[record["task"]] % 2
            numbers[record["task"]] += 1
            tokens[half] += len(record["answer"]) - 1
            seconds[half] += one_answer(control, drafter, cost, record, costs)
        told = {
            task: [tokens[task, half] * STEP / seconds[task, half] if tokens[task, half] else 1.0 for half in (0, 1)]
            for task in numbers
        }
    return told


def one_answer(control, drafter, cost, record, costs):
    """Seconds that an answer takes after its first token."""
    text, answer, seconds = list(record["prompt"]), record["answer"], 0.0
    drafter.add(NewSequence(0, tuple(text), SamplingParams(), 0, 0))
    sequence = SimpleNamespace(
        draft=(), parents=(), copied=True, num_tokens=0, acceptance={}, num_output_tokens=0,
        sampling=SimpleNamespace(num_speculative_tokens=None),
    )  # fmt: skip
    took(control, cost, StepShape(len(text), 1, 1, len(text) ** 2 // 2, len(text)), STEP * len(text) / 10)
    said = 0
    while said < len(answer):
        shape = StepShape(1, 1, 1, len(text), len(text))
        control.plan([sequence], shape)
        (count,) = control.choose([sequence], shape, 64) if sequence.draft else (0,)
        right = 0
        while right < count and said + right + 1 < len(answer) and sequence.draft[right] == answer[said + right]:
            right += 1
        new = answer[said : said + right + 1]
        control.compare(sequence, sequence.draft, sequence.parents, new)
        if said:
            seconds += took(control, cost, shape.drafted(len(text), count), STEP * of_rows(costs, 1 + count))
        said, sequence.num_tokens = said + len(new), len(text) + len(new)
        text += new
        part = ScheduledSequence(
            0, (new[-1],), len(text) - 1, ((),), sample=True,
            num_drafts_wanted=min(control.wanted(sequence), max(0, len(answer) - said - 1)),
        )  # fmt: skip
        proposals = drafter.propose(SchedulerOutput(0, (part,)), [SampledToken(0, token) for token in new], {})
        sequence.draft = proposals[0].token_ids if proposals else ()
        sequence.parents = chain(len(sequence.draft))
    drafter.remove(0)
    return seconds


def took(control, cost, shape, seconds):
    cost.observe(shape, seconds)
    control.timed(shape, seconds)
    return seconds


def of_rows(costs, rows):
    for (below, less), (above, more) in pairwise(costs):
        if rows <= above:
            return less + (more - less) * (rows - below) / (above - below)
    raise SystemExit(f"--costs must go to {rows} rows")


if __name__ == "__main__":
    main()

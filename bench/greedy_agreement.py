"""Greedy tokens of the CPU back-end against the reference: 20 varied prompts x 64 tokens of the same file.

    python bench/greedy_agreement.py [MODEL] [--prompts 20] [--tokens 64] [--json]

The CPU back-end quantizes activations to 8 bits; the reference does not. So where the two best logits lie closer than
that error, either token is right. For each prompt both back-ends read the same tokens, the reference's greedy ones;
every position where the CPU's choice differs is reported with the reference's gap between the two tokens, next to the
largest logit difference seen anywhere: a difference with a gap inside twice that error is a tie, any other a fault.
"""

import argparse
import json
import sys

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvarn.backends import InputBatch
from kvarn.eval.session import open_session
from kvarn.weights import catalog

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "Water boils at 100 degrees Celsius because",
    "Q: What is 17 + 25?\nA:",
    "The three most important rules of cooking are",
    "In 1969, astronauts first",
    "Translate to Spanish: Good morning, my friend.",
    "SELECT name, age FROM users WHERE",
    "The main difference between a virus and a bacterium is",
    "Dear Sir or Madam,\nI am writing to",
    "Roses are red, violets are blue,",
    "To tie a tie, first",
    "The stock market fell today after",
    "import numpy as np\n\n# normalize each row\n",
    "My favourite season is autumn, since",
    "Photosynthesis converts light into",
    "List of planets: Mercury, Venus,",
    "He opened the door slowly and saw",
    "Unlike Python, C requires that",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    path = catalog.resolve(options.model)
    rows = []
    with (
        open_session(path, context=256, backend="reference") as reference,
        open_session(path, context=256, backend="cpu") as cpu,
    ):
        prompts = PROMPTS[: options.prompts]
        for prompt in track(prompts, "prompts", console=Console(stderr=True), disable=options.json):
            ids = reference.tokenizer.encode(prompt, add_special_tokens=True)
            start = len(ids)
            expected = greedy(reference, ids, options.tokens)
            alone = greedy(cpu, ids, options.tokens)
            tokens = np.array([*ids, *expected[:-1]], dtype=np.int32)
            want = collect(reference, tokens, start - 1)
            got = collect(cpu, tokens, start - 1)
            error = float(np.abs(want - got).max())
            ties = []
            for i in np.flatnonzero(want.argmax(1) != got.argmax(1)):
                gap = float(want[i].max() - want[i, got[i].argmax()])
                ties.append({"position": int(i), "gap": gap, "tie": gap <= 2 * error})
            same = next((i for i, (a, b) in enumerate(zip(expected, alone, strict=True)) if a != b), options.tokens)
            rows.append({"prompt": prompt, "same_prefix": same, "differences": ties, "max_logit_error": error})
    faults = sum(not d["tie"] for row in rows for d in row["differences"])
    total = len(rows) * options.tokens
    differing = sum(len(row["differences"]) for row in rows)
    if options.json:
        print(json.dumps({"positions": total, "differing": differing, "faults": faults, "prompts": rows}))
    else:
        table = Table(
            "prompt", "free-running, same tokens", "same context: differing (gap of the two logits)", "max logit error"
        )
        for row in rows:
            gaps = ", ".join(
                f"#{d['position']} {d['gap']:.3f}{'' if d['tie'] else ' FAULT'}" for d in row["differences"]
            )
            table.add_row(
                row["prompt"][:40].replace("\n", "⏎"),
                f"{row['same_prefix']} of {options.tokens}",
                gaps or "none",
                f"{row['max_logit_error']:.3f}",
            )
        console = Console(width=130)
        console.print(table)
        equal = total - differing
        console.print(f"{equal} of {total} choices equal in one context; {differing - faults} ties, {faults} faults")
    sys.exit(1 if faults else 0)


def greedy(session, ids, count):
    """The next `count` greedy tokens, one at a time through the cache."""
    tokens, produced = list(ids), []
    start = 0
    while len(produced) < count:
        batch = InputBatch.of_one(tokens[start:], start, num_groups=len(session.model.program.kv_groups))
        logits = session.executable.execute(batch)[session.model.program.output]
        start = len(tokens)
        tokens.append(int(logits[0].argmax()))
        produced.append(tokens[-1])
    return produced


def collect(session, tokens, first):
    """Logits float32[n, vocab] of positions first … of one sequence."""
    return np.concatenate([logits.copy() for _, logits in session.logits(tokens, first)])


if __name__ == "__main__":
    main()

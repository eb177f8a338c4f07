"""Prompts to train heads on, from the texts in shared/data: `python bench/head_prompts.py shared/data prompts.jsonl`.

Questions of GSM8K and MMLU as they are, and tasks over titles and paragraphs of wikitext-2: to summarize, to explain,
to go on. What Spec-Bench asks (MT-bench among it) is left out, since heads are judged by it; HumanEval is not used.
"""

from __future__ import annotations

import csv
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

TASKS = (
    "Summarize the following text in a few sentences.\n\n{}",
    "What is the main point of this text?\n\n{}",
    "Answer with a short list: which facts are in this text?\n\n{}",
    "Continue this text:\n\n{}",
    "Explain this to a child:\n\n{}",
    "Rewrite this in simpler words:\n\n{}",
)
TITLES = (
    "Write a short article about {}.",
    "Write an e-mail in which you tell a friend about {}.",
    "Give me three questions and answers about {}.",
    "Write a short story in which {} plays a part.",
    "What do you know about {}?",
    "Write a Python function that prints facts about {}.",
)


def main() -> None:
    """Writes the prompts, in an order that is always the same."""
    data, out = Path(sys.argv[1]), Path(sys.argv[2])
    held_out = set(spec_bench(data))
    prompts = [prompt for prompt in (*gsm8k(data), *mmlu(data), *wikitext(data)) if plain(prompt) not in held_out]
    prompts = list(dict.fromkeys(prompts))
    random.Random(0).shuffle(prompts)
    out.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
    print(f"{len(prompts)} prompts")


def plain(text: str) -> str:
    """Letters and digits alone: the same question is spelt in more than one way."""
    return re.sub(r"[^a-z0-9]", "", text.lower())


def spec_bench(data: Path) -> Iterator[str]:
    """What is held out."""
    for line in (data / "spec_bench/question.jsonl").read_text(encoding="utf-8").splitlines():
        yield from map(plain, json.loads(line)["turns"])


def gsm8k(data: Path) -> Iterator[str]:
    """Sums in words."""
    for name in ("train.head256.jsonl", "test.jsonl"):
        for line in (data / "gsm8k" / name).read_text(encoding="utf-8").splitlines():
            yield json.loads(line)["question"]


def mmlu(data: Path) -> Iterator[str]:
    """Questions of all subjects, a few of each, without the choices."""
    for path in sorted((data / "mmlu").glob("*/*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            for number, row in enumerate(csv.reader(file)):
                if number < 30 and 40 < len(row[0]) < 1200:
                    yield row[0]


def wikitext(data: Path) -> Iterator[str]:
    """Tasks over paragraphs and titles."""
    chosen = random.Random(1)
    for line in (data / "wikitext2/wiki.valid.raw").read_text(encoding="utf-8").splitlines():
        text = re.sub(r" ([,.;:)])", r"\1", re.sub(r" @(.)@ ", r"\1", line.strip()))
        title = re.fullmatch(r"= ([^=]+) =", text)
        if title:
            for template in TITLES:
                yield template.format(title[1])
        elif len(text) > 200:
            yield chosen.choice(TASKS).format(text[:1500].rsplit(" ", 1)[0])


if __name__ == "__main__":
    main()

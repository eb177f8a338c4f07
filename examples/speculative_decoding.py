"""How to get several tokens from one step of a language model, without changing a word of what it says.

    python examples/speculative_decoding.py [MODEL] [--tokens 96] [--guesses 4] [--temperatures 0 0.7] [--threads N]

A model says one token at a time, and for each it reads all of its weights: on most machines that reading is what a
token takes. Had it a few tokens to look at, it would read the weights once for all of them. So that is what we do:

1. Guess. Something quick proposes the next tokens, each drawn from a distribution q. Here it only counts what followed
   the last words before. A small model would do as well; whatever it is, it may be wrong.
2. Verify. The model reads the last token and all guesses in one step. Row i of the logits says which distribution p it
   has for the token after guess i, provided that the guesses before it are right.
3. Accept or correct. Guess x is taken with probability min(1, p(x) / q(x)). The first one that is not taken is replaced
   by a token drawn from what q offered too little of, max(0, p - q) brought to a sum of 1, and what comes after it is
   thrown away. Where all guesses were taken the last row gives one token more, for nothing.

Why is what comes out distributed as p, exactly? Token x is said in two cases. It is guessed and taken: with probability
q(x) min(1, p(x) / q(x)) = min(p(x), q(x)). Or a guess is refused, which happens with probability 1 - Σ min(p, q) =
Σ max(0, p - q), and x is drawn instead, which makes max(0, p(x) - q(x)) of it. The sum of both is p(x).
(Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding"; Chen et al. 2023.)

With temperature 0, p is 1 for the most likely token: a guess is taken where it is that one, and else that one is said.

What does it bring? Let each guess be right with probability α. With K guesses a step says 1 + α + … + α^K =
(1 - α^(K+1)) / (1 - α) tokens. Let a guess cost the share c of a plain step, made and verified. Then text comes
(1 - α^(K+1)) / ((1 - α)(1 + cK)) times as fast, which the table below compares with what was measured.
"""

import argparse
import time
from dataclasses import dataclass, field

import numpy as np

from kvarn.backends import Executable, InputBatch, KvCacheSpec, StepLimits
from kvarn.engine import make_backend
from kvarn.models import load_model
from kvarn.text import load_tokenizer
from kvarn.weights import catalog, open_model

TEXT = (
    "Here is the timetable of the mill.\n\n"
    "On Monday at 6 o'clock the miller opens the gate and grinds the wheat.\n"
    "On Tuesday at 7 o'clock the miller opens the gate and grinds the rye.\n"
    "On Wednesday at 8 o'clock the miller opens the gate and grinds the barley.\n"
)
BLOCK_SIZE = 16
LONGEST_CONTEXT = 3
"""Tokens that must have stood together before, at most, to guess what comes after them."""


# --- 1. Guess ---------------------------------------------------------------------------------------------------------


def guess_distribution(text: list[int], vocab_size: int) -> np.ndarray | None:
    """q: how often each token followed the last three tokens in the text, or the last two, or the last one.

    None where even the last one never occurred before.
    """
    for length in range(LONGEST_CONTEXT, 0, -1):
        last = text[-length:]
        followed = [text[i + length] for i in range(len(text) - length) if text[i : i + length] == last]
        if followed:
            return np.bincount(followed, minlength=vocab_size) / len(followed)
    return None


def guess(
    text: list[int], most: int, vocab_size: int, random: np.random.Generator
) -> tuple[list[int], list[np.ndarray]]:
    """At most so many tokens to follow the text, and the distribution that each was drawn from."""
    guesses: list[int] = []
    qs: list[np.ndarray] = []
    while len(guesses) < most:
        q = guess_distribution(text + guesses, vocab_size)
        if q is None:
            break
        guesses.append(draw(q, random))
        qs.append(q)
    return guesses, qs


# --- 2. Verify: one step of the model ---------------------------------------------------------------------------------


def read(executable: Executable, token_ids: list[int], first_position: int, outputs: int) -> np.ndarray:
    """Reads tokens that stand at `first_position` and after; the logits of what follows the last `outputs` of them.

    Keys and values of a guess that turns out wrong stay in the cache, behind the text. Nothing looks there: the next
    step begins at the first position that is not known, and writes over them.
    """
    end = first_position + len(token_ids)
    batch = InputBatch.of_tables(
        token_ids=np.array(token_ids, np.int32),
        positions=np.arange(first_position, end, dtype=np.int32),
        query_start=np.array([0, len(token_ids)], np.int32),
        seq_lens=np.array([end], np.int32),
        tables=np.arange(-(-end // BLOCK_SIZE), dtype=np.int32)[None, :],
        output_rows=np.arange(len(token_ids) - outputs, len(token_ids), dtype=np.int32),
        block_size=BLOCK_SIZE,
        num_groups=len(executable.program.kv_groups),
    )
    return executable.execute(batch)["logits"].copy()


def distribution(logits: np.ndarray, temperature: float) -> np.ndarray:
    """p. Top-k, penalties or a grammar would have their place here: the rule takes p as it is."""
    p = np.zeros(len(logits))
    if temperature == 0:
        p[logits.argmax()] = 1
        return p
    p[:] = np.exp((logits - logits.max()) / temperature)
    return p / p.sum()


# --- 3. Accept or correct ---------------------------------------------------------------------------------------------


def draw(p: np.ndarray, random: np.random.Generator) -> int:
    """A token from a distribution."""
    return int(np.searchsorted(np.cumsum(p), random.random() * p.sum(), side="right"))


def accept(guesses: list[int], qs: list[np.ndarray], ps: list[np.ndarray], random: np.random.Generator) -> list[int]:
    """The tokens that are said: the guesses that are taken, and one more. ps: one more than there are guesses."""
    said: list[int] = []
    for token, q, p in zip(guesses, qs, ps, strict=False):
        if random.random() * q[token] >= p[token]:
            said.append(draw(np.maximum(p - q, 0), random))
            return said
        said.append(token)
    said.append(draw(ps[-1], random))
    return said


def said_distribution(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """What `accept` says with which probability, when the guess comes from q: computed, not sampled."""
    taken = q * np.minimum(1, np.divide(p, q, out=np.zeros_like(p), where=q > 0))
    corrected = np.maximum(p - q, 0)
    refused = 1 - taken.sum()
    return taken + refused * corrected / corrected.sum() if refused > 1e-15 else taken


# --- All of it --------------------------------------------------------------------------------------------------------


@dataclass
class Written:
    """A text, and what happened while it was written."""

    tokens: list[int] = field(default_factory=list)
    seconds: float = 0.0
    steps: int = 0
    guessed: int = 0
    right: int = 0
    wrong: int = 0
    seen: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    """The last few pairs of p and q."""


def write(
    executable: Executable, prompt: list[int], count: int, most_guesses: int, temperature: float, seed: int
) -> Written:
    """`count` tokens after the prompt, with at most so many guesses in a step; 0: the usual way."""
    random = np.random.default_rng(seed)
    vocab_size = executable.program.vocab_size
    text, result = list(prompt), Written()
    read(executable, text[:-1], 0, 1)  # the last token is read with the first guesses
    started = time.perf_counter()
    while len(text) < len(prompt) + count:
        guesses, qs = guess(text, most_guesses, vocab_size, random)
        logits = read(executable, [text[-1], *guesses], len(text) - 1, 1 + len(guesses))
        ps = [distribution(row, temperature) for row in logits]
        said = accept(guesses, qs, ps, random)
        text += said

        result.steps += 1
        result.guessed += len(guesses)
        result.right += len(said) - 1
        result.wrong += len(said) <= len(guesses)
        result.seen = (result.seen + list(zip(ps, qs, strict=False)))[-16:]
    result.seconds = time.perf_counter() - started
    result.tokens = text[len(prompt) :]
    return result


def predict(plain: Written, fast: Written) -> tuple[float, float, float, float]:
    """α, K, c and how many times as fast the text should come, by the formula."""
    alpha = fast.right / max(1, fast.right + fast.wrong)
    guesses = fast.guessed / fast.steps
    step_cost = (fast.seconds / fast.steps) / (plain.seconds / plain.steps)
    expected = guesses + 1 if alpha == 1 else (1 - alpha ** (guesses + 1)) / (1 - alpha)
    return alpha, guesses, (step_cost - 1) / guesses if guesses else 0.0, expected / step_cost


def main() -> None:
    summary, _, details = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct", help="a name, a .gguf file or a folder")
    parser.add_argument("--tokens", type=int, default=96, help="tokens to write")
    parser.add_argument("--guesses", type=int, default=4, help="tokens to guess in a step, at most")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.7])
    parser.add_argument("--threads", type=int, default=0, help="0: one for each physical core")
    options = parser.parse_args()
    if min(options.tokens, options.guesses) < 1 or min(options.temperatures) < 0:
        parser.error("tokens and guesses must be at least 1, and no temperature below 0")

    with open_model(catalog.resolve(options.model)) as files:
        model, tokenizer = load_model(files), load_tokenizer(files)
        prompt = tokenizer.encode(TEXT)
        longest = len(prompt) + options.tokens + 2 * (options.guesses + 1)
        blocks = -(-longest // BLOCK_SIZE) * len(model.program.kv_groups)
        cache = KvCacheSpec(num_blocks=blocks, block_size=BLOCK_SIZE)
        limits = StepLimits(longest, 1, longest, max_num_drafts=options.guesses)
        executable = make_backend("cpu", options.threads).load(model.program, model.weights, cache, limits)

    print("temperature      α     K      c   tokens a step   speedup   by the formula   what is said")
    exact = True
    for temperature in options.temperatures:
        write(executable, prompt, 4, options.guesses, temperature, seed=1)  # so that nothing is slow for being first
        plain = write(executable, prompt, options.tokens, 0, temperature, seed=1)
        fast = write(executable, prompt, options.tokens, options.guesses, temperature, seed=1)
        alpha, guesses, cost, predicted = predict(plain, fast)
        length = len(fast.tokens) / fast.steps
        speedup = (plain.seconds / len(plain.tokens)) / (fast.seconds / len(fast.tokens))
        error = max((np.abs(said_distribution(p, q) - p).max() for p, q in fast.seen), default=0.0)
        same = fast.tokens[: options.tokens] == plain.tokens[: options.tokens]
        exact = exact and error < 1e-12 and (same or temperature > 0)
        verdict = ("the same tokens" if same else "OTHER TOKENS") if temperature == 0 else f"p, to within {error:.0e}"
        print(
            f"{temperature:11g}   {alpha:4.2f}   {guesses:3.1f}   {cost:4.2f}   {length:13.2f}   {speedup:6.2f}×   "
            f"{predicted:13.2f}×   {verdict}"
        )
        if temperature == 0:
            written = tokenizer.decode(fast.tokens)
    executable.close()
    if 0 in options.temperatures:
        print(f"\n{TEXT}[{written.rstrip()}]")
    raise SystemExit(0 if exact else 1)


if __name__ == "__main__":
    main()

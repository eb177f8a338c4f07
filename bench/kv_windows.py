"""What sliding windows leave to hold: a long prompt in as few KV blocks as it needs, and in as many as it likes.

    python bench/kv_windows.py MODEL [--tokens 4000] [--answer 32] [--threads N]

Blocks and bytes that one sequence holds at most, while its prompt is computed and while it decodes, beside what it
would hold were every layer to keep all tokens. Both engines must say the same; the smaller has no block too many.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from kvarn.config import CacheConfig, EngineConfig, SchedulerConfig
from kvarn.engine import LoadedEngine, load_engine
from kvarn.planning.memory import sequence_blocks
from kvarn.request import Request, RequestOutput, SamplingParams

STORY = (
    "The mill stood where the river bends. Every morning the miller opened the gate, the water took the wheel, the "
    "wheel took the stones, and the grain became flour. He kept what he had milled in sacks along the wall. "
)
CHUNK = 256


def main() -> None:
    summary, _, details = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a name, a .gguf file or a folder")
    parser.add_argument("--tokens", type=int, default=4000, help="tokens of the prompt")
    parser.add_argument("--answer", type=int, default=32, help="tokens to say")
    parser.add_argument("--threads", type=int, default=0, help="0: one for each physical core")
    options = parser.parse_args()

    length = options.tokens + options.answer
    config = EngineConfig(
        max_model_len=length, threads=options.threads, scheduler=SchedulerConfig(1, CHUNK),
        cache=CacheConfig(enable_prefix_caching=False),
    )  # fmt: skip
    engine = load_engine(options.model, config)
    plan = engine.memory_plan
    assert plan is not None
    many, tokens, answer = run(engine, options.tokens, options.answer)
    least, decoding = sequence_blocks(plan.groups, length, CHUNK)
    few, _, same = run(
        load_engine(options.model, replace(config, cache=replace(config.cache, num_blocks=least))), options.tokens,
        options.answer,
    )  # fmt: skip
    if answer != same:
        raise SystemExit("the answers differ")
    size = plan.use.kv_cache // plan.num_blocks
    groups = len(plan.windows)
    all_kept = -(-length // plan.block_size) * groups
    print(f"{options.model}: {tokens} tokens and {len(answer)} said, the same in both engines")
    print(f"  {groups} KV groups with windows {plan.windows}; a block of {plan.block_size} tokens takes {size:,} bytes")
    for name, blocks in (
        ("all layers keep all", all_kept),
        ("at most, planned", least),
        ("after the prompt's steps, at most", max(many[0], few[0])),
        ("while decoding, planned", decoding),
        ("while decoding, at most", max(many[1], few[1])),
    ):
        print(f"  {name:36}{blocks:6} blocks {blocks * size:14,} bytes  {blocks / all_kept:5.0%}")


def run(engine: LoadedEngine, tokens: int, answer: int) -> tuple[tuple[int, int], int, list[int]]:
    """(Blocks held at most with the prompt, and after it), the prompt's tokens, and what is said."""
    core, said = engine.core, []
    ids = engine.tokenizer.encode(STORY)
    prompt = tuple((ids * (tokens // len(ids) + 1))[:tokens])
    core.add(Request("long", prompt, SamplingParams(temperature=0.0, max_tokens=answer, ignore_eos=True)))
    held = [0, 0]
    while core.has_work():
        for event in core.step():
            assert isinstance(event, RequestOutput)
            said += event.outputs[0].token_ids
        stats = core.stats()
        held[bool(said)] = max(held[bool(said)], stats.num_blocks - stats.free_blocks)
    core.close()
    return (held[0], held[1]), len(prompt), said


if __name__ == "__main__":
    main()

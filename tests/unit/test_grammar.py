"""Grammars are compiled within bounds, each once, and what is wrong with one is named."""

import json
import threading
from collections import Counter

import numpy as np
import pytest

from kvarn.config import GrammarConfig
from kvarn.draft_tree import chain
from kvarn.errors import ConfigError, EngineError, QueueFullError, RequestError
from kvarn.grammar import GrammarCompiler, GrammarMasks, GrammarVocabulary
from kvarn.request import Grammar, GrammarKind, SamplingParams
from kvarn.runner import Proposal
from kvarn.runner.guide import guided
from kvarn.sampling import Draft, ReferenceSampler, TokenMasks
from kvarn.step import NewSequence, SampledToken, ScheduledSequence, SchedulerOutput

EOS = 257
LONG = {"type": "integer", "multipleOf": 99999}
"""Takes about a second."""
DEEP_CHAIN = "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(15000)) + '\nr15000: "a"'
"""Overflows the stack of who compiles it."""


def vocabulary():
    tokens = [*(bytes([i]) for i in range(256)), b"<bos>", b"<eos>", b"ab"]
    return GrammarVocabulary(tokens, frozenset({256, 257}), (EOS,), lambda text: list(text.encode()))


@pytest.fixture
def make_compiler():
    made = []

    def make(**settings):
        made.append(GrammarCompiler(vocabulary, GrammarConfig(**settings)))
        return made[-1]

    yield make
    for compiler in made:
        compiler.close()


@pytest.fixture(scope="module")
def compiler():
    made = GrammarCompiler(vocabulary, GrammarConfig())
    yield made
    made.close()


def said(compiler, grammar, choose=min, most=400):
    """What comes out where always the same of the allowed tokens is chosen."""
    matcher, out = compiler.compile(grammar).matcher(), b""
    for _ in range(most):
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        token = choose(np.flatnonzero(bits).tolist())
        if token == EOS:
            return out.decode()
        out += vocabulary().tokens[token]
        assert matcher.consume_token(token)
    raise AssertionError(f"no end: {out[:100]}")


def test_every_kind_of_grammar(compiler):
    schema = {"type": "object", "properties": {"b": {"enum": [1]}, "a": {"const": "x"}}, "required": ["b", "a"],
              "additionalProperties": False}  # fmt: skip
    assert json.loads(said(compiler, Grammar.json_schema(schema), choose=max)) == {"b": 1, "a": "x"}
    assert said(compiler, Grammar.json_schema(schema), choose=max).index("b") == 2, "properties in the schema's order"
    assert said(compiler, Grammar.regex("^[0-9]{3}-x$")) == "000-x"
    assert said(compiler, Grammar.regex(r"a\$")) == "a$"
    assert said(compiler, Grammar.choice(["(yes)|", "no."]), choose=max) == "no."
    assert said(compiler, Grammar.choice(["(yes)|", "no."])) == "(yes)|"
    assert said(compiler, Grammar.lark('start: "a" b\nb: "c" | "d"'), choose=max) == "ad"
    assert json.loads(said(compiler, Grammar.json_object(), choose=lambda t: EOS if EOS in t else max(t))) == {}
    assert said(compiler, Grammar(GrammarKind.JSON_SCHEMA, "true"), choose=lambda t: 34 if 34 in t else t[0]) == '""'


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (Grammar.json_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (Grammar.json_schema({"if": {"type": "string"}, "then": {"minLength": 3}}), '"if", "then"'),
        (Grammar.json_schema({"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}), "uniqueItems"),
        (Grammar.json_schema({"$ref": "http://example.com/a.json"}), "http://example.com/a.json"),
        (Grammar.json_schema({"type": "foo"}), "foo"),
        (Grammar.json_schema({"$ref": "#"}), "allows nothing"),
        (Grammar.json_schema({"$schema": "http://json-schema.org/draft-03/schema#", "type": "integer"}), "draft 4"),
        (Grammar.json_schema({"properties": {"default": {"additionalProperties": True, "minProperties": 2}}}),
         "minProperties"),
        (Grammar.json_schema(False), "allows nothing"),
        (Grammar.json_schema([1]), "must be a JSON schema"),
        (Grammar(GrammarKind.JSON_SCHEMA, "{"), "is no JSON"),
        (Grammar(GrammarKind.JSON_SCHEMA, "[" * 100_000), "max_grammar_depth"),
        (Grammar.json_schema(json.loads('{"items":' * 70 + "{}" + "}" * 70)), r"deeper than 64 \(max_grammar_depth"),
        (Grammar.regex("a" * 300_000), r"300000 bytes, at most 262144.*max_grammar_bytes"),
        (Grammar.regex("(?=a)b"), "look-around"),
        (Grammar.regex("(a"), "cannot be used"),
        (Grammar.regex("\ud800"), "lone surrogate"),
        (Grammar.choice([]), "1 to 4096 choices"),
        (Grammar.choice([1]), "texts as choices"),
        (Grammar.lark("nonsense"), "cannot be used"),
    ],
    ids=lambda value: value.kind.value if isinstance(value, Grammar) else value[:12],
)
def test_what_cannot_be_is_refused_and_named(compiler, grammar, words):
    with pytest.raises(RequestError, match=words) as caught:
        compiler.compile(grammar)
    assert caught.value.field == "grammar"
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("schema", [
    {"type": "object", "required": ["a"], "minProperties": 2, "properties": {"a": {"const": 1}}},
    {"type": "object", "properties": {"minProperties": {"const": 7}}},
    {"const": {"minProperties": 7}},
    {"$schema": "http://json-schema.org/draft-04/schema#", "type": "null"},
])  # fmt: skip
def test_what_only_looks_like_that_is_taken(compiler, schema):
    assert compiler.compile(Grammar.json_schema(schema))


def test_a_grammar_that_crashes_or_takes_too_long_is_refused_and_the_next_one_compiled(make_compiler):
    with pytest.raises(RequestError, match=r"longer than 0.05 s.*max_grammar_seconds"):
        make_compiler(max_grammar_seconds=0.05).compile(Grammar.json_schema(LONG))
    compiler = make_compiler()
    with pytest.raises(RequestError, match="max_grammar_mb"):
        compiler.compile(Grammar.lark(DEEP_CHAIN))
    assert said(compiler, Grammar.regex("a")) == "a"
    stats = compiler.stats()
    assert (stats.compiled, stats.refused) == (1, 1)
    assert stats.compile_seconds > 0


def test_a_mask_that_takes_too_long_is_refused(make_compiler):
    with pytest.raises(RequestError, match=r"ms for the tokens of one place.*max_mask_ms"):
        make_compiler(max_mask_ms=1e-6).compile(Grammar.regex("[ab]{5}"))


def test_a_grammar_is_compiled_once_and_kept_as_long_as_somebody_has_it(make_compiler):
    compiler = make_compiler(grammar_cache_entries=2)
    first = compiler.compile(Grammar.regex("a"))
    assert compiler.compile(Grammar.regex("a")) is first
    for pattern in "bcd":
        compiler.compile(Grammar.regex(pattern))
    assert compiler.find(Grammar.regex("a")) is first, "it is held here"
    assert compiler.find(Grammar.regex("b")) is None
    del first
    compiler.compile(Grammar.regex("c"))
    compiler.compile(Grammar.regex("d"))
    assert compiler.find(Grammar.regex("a")) is None
    assert (compiler.stats().compiled, compiler.stats().cache_hits) == (4, 3)


def test_who_asks_for_the_same_waits_for_the_same_and_the_queue_has_an_end(make_compiler):
    compiler = make_compiler(max_queued_grammars=2)
    slow = compiler.submit(Grammar.json_schema(LONG))
    assert compiler.submit(Grammar.json_schema(LONG)) is slow
    second = compiler.submit(Grammar.regex("a"))
    with pytest.raises(QueueFullError, match="max_queued_grammars") as caught:
        compiler.submit(Grammar.regex("b"))
    assert caught.value.reason == "queued_grammars"
    slow.result()
    second.result()
    compiler.submit(Grammar.regex("b")).result()


def test_closing_ends_what_waits(make_compiler):
    before = set(threading.enumerate())
    compiler = make_compiler()
    waiting = [compiler.submit(Grammar.json_schema(LONG)), compiler.submit(Grammar.regex("a"))]
    compiler.close()
    assert all(isinstance(future.exception(timeout=10), EngineError | RequestError) for future in waiting)
    with pytest.raises(EngineError):
        compiler.submit(Grammar.regex("c"))
    assert set(threading.enumerate()) <= before


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="max_grammar_depth must be at most 512"):
        GrammarConfig(max_grammar_depth=1000)
    with pytest.raises(ConfigError, match="max_queued_grammars must be above 0"):
        GrammarConfig(max_queued_grammars=0)


@pytest.mark.parametrize("field", ["min_tokens", "ignore_eos"])
def test_what_would_go_on_after_the_end_is_refused(field):
    with pytest.raises(RequestError, match="says where it ends") as caught:
        SamplingParams(grammar=Grammar.regex("a"), **{field: 1})
    assert caught.value.field == field


class Masks:
    """`GrammarMasks` with one sequence, and what it allows."""

    def __init__(self, compiler, pattern):
        self._compiled = compiler.compile(Grammar.regex(pattern))
        self.masks = GrammarMasks(compiler.find, 259, (EOS,))
        self.masks.add(NewSequence(7, (1,), SamplingParams(grammar=Grammar.regex(pattern)), seed=0, stream=0))

    def rows(self, *draft, parents=None, others=()):
        """The allowed tokens after each token of a draft; None where all are. others: parts without a grammar."""
        parents = chain(len(draft)) if parents is None else parents
        parts = [*others, ScheduledSequence(7, (1,), 0, ((0,),), True, draft, parents)]
        found = self.masks.finish(self.masks.begin(parts))
        assert not found.failed
        bits = [np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist() for row in found.bits]
        return [None if row < 0 else bits[row] for row in found.rows]

    def say(self, *tokens):
        self.masks.advance([SampledToken(7, token) for token in tokens])


def test_a_mask_for_each_token_of_a_draft_and_the_matcher_stays_where_it_was(compiler):
    text = Masks(compiler, "ab?(cd|ce)")
    b, c, d, e = b"bcde"
    assert text.rows() == [[97, 258]]
    assert text.rows(97, c, e) == [[97, 258], [b, c], [d, e], [EOS]]
    assert text.rows(97, b, d) == [[97, 258], [b, c], [c], None], "rows behind what is forbidden are not looked at"
    assert text.rows(258, c, d, EOS) == [[97, 258], [c], [d, e], [EOS], None]
    other = ScheduledSequence(8, (1,), 0, ((0,),), True, (5,), (-1,))
    assert text.rows(97, others=(other,)) == [None, None, [97, 258], [b, c]]
    branches = text.rows(97, b, c, c, d, d, b, 97, c, parents=(-1, 0, 0, 1, 2, 3, 3, -1, 7))
    assert branches == [[97, 258], [b, c], [c], [d, e], [d, e], [EOS], [EOS], None, [b, c], [d, e]]
    text.say(97, c)
    assert text.rows(e) == [[d, e], [EOS]]
    text.say(d, EOS)
    assert text.rows() == [[EOS]]


def test_what_is_forced_and_what_of_a_draft_is_allowed(compiler):
    text = Masks(compiler, "xyz(1|2)?")
    assert text.masks.forced(7, 8) == tuple(b"xyz")
    assert text.masks.forced(7, 2) == tuple(b"xy")
    text.say(*b"xyz")
    assert text.masks.forced(7, 8) == ()
    assert text.masks.allowed(7, (*b"1", EOS), (-1, 0)) == {0, 1}
    assert text.masks.allowed(7, tuple(b"12"), (-1, 0)) == {0}
    assert text.masks.allowed(7, (*b"132", EOS, *b"1"), (-1, -1, -1, 2, 1)) == {0, 2, 3}
    assert text.rows() == [[*b"12", EOS]]


def test_no_sequence_with_a_grammar_costs_nothing(compiler):
    text = Masks(compiler, "a")
    other = ScheduledSequence(8, (1,), 0, ((0,),), True)
    assert text.masks.begin([other]) is None
    text.masks.remove(7)
    assert not text.masks.active
    assert text.masks.begin([ScheduledSequence(7, (1,), 0, ((0,),), True)]) is None


def proposed(text, *proposals, wanted=4):
    """What becomes of proposals for sequence 7."""
    part = ScheduledSequence(7, (1,), 0, ((0,),), True, num_drafts_wanted=wanted)
    return guided(text.masks, SchedulerOutput(1, (part,)), proposals)


def test_guesses_are_what_is_forced_or_what_is_allowed(compiler):
    text = Masks(compiler, "xyz(1|2)3[ab]*")
    (forced,) = proposed(text)
    (tree,) = proposed(text, Proposal(7, tuple(b"xyyqz1"), parents=(-1, 0, -1, 1, 1, 4)))
    assert (tree.token_ids, tree.parents) == (tuple(b"xyz1"), (-1, 0, 1, 2)), "a branch has what is forced"
    (chosen,) = proposed(text, Proposal(7, tuple(b"xyyqz1"), parents=(-1, 0, -1, 1, 0, 4)))
    assert chosen.token_ids == tuple(b"xyz")
    assert forced.token_ids == tuple(b"xyz")
    assert proposed(text, Proposal(7, tuple(b"xq")))[0].token_ids == tuple(b"xyz")
    assert proposed(text, Proposal(7, tuple(b"xyz2")))[0].token_ids == tuple(b"xyz2")
    assert proposed(text, wanted=2)[0].token_ids == tuple(b"xy")
    text.say(*b"xyz")
    assert proposed(text) == []
    assert proposed(text, Proposal(7, tuple(b"4"))) == []
    assert proposed(text, Proposal(7, tuple(b"13zb")))[0].token_ids == tuple(b"13")
    (tree,) = proposed(text, Proposal(7, tuple(b"41235ab"), parents=(-1, -1, -1, 1, 1, 3, 3)))
    assert (tree.token_ids, tree.parents) == (tuple(b"123ab"), (-1, -1, 0, 2, 2))
    other = Proposal(8, (1, 2))
    assert proposed(text, other) == [other]


def test_a_drawn_guess_keeps_what_the_sampler_must_reject(compiler):
    """To cut it would let the token in its place come from the wrong distribution."""
    text = Masks(compiler, "[ab]+")
    drawn = np.full((4, 259), 1 / 259, np.float32)
    (kept,) = proposed(text, Proposal(7, tuple(b"abzb"), drawn))
    assert kept.token_ids == tuple(b"abz")
    assert kept.probabilities.shape == (3, 259)
    (whole,) = proposed(text, Proposal(7, tuple(b"abab"), drawn))
    assert whole.token_ids == tuple(b"abab")


def test_tokens_that_are_drawn_ahead_have_the_distribution_of_those_that_are_not(compiler):
    """Chi-square of pairs of tokens under a grammar, guessed from a distribution that knows nothing of it."""
    rng, words, size = np.random.default_rng(3), -(-259 // 32), 4000
    logits = np.full((1, 259), -9.0, np.float32)
    logits[0, list(b"abcz")] = [1.0, 0.5, 0.0, 1.5]
    q = np.full(259, 1e-6)
    q[list(b"abcz")] = [0.2, 0.1, 0.4, 0.3]
    q /= q.sum()
    text = Masks(compiler, "(ab|ac|bc|cc)")
    sampler, counts = ReferenceSampler(259), Counter()
    for seed in range(size):
        sampler.add(NewSequence(7, (1,), SamplingParams(), seed=seed, stream=0))
        draft = tuple(rng.choice(259, 2, p=q).tolist())
        (guess,) = proposed(text, Proposal(7, draft, np.stack([q, q]).astype(np.float32)), wanted=2)
        drawn = guess.token_ids
        part = ScheduledSequence(7, (1,), 0, ((0,),), True, drawn, chain(len(drawn)))
        found = text.masks.finish(text.masks.begin([part]))
        assert found.bits.shape[1] == words
        masks = TokenMasks(found.bits, found.rows)
        rows = np.repeat(logits, 1 + len(drawn), axis=0)
        said = [t.token_id for t in sampler.verify(rows, [7], [1], [Draft(drawn, guess.probabilities)], masks)]
        if len(said) == 1:
            text.say(said[0])
            bits = text.masks.finish(text.masks.begin([ScheduledSequence(7, (1,), 0, ((0,),), True)]))
            said += [t.token_id for t in sampler.sample(logits, [7], [2], TokenMasks(bits.bits, bits.rows))]
            text.masks.remove(7)
            text = Masks(compiler, "(ab|ac|bc|cc)")
        counts[bytes(said[:2])] += 1
    a, b, c = (np.exp(x) for x in (1.0, 0.5, 0.0))
    first = np.array([a, a, b, c]) / (a + b + c)
    expected = size * first * np.array([b / (b + c), c / (b + c), 1, 1])
    observed = np.array([counts[pair] for pair in (b"ab", b"ac", b"bc", b"cc")])
    assert observed.sum() == size
    # The 99.99th percentile of chi-square with 3 degrees of freedom.
    assert ((observed - expected) ** 2 / expected).sum() < 21.1

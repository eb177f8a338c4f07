"""The CUDA back-end's sampling draws what the definition draws: on the card, or in Triton's interpreter."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn.backends.cuda import sampling_layout
from kvarn.backends.cuda.choosing import TokenChooser, rows_at_once
from kvarn.backends.cuda.kernels.sampling import adjust, sample
from kvarn.backends.row_rules import NOT_FINITE, NOTHING_LEFT, WORDS, RowRules
from kvarn.request import SamplingParams
from kvarn.sampling import NativeSampler, TokenMasks
from kvarn.sampling.reference import adjusted_logits, choose, distribution
from kvarn.sampling.rules import RuleBook
from kvarn.step import NewSequence

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB = 211
BEFORE = np.array([40, -1, 9], np.int32)
"""What the step before said; nothing to its second row."""
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 2, 17, 500]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.7]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.7, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.4, -0.5]),
    min_tokens=st.sampled_from([0, 3]),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-100.0, -3.0, 2.5]), max_size=4),
    allowed_token_ids=st.sampled_from([None, None, (3, 40, 41, 77, 210), (9,)]),
    bad_words=st.sampled_from([(), ((5,), (64,))]),
)


def sequence(params, number=0, seed=5, stream=0):
    return NewSequence(number, (1, 2), params, seed, stream, stop_token_ids=(3, 17))


def rules_of(params, seeds, position=4, said=(), pending=None) -> RowRules:
    """One row for each of `params`, whose sequences have said something."""
    book = RuleBook(VOCAB)
    for number, (one, seed) in enumerate(zip(params, seeds, strict=True)):
        book.add(sequence(one, number, seed, number % 3))
        for token in said:
            book.said(number, token)
    return book.of(range(len(params)), [position + (number << 33) for number in range(len(params))], pending)


def words_of(array):
    """The 32-bit words of each row, or record."""
    width = array.itemsize // 4 if array.ndim == 1 else array.shape[1]
    return torch.from_numpy(array.view(np.int32).reshape(len(array), width)).to(DEVICE)


def drawn(logits, rules, **settings):
    """What the kernel says to logits in a wider buffer, where nothing is written that is not asked for."""
    count, vocab = logits.shape
    buffer = torch.full((count, vocab + 7), 1e9, device=DEVICE)
    buffer[:, :vocab] = torch.from_numpy(logits)
    out = torch.full((count + 1,), -77, dtype=torch.int32, device=DEVICE)
    rows, masks, edits = words_of(rules.rows), words_of(rules.masks), words_of(rules.edits)
    adjust(buffer[:, :vocab], rows, edits, torch.tensor(BEFORE, dtype=torch.int32, device=DEVICE), block=4)
    sample(buffer[:, :vocab], rows, masks, out[:count], **{"block": 128, "pivots": 4, **settings})
    assert rows.shape[1] == WORDS
    assert out[count] == -77
    assert (buffer[:, vocab:] == 1e9).all()
    return out[:count].cpu().numpy()


def coarse(seed, rows, step):
    """Random logits; step: many of them equal."""
    logits = np.random.default_rng(seed).standard_normal((rows, VOCAB)) * 3
    return (logits if not step else np.round(logits / step) * step).astype(np.float32)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(PARAMS, min_size=1, max_size=2),
    st.integers(0, 2**63 - 1),
    st.sampled_from([0, 0, 1.0, 4.0]),
    st.lists(st.sampled_from([3, 5, 9, 40, 77, 210]), max_size=6),
    st.lists(st.integers(-1, 2), min_size=2, max_size=2),
)
def test_it_draws_what_the_definition_draws(params, seed, step, said, pending):
    count = len(params)
    logits = coarse(seed % 1000, count, step)
    rules = rules_of(params, [seed + number for number in range(count)], 2 + len(said), said, pending[:count])
    assert drawn(logits, rules).tolist() == choose(logits, rules, BEFORE).tolist()


@settings(max_examples=10, deadline=None)
@given(PARAMS, st.integers(0, 2**63 - 1))
def test_it_draws_what_the_cpu_draws(params, seed):
    """The first token; and the third, by the definition, which has been compared with the kernel, and much faster."""
    native, book = NativeSampler(VOCAB), RuleBook(VOCAB)
    native.add(sequence(params, seed=seed))
    book.add(sequence(params, seed=seed))
    for position in range(2, 8):
        logits = coarse(seed % 1000 + position, 1, 0)
        (said,) = native.sample(logits.copy(), [0], [position])
        rules = book.of([0], [position])
        assert choose(logits, rules).tolist() == [said.token_id]
        assert position > 2 or drawn(logits, rules).tolist() == [said.token_id]
        book.said(0, said.token_id)


def test_a_penalty_is_for_the_token_that_is_pending_too():
    """It is in the edits for having been said before, or it is not; or there was none."""
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, [40, 9, 100]] = [5.0, 4.0, 3.0]
    params = SamplingParams(temperature=0.0, frequency_penalty=2.0)
    cases = [((), -1, 40), ((), 0, 9), ((), 1, 40), ((40,), -1, 9), ((9,), 0, 40), ((40,), 0, 9)]
    for said, pending, expected in cases:
        rules = rules_of([params], [1], said=said, pending=[pending])
        assert drawn(logits, rules).tolist() == [expected]
        assert choose(logits, rules, BEFORE).tolist() == [expected]
    once = rules_of([SamplingParams(temperature=0.0, presence_penalty=0.75)], [1], said=(40,), pending=[0])
    assert drawn(logits, once).tolist() == [40], "not taken off twice"


@pytest.mark.parametrize("step", [0, 1.0])
@pytest.mark.parametrize(
    "params",
    [SamplingParams(top_k=5), SamplingParams(top_p=0.6), SamplingParams(top_k=9, top_p=0.7), SamplingParams(min_p=0.1)],
    ids=lambda p: f"top_k={p.top_k} top_p={p.top_p} min_p={p.min_p}",
)
def test_what_may_come_comes_as_often_as_it_should_and_nothing_else_does(params, step):
    """Many positions of one row: each allowed token's share is within four standard deviations."""
    count = 4096 if DEVICE == "cuda" else 8
    logits = np.repeat(coarse(3, 1, step), count, 0)
    wanted = distribution(logits[0].astype(np.float64), params)
    book = RuleBook(VOCAB)
    book.add(sequence(params, seed=11))
    tokens = drawn(logits, book.of([0] * count, range(count)), block=256, pivots=8)
    shares = np.bincount(tokens, minlength=VOCAB) / count
    assert set(np.flatnonzero(shares)) <= set(np.flatnonzero(wanted))
    assert (np.abs(shares - wanted) <= 4 * np.sqrt(wanted * (1 - wanted) / count) + 1e-9).all()


def test_the_first_of_equals_is_kept_and_taken():
    logits = np.zeros((3, VOCAB), np.float32)
    logits[:, [150, 70, 20, 200]] = 2.0
    params = [SamplingParams(temperature=0.0), SamplingParams(top_k=1), SamplingParams(top_k=3)]
    for position in range(6):
        greedy, one, three = drawn(logits, rules_of(params, [1, 2, 3], position))
        assert (greedy, one) == (20, 20)
        assert three in (20, 70, 150)


def test_biases_and_masks_are_a_row_s_own():
    logits = np.zeros((4, VOCAB), np.float32)
    logits[:, 7] = 1.0
    greedy = {"temperature": 0.0}
    params = [
        SamplingParams(**greedy),
        SamplingParams(**greedy, logit_bias={9: 1.5, 7: -2.0}),
        SamplingParams(**greedy, allowed_token_ids=(33, 32, 31, 210)),
        SamplingParams(**greedy, bad_words=((7,), (0,))),
    ]
    assert drawn(logits, rules_of(params, range(4))).tolist() == [7, 9, 31, 1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_a_token_say_why(temperature):
    nothing, finite = SamplingParams(temperature=temperature), SamplingParams(temperature=temperature, top_p=0.5)
    rules = rules_of([nothing, finite, finite, finite], range(4))
    rules = RowRules(rules.rows, np.concatenate([rules.masks, 0 * rules.masks]), rules.edits)
    rules.rows["mask"][0] = 1
    logits = coarse(1, 4, 0)
    logits[1, 100], logits[2, 210], logits[3] = np.nan, np.inf, -np.inf
    said = drawn(logits, rules).tolist()
    assert said == [NOTHING_LEFT, NOT_FINITE, NOT_FINITE, NOT_FINITE]
    assert said == choose(logits, rules).tolist()


def test_bfloat16_logits_are_read_as_they_are():
    logits = torch.from_numpy(coarse(5, 3, 0)).to(torch.bfloat16)
    params = [SamplingParams(temperature=t, top_k=20, top_p=0.9) for t in (0.0, 0.5, 1.0)]
    rules = rules_of(params, range(3))
    out = torch.empty(3, dtype=torch.int32, device=DEVICE)
    sample(logits.to(DEVICE), words_of(rules.rows), words_of(rules.masks), out, block=128)
    assert out.tolist() == choose(logits.float().numpy(), rules).tolist()
    with pytest.raises(ValueError, match="float32"):
        adjust(logits, words_of(rules.rows), words_of(rules.edits), torch.zeros(1, dtype=torch.int32))


def test_rules_that_hold_a_mask_agree_with_the_sampler_s():
    """`RuleBook` and the samplers read the same parameters."""
    params = SamplingParams(temperature=0.0, allowed_token_ids=(3, 50, 120), bad_words=((50,),), logit_bias={120: -9.0})
    book = RuleBook(VOCAB)
    book.add(sequence(params))
    rules = book.of([0], [4])
    logits = coarse(8, 1, 0)
    masked = adjusted_logits(logits[0].astype(np.float64), params, (), {}, [50])
    assert choose(logits, rules).tolist() == [int(masked.argmax())]
    native = NativeSampler(VOCAB)
    native.add(sequence(params))
    assert native.sample(logits, [0], [4], TokenMasks(rules.masks[:1], np.zeros(1, np.int32)))[0].token_id == int(
        masked.argmax()
    )


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(9, 30))
def test_rows_with_many_edits_are_taken_in_turns(counts, room):
    spans = list(rows_at_once(np.array(counts, np.int32), room))
    assert [row for begin, end, _ in spans for row in range(begin, end)] == list(range(len(counts)))
    for begin, end, edits in spans:
        assert edits == slice(sum(counts[:begin]), sum(counts[:end]))
        assert edits.stop - edits.start <= room


@pytest.mark.parametrize("room", [0, 1 << 16])
def test_the_chooser_says_what_the_definition_says(room, monkeypatch):
    """Where the edits of all rows fit, and where there is room for those of one; twice, in the same memory."""
    monkeypatch.setattr(sampling_layout, "EDITS_AT_ONCE", room)
    params = [
        SamplingParams(temperature=0.0, repetition_penalty=1.3, logit_bias=dict.fromkeys(range(0, 200, 2), -1.5)),
        SamplingParams(temperature=0.0, frequency_penalty=0.5, logit_bias=dict.fromkeys(range(211), 0.5)),
        SamplingParams(temperature=0.8, top_k=5, allowed_token_ids=tuple(range(0, 211, 3))),
        SamplingParams(temperature=0.0, repetition_penalty=2.0, logit_bias=dict.fromkeys(range(90), 0.7)),
    ]
    chooser = TokenChooser(sampling_layout.SamplingLayout(8, 4, VOCAB), torch.device(DEVICE))
    before = torch.from_numpy(BEFORE).to(DEVICE)
    for seed, chosen in ((1, params), (2, params[1:])):
        rules = rules_of(chosen, range(len(chosen)), said=(40, 9), pending=[0, -1, 2, 2][: len(chosen)])
        logits, out = coarse(seed, len(chosen), 0), torch.zeros(len(chosen), dtype=torch.int32, device=DEVICE)
        chooser.choose(torch.from_numpy(logits.copy()).to(DEVICE), rules, before, out)
        assert out.tolist() == choose(logits, rules, BEFORE).tolist()

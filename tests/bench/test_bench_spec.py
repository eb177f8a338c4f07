"""`kvarn bench spec`: prompts by task, what is counted, what is made of it, and what is said."""

import gzip
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from kvarn.bench import spec, spec_lane, spec_prompts, spec_report
from kvarn.bench.spec import OFF, Row, Why, expected, explain, row_costs
from kvarn.bench.spec_lane import Lane, Method, Setup, Tally
from kvarn.bench.statistics import Spread
from kvarn.cli import main
from kvarn.cli.bench_spec import parse_methods
from kvarn.config import SpeculativeConfig
from kvarn.errors import ConfigError
from kvarn.step import ScheduledSequence, SchedulerOutput

CAT = "the cat sat on the mat. the cat sat on the mat. the cat"
NGRAM = Method("ngram k=4", SpeculativeConfig(k=4))
TREE = Method("lookahead", SpeculativeConfig("lookahead", k=8))
PNG = b"\x89PNG\r\n\x1a\n"


def write_lines(path: Path, *records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def data(tmp_path) -> Path:
    """Three prompts of two tasks."""
    return write_lines(
        tmp_path / "question.jsonl",
        {"category": "writing", "turns": [CAT, "And now?"]},
        {"category": "qa", "turns": ["one two three one two three one two"]},
        {"category": "stem", "turns": ["abcabcabcabc"]},
    )


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["bench", "spec", *(str(argument) for argument in arguments)])
    return caught.value.code or 0


def test_prompts_are_found_by_task(data, tmp_path):
    human = tmp_path / "HumanEval.jsonl.gz"
    human.write_bytes(gzip.compress(json.dumps({"task_id": "HumanEval/0", "prompt": "def f():"}).encode()))
    texts = spec_prompts.read_texts([data, human], 5)
    assert [(text.task, text.text[:8]) for text in texts] == [
        ("conversation", "the cat "), ("conversation", "abcabcab"), ("qa", "one two "), ("HumanEval", "def f():"),
    ]  # fmt: skip


def test_prompts_come_from_all_over_a_task(tmp_path):
    path = write_lines(tmp_path / "many.jsonl", *({"prompt": str(number)} for number in range(10)))
    assert [text.text for text in spec_prompts.read_texts([path], 4)] == ["0", "2", "5", "7"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "--data: bad.jsonl, line 2 is not JSON"),
        ("[1]", "--data: bad.jsonl, line 2 must be an object"),
        ('{"turns": []}', "line 2 must have a text as `prompt` or `question`, or a list of texts as `turns`"),
        ('{"prompt": 5}', "line 2 must have a text"),
        ('{"prompt": "a", "category": 1}', "line 2: the category must be a text"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, said):
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"prompt": "good"}}\n{line}\n')
    with pytest.raises(ConfigError, match=said.replace("[", r"\[")):
        spec_prompts.read_texts([path], 1)


def test_methods_are_named_by_their_settings():
    methods = parse_methods("off; method=ngram,k=auto ;k=4;method=medusa,heads=/a/folder/m.safetensors")
    assert [method.name for method in methods] == ["off", "ngram k=auto", "k=4", "medusa heads=m.safetensors"]
    assert methods[0] == OFF
    assert [method.name for method in spec.with_off(methods)] == [method.name for method in methods]
    assert [method.name for method in spec.with_off(methods[2:3])] == ["off", "k=4"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("off", "--methods must have one beside off"),
        ("k=2;k=2", "--methods: k=2 is given twice"),
        ("k=2;;off", "--speculative: settings are name=value"),
        ("method=guess", "speculative method must be one of"),
    ],
)
def test_bad_methods_are_named(text, said):
    with pytest.raises(ConfigError, match=said):
        parse_methods(text)


def load(method, model, batch=1) -> Lane:
    return Lane.load(method, Setup(model, 1, batch, 40, 200))


@pytest.mark.parametrize("method", [OFF, NGRAM, TREE], ids=lambda method: method.name)
@pytest.mark.parametrize("batch", [1, 3])
def test_what_is_counted_is_what_the_engine_counts(model, method, batch):
    lane = load(method, model, batch)
    try:
        prompts = [tuple(text.encode()) for text in (CAT, "abcabcabc", "x")][:batch]
        tally, answers = lane.answer(prompts, 40, "")
        stats = lane._core.stats()
        assert (tally.draft_tokens, tally.accepted) == (stats.draft_tokens, stats.accepted_tokens)
        assert (tally.copied_tokens, tally.copied_accepted) == (stats.copied_tokens, stats.accepted_copies)
        assert stats.copied_tokens == (stats.draft_tokens if method is NGRAM else 0)
        assert tally.tokens == stats.generated_tokens == sum(map(len, answers))
        assert tally.decode_tokens <= tally.tokens - batch
        assert tally.seconds > tally.decode_seconds > tally.draft_seconds
        if method is OFF:
            assert tally.rows == tally.turns == tally.decode_tokens
            assert (tally.guessed, tally.accepted, tally.refused) == (0, 0, 0)
        else:
            assert tally.accepted > 0 and tally.turns < tally.decode_tokens
            assert tally.refused <= stats.drafts
        if method is NGRAM:
            assert tally.rows == tally.turns + tally.guessed  # a chain: as many rows as tokens ahead
        if method is TREE:
            assert tally.rows > tally.turns + tally.guessed
        assert {rows: len(seconds) for rows, seconds in lane.step_seconds.items()} == tally.steps
        assert sum(tally.steps.values()) <= stats.steps
    finally:
        lane.close()


@pytest.mark.parametrize(("right", "ended", "refused"), [(1, False, 1), (1, True, 0), (3, False, 0)])
def test_a_draft_cut_short_by_the_answers_end_is_not_refused(right, ended, refused):
    part = ScheduledSequence(1, (5,), 9, ((0,),), True, draft=(1, 2, 3), parents=(-1, 0, 1))
    log = spec_lane._Log(SchedulerOutput(0, (part,)), 0.5, {1: (3, right, ended, True)})
    tally = Lane(NGRAM, None, log)._count(right + 1, 0.1)
    assert (tally.draft_tokens, tally.accepted, tally.refused) == (3, right, refused)
    assert (tally.copied_tokens, tally.copied_accepted, tally.copied_refused) == (3, right, refused)
    assert (tally.guessed, tally.rows, tally.turns) == (3, 4, 1)


def test_a_corpus_knows_only_its_own_round(model):
    """Else the second round would copy from the first, which had the same prompts."""
    lane = load(Method("corpus", SpeculativeConfig(k=4, corpus_tokens=1000)), model)
    try:
        first, again, other = (lane.answer([tuple(CAT.encode())], 40, salt)[0] for salt in ("1", "1", "2"))
        assert again.guessed > first.guessed
        assert (other.guessed, other.accepted) == (first.guessed, first.accepted)
    finally:
        lane.close()


def test_guesses_are_told_by_source():
    total = Tally(draft_tokens=50, accepted=21, refused=9, copied_tokens=20, copied_accepted=12, copied_refused=3)
    copied, computed = spec.sources(total)
    assert (copied.name, copied.draft_tokens, copied.accepted_tokens, copied.acceptance) == ("copied", 20, 12, 0.8)
    assert (computed.name, computed.draft_tokens, computed.accepted_tokens, computed.acceptance) == (
        "computed", 30, 9, 0.6,
    )  # fmt: skip
    assert [one.name for one in spec.sources(Tally(draft_tokens=5, accepted=2, refused=1))] == ["computed"]
    assert spec.sources(Tally()) == ()
    text = spec_report._by_source([replace(make(), sources=(copied, computed))])
    assert re.search(r"qa +.*copied +.*20 +.*12 +.*0\.80", text)


def test_the_formula():
    assert expected(0.5, 3) == 1 + 0.5 + 0.25 + 0.125
    assert expected(1.0, 3) == 4
    assert expected(0.0, 3) == 1


PLAIN = Tally(seconds=11.0, tokens=101, decode_seconds=10.0, decode_tokens=100, turns=100, rows=100)
"""A tenth of a second for a token, and a second for the prompt."""
GUESSED = Tally(
    seconds=7.0, tokens=101, decode_seconds=6.0, draft_seconds=0.5, decode_tokens=100, turns=50, rows=150,
    guessed=100, draft_tokens=100, accepted=50, refused=25,
)  # fmt: skip


def test_a_speedup_is_explained():
    why = explain([PLAIN], [GUESSED], 50 / 75, 11 / 7)
    assert (why.guesses, why.rows) == (2, 3)
    assert why.step_cost == pytest.approx(1.2)
    assert why.cost == pytest.approx(0.1)
    assert why.drafting == pytest.approx(0.1)
    assert why.decode_speedup == pytest.approx(10 / 6)
    assert why.lengths == pytest.approx(2 / (1 + 2 / 3 + 4 / 9))
    assert why.prompts == pytest.approx((11 / 7) / (10 / 6))
    predicted = expected(50 / 75, why.guesses) / why.step_cost
    assert predicted * why.lengths * why.prompts == pytest.approx(11 / 7)


def test_rounds_are_compared_in_pairs():
    """A machine that is slower in one round is so for both."""
    slow_plain, slow = (
        replace(tally, seconds=3 * tally.seconds, decode_seconds=3 * tally.decode_seconds,
                draft_seconds=3 * tally.draft_seconds)
        for tally in (PLAIN, GUESSED)
    )  # fmt: skip
    taken = {
        ("qa", "off"): spec._Taken([PLAIN, slow_plain]),
        ("qa", "a"): spec._Taken([GUESSED, slow], {(1, 2)}),
    }
    row = spec.make_row(taken, "qa", "a", 4, {})
    assert row.speedup.low == pytest.approx(row.speedup.high) == pytest.approx(11 / 7)
    assert row.why.step_cost == pytest.approx(1.2)
    assert (row.acceptance, row.length, row.num_equal) == (pytest.approx(2 / 3), 2, 3)
    off = spec.make_row(taken, "qa", "off", 4, {})
    assert (off.acceptance, off.predicted, off.why, off.speedup.median) == (None, None, None, 1)


def test_a_speedup_is_counted_by_the_rows_of_steps():
    """Whatever the machine did meanwhile: steps of three rows took 1.5 times a plain one, with whatever method."""
    times = spec.median_times([{1: [1.0, 2.0, 9.0]}, {1: [2.0], 3: [3.0, 3.0]}])
    assert times == {1: 2.0, 3: 3.0}
    plain = Tally(seconds=40.0, decode_seconds=30.0, steps=Counter({1: 12}))
    guessed = Tally(seconds=99.0, draft_seconds=1.0, prompt_draft_seconds=0.5, steps=Counter({1: 2, 3: 4}))
    assert spec.counted(plain, guessed, times) == pytest.approx((10 + 24) / (10 + 4 + 12 + 1.5))
    assert spec.counted(plain, plain, times) == 1
    assert plain.plus(guessed).steps == {1: 14, 3: 4}


def test_rows_are_compared_with_a_plain_step():
    plain = {1: [1.0, 2.0, 3.0], 2: [9.0]}
    assert row_costs([plain, {1: [5.0], 3: [4.0] * 4, 4: [6.0] * 3}, {4: [6.0] * 2}]) == ({4: 3.0}, 1)
    assert row_costs([{}, {}]) == ({}, 0)


def make(method="a", equal=4, why=True, speedup=0.8) -> Row:
    causes = Why(2, 3, 1.5, 0.1, 0.25, 1.4, 0.9, 0.99) if why else None
    rate = Spread(speedup, speedup, speedup)
    return Row("qa", method, 4, equal, 0.5 if why else None, 2.0, rate, rate, 1.2, causes, 10, 5, (1.0,))


def test_losing_and_unpredicted_rows_have_a_note():
    assert spec_report.note(make()) == "3.0 rows cost 1.50×, lengths 0.90×"
    assert spec_report.note(make(speedup=1.2)) == "lengths 0.90×"
    assert spec_report.note(make(why=False)) == "nothing guessed"
    assert spec_report.note(make("off", why=False)) == ""


def test_other_answers_are_told():
    assert spec_report.equal_lines([make(), make("off", 0)])[0].startswith("answers: equal to those without guesses")
    assert spec_report.equal_lines([make(), make("b", 1)]) == [
        "answers DIFFER from those without guesses: qa, b: 3 of 4"
    ]


SMALL = ("--raw", "-n", "24", "--rounds", "2", "--threads", "1")


def test_the_command_as_json(model, data, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "spec.png"
    methods = ("--methods", "method=ngram,k=4;method=lookahead,k=8")
    assert run(model, "--data", data, *SMALL, *methods, "--batch", "2", "--json", "--plot", plot) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["data"], result["batch"], result["rounds"], result["left_out"]) == (["question.jsonl"], 2, 2, 0)
    rows = result["speculation"]["rows"]
    assert [(row["task"], row["method"]) for row in rows] == [
        (task, method)
        for task in ("conversation", "qa", "all tasks")
        for method in ("off", "ngram k=4", "lookahead k=8")
    ]
    for row in rows:
        assert row["num_equal"] == row["num_prompts"] and len(row["seconds"]) == 2
        if row["why"] is not None:
            product = row["predicted"] * row["why"]["lengths"] * row["why"]["prompts"]
            assert product == pytest.approx(row["speedup"]["median"])
    together = {row["method"]: row["draft_tokens"] for row in rows[6:]}
    assert together["ngram k=4"] == rows[1]["draft_tokens"] + rows[4]["draft_tokens"] > 0
    assert plot.read_bytes().startswith(PNG)


def test_the_command_as_a_table(model, data, capsys):
    assert run(model, "--data", data, *SMALL, "--methods", "k=4", "--prompts", "1") == 0
    text = capsys.readouterr().out
    assert "2 prompts, batch 1, greedy answers of at most 24 tokens; median of 2 in turns" in text
    assert "answers: equal to those without guesses, token by token, in every round" in text
    assert [line.split()[:2] for line in text.splitlines() if line.startswith("conversation")] == [
        ["conversation", "off"], ["conversation", "k=4"], ["conversation", "k=4"],
    ]  # fmt: skip


def test_wrong_answers_end_with_a_status(model, data, capsys, monkeypatch):
    right = spec_lane.Lane.answer

    def wrong(self, prompts, max_tokens, salt):
        tally, answers = right(self, prompts, max_tokens, salt)
        return tally, [[*answer, 1] for answer in answers] if self.method is not OFF else answers

    monkeypatch.setattr(spec_lane.Lane, "answer", wrong)
    assert run(model, "--data", data, *SMALL, "--methods", "k=4", "--prompts", "1") == 1
    assert "answers DIFFER from those without guesses: qa, k=4: 1 of 1" in capsys.readouterr().out


def test_prompts_without_room_are_left_out(model, data, capsys):
    assert run(model, "--data", data, "--raw", "--rounds", "1", "--threads", "1", "-n", "490", "--methods", "k=2") == 0
    ran = capsys.readouterr().out.splitlines()
    assert any(line.startswith("1 prompt, batch 1") and "2 prompts left out" in line for line in ran)
    assert run(model, "--data", data, "--raw", "-n", "511") == 1
    assert "--max-tokens 511 leaves 1 tokens for a prompt, and all are longer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--rounds", "0"), "--rounds must be between 1 and 1000, not 0"),
        (("--prompts", "0"), "--prompts must be between 1 and 100000, not 0"),
        (("--batch", "5000"), "--batch must be between 1 and 4096, not 5000"),
        (("-n", "0"), "--max-tokens must be between 1 and 1048576, not 0"),
        (("--methods", "k=0"), "speculative k must be auto, or between 1 and 128, not 0"),
        (("--plot", "a.pdf"), "--plot must name a .png file"),
        (("--data", "nowhere.jsonl"), "--data: cannot read nowhere.jsonl: No such file or directory"),
    ],
)
def test_bad_options_are_named_with_their_limit(model, data, capsys, arguments, said):
    assert run(model, "--data", data, *arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err

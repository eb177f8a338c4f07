"""What `kvarn eval structured` says is so: invalid answers are found, refusals are named, files are read."""

import json
import re

import pytest
from typer.testing import CliRunner

from kvarn.cli.eval import app
from kvarn.config import SpeculativeConfig
from kvarn.errors import ConfigError
from kvarn.eval import structured
from kvarn.eval.structured import Status, evaluate_structured, read_schemas

GOOD = {
    "type": "object",
    "properties": {"id": {"type": "integer", "minimum": 1}, "tags": {"type": "array", "items": {"enum": ["a", "b"]}}},
    "required": ["id"],
}
SCHEMAS = [
    ("good", GOOD),
    ("pattern", {"type": "string", "pattern": "^[A-C]{2,4}-[0-9]$"}),
    ("keyword", {"type": "array", "uniqueItems": True}),
    ("unchecked", {"type": "string", "pattern": "^\\p{Lu}$"}),
    ("long", {"type": "string", "minLength": 5000}),
]


def test_each_schema_gets_its_status():
    result = evaluate_structured(SCHEMAS)
    found = {outcome.name: outcome for outcome in result.outcomes}
    assert {name: outcome.status.value for name, outcome in found.items()} == {
        "good": "valid", "pattern": "valid", "keyword": "refused", "unchecked": "unchecked", "long": "unfinished",
    }  # fmt: skip
    assert json.loads(found["good"].answer)["id"] >= 1
    assert result.coverage == 0.8
    assert result.reasons() == [('Unimplemented keys: ["uniqueItems"]', 1)]
    assert 0 < result.compile_ms(0.5) <= result.compile_ms(0.99)


def test_guessing_ahead_changes_no_answer():
    plain, guessed = (evaluate_structured(SCHEMAS[:2], speculative=s) for s in (None, SpeculativeConfig(k=5)))
    assert [o.answer for o in plain.outcomes] == [o.answer for o in guessed.outcomes]


def test_an_answer_that_is_no_instance_is_found(monkeypatch):
    """As if a keyword were dropped without a word."""
    real = structured.Grammar.json_schema
    monkeypatch.setattr(structured.Grammar, "json_schema", lambda schema: real({"type": "integer", "maximum": 0}))
    (outcome,) = evaluate_structured([("good", GOOD)]).outcomes
    assert outcome.status is Status.INVALID
    assert "is not of type 'object'" in outcome.detail


def test_files_of_every_form(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(GOOD))
    (tmp_path / "many.jsonl").write_text(
        "\n".join(
            json.dumps(line)
            for line in (
                {"file": "bench", "case": {"schema": {"type": "null"}}},
                {"unique_id": "hub", "json_schema": json.dumps(GOOD)},
                {"type": "string"},
                True,
            )
        )
    )
    assert list(read_schemas(tmp_path)) == [
        ("bench", {"type": "null"}), ("hub", GOOD), ("many.jsonl:3", {"type": "string"}), ("many.jsonl:4", True),
        ("one.json", GOOD),
    ]  # fmt: skip
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match=r"bad\.json"):
        list(read_schemas(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no \.json"):
        list(read_schemas(tmp_path / "empty"))


def test_the_command_prints_coverage_refusals_and_times(tmp_path):
    path = tmp_path / "schemas.jsonl"
    path.write_text("\n".join(json.dumps({"name": name, "json_schema": schema}) for name, schema in SCHEMAS[:3]))
    told = CliRunner().invoke(app, ["structured", str(path)])
    assert told.exit_code == 0, told.output
    assert "3 schemas: 66.7% accepted (2 valid, 0 invalid, 1 refused" in told.stdout
    assert re.search(r"P50 \d+\.\d ms, P99 \d+\.\d ms", told.stdout)
    assert 'Unimplemented keys: ["uniqueItems"]' in told.stdout
    record = json.loads(CliRunner().invoke(app, ["structured", str(path), "--json", "--limit", "1"]).stdout)
    assert (record["schemas"], record["valid"], record["invalid"], record["coverage"]) == (1, 1, 0, 1.0)


def test_a_sample_of_jsonschemabench(test_data):
    """Every 40th schema; the whole of it by `kvarn eval structured FOLDER`."""
    result = evaluate_structured(list(read_schemas(test_data / "jsonschemabench"))[::40])
    assert result.count(Status.INVALID) == 0, [o for o in result.outcomes if o.status is Status.INVALID]
    assert result.count(Status.VALID) > 0.8 * len(result.outcomes)
    assert all(re.search(r"[Uu]n|not|limit|exceed", o.detail) for o in result.outcomes if o.status is Status.REFUSED)

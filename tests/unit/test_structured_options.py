"""`--json-schema` and `--regex`: answers in the terminal are what they say."""

import json

import pytest
from typer.testing import CliRunner

from kvarn.cli.app import app
from kvarn.cli.structured import structured
from kvarn.errors import ConfigError
from kvarn.request import Grammar, SamplingParams
from kvarn.testing import write_tiny_gguf

SCHEMA = {"enum": ["red", "green"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_gguf(tmp_path_factory.mktemp("models") / "tiny.gguf")


def test_each_option_is_a_grammar(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA, separators=(",", ":")))
    plain = SamplingParams(max_tokens=3)
    assert structured(plain, None, None) is plain
    assert structured(plain, None, "a+") == SamplingParams(max_tokens=3, grammar=Grammar.regex("a+"))
    assert structured(plain, str(path), None).grammar == Grammar.json_schema(SCHEMA)
    with pytest.raises(ConfigError, match="exclude one another"):
        structured(plain, str(path), "a+")
    with pytest.raises(ConfigError, match="--json-schema: cannot read"):
        structured(plain, str(tmp_path / "none"), None)


def test_an_answer_in_the_terminal(model, tmp_path):
    said = CliRunner().invoke(app, ["run", "hi", "-m", str(model), "--regex", "(yes|no)"])
    assert said.exit_code == 0, said.output
    assert said.stdout.strip() in ("yes", "no")
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    said = CliRunner().invoke(app, ["run", "hi", "-m", str(model), "--json-schema", str(path), "--json"])
    assert json.loads(json.loads(said.stdout)["text"]) in SCHEMA["enum"]


def test_a_schema_that_cannot_be_is_named(model, tmp_path):
    path = tmp_path / "schema.json"
    path.write_text('{"type": "array", "uniqueItems": true}')
    said = CliRunner().invoke(app, ["run", "hi", "-m", str(model), "--json-schema", str(path)])
    assert said.exit_code != 0
    assert "uniqueItems" in said.output + str(said.exception)

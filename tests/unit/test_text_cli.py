"""`kvarn tokenize` on a vocabulary-only file."""

import io
import json
import sys

import pytest

from kvarn.cli import main


@pytest.fixture
def vocabulary(test_data):
    return str(test_data / "tokenizer_vectors" / "ggml-vocab-phi-3.gguf")


@pytest.fixture
def tokenize(monkeypatch, capsys, vocabulary):
    def run(data, *options):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        try:
            main(["tokenize", vocabulary, *options])
        except SystemExit as end:
            code = end.code or 0
        else:
            code = 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_ids_as_json(tokenize, test_data):
    code, out, _ = tokenize(b" Hello\r\n<s>", "--json")
    assert code == 0
    ids = json.loads(out)["ids"]
    assert 1 not in ids
    assert tokenize(json.dumps({"ids": ids}).encode(), "--decode", "--json")[1] == '{"text": " Hello\\r\\n<s>"}\n'


def test_special_tokens_where_asked(tokenize):
    parsed = json.loads(tokenize(b"Hello<|end|>", "--json", "--add-special", "--parse-special")[1])["ids"]
    assert (parsed[0], parsed[-1]) == (1, 32007)
    assert json.loads(tokenize(b"", "--json", "--add-special")[1]) == {"ids": [1]}


def test_a_table_to_read(tokenize):
    code, out, err = tokenize("é😀".encode(), "--add-special")
    assert code == 0
    assert out.splitlines()[0].split() == ["1", "'<s>'", "special"]
    assert "b'\\xf0'" in out
    assert "tokens" in err


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (b"a\xff", [], "stdin is not UTF-8 at byte 1"),
        (b"one two", ["--decode"], "stdin must hold token ids"),
        (b'{"id": [1]}', ["--decode"], "stdin must hold token ids"),
        (b"99999", ["--decode"], "token ids must be 0 to 32063, not 99999"),
        (b"1", ["--decode", "--add-special"], "neither --add-special nor --parse-special"),
    ],
)
def test_mistakes_are_told(tokenize, data, options, message):
    code, out, err = tokenize(data, *options)
    assert code != 0
    assert message in " ".join(err.replace("│", " ").split())
    assert out == ""

"""The layers of ARCHITECTURE.md hold: import-linter agrees with the contracts in pyproject.toml."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_import_contracts():
    lint = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([lint], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_files_stay_small():
    long = {
        str(path.relative_to(ROOT)): lines
        for folder in ("src", "native")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".cpp", ".h") and (lines := len(path.read_text().splitlines())) > 520
    }
    assert not long, f"files of more than about 500 lines want to be two: {long}"


def test_no_architecture_name_is_tested_outside_models():
    families = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "gpt2")
    offenders = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in (ROOT / "src/kvarn").rglob("*.py")
        if not {"models", "testing"} & set(path.relative_to(ROOT / "src/kvarn").parts[:1])
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if any(f'== "{family}"' in line or "family in (" in line for family in families)
    ]
    # Tokenizer kinds are named after models in files ("gpt2" is byte-level BPE there); text/ may test for those.
    assert [o for o in offenders if not o.startswith("src/kvarn/text/")] == []

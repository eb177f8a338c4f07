"""`import kvarn` costs next to nothing, and no import of the library drags in what only an app needs."""

import json
import os
import subprocess
import sys

from kvarn.testing import write_tiny_gguf

HEAVY = ("torch", "fastapi", "uvicorn", "transformers", "numpy", "matplotlib")


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys, json; print(json.dumps(sorted(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    return set(json.loads(output.splitlines()[-1]))


def work_of_imports(statement: str) -> tuple[int, int]:
    """Microseconds of own work of kvarn's modules and of all others, as the interpreter itself counts them."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "0"}
    trace = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", statement],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
    ).stderr
    ours = others = 0
    for line in trace.splitlines()[1:]:
        own, _, name = line.removeprefix("import time:").split("|")
        if name.strip().split(".")[0] == "kvarn":
            ours += int(own)
        else:
            others += int(own)
    return ours, others


def test_import_kvarn_loads_nothing_heavy():
    loaded = modules_after("import kvarn")
    assert not loaded & set(HEAVY)


def test_the_engine_needs_neither_torch_nor_the_web_server():
    loaded = modules_after("import kvarn; kvarn.LLM; kvarn.AsyncLLM")
    assert not loaded & {"torch", "fastapi", "uvicorn", "transformers", "matplotlib"}


def test_an_answer_in_the_terminal_needs_neither_asyncio_nor_pydantic(tmp_path):
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    arguments = ["run", "hi", "-m", str(path), "-n", "2", "--temperature", "0.5"]
    loaded = modules_after(f"from kvarn.cli import main\ntry: main({arguments})\nexcept SystemExit: pass")
    assert "jinja2" in loaded
    assert not loaded & {"asyncio", "pydantic", "rich", "fastapi", "huggingface_hub", "gguf", "safetensors"}


def test_deciding_loads_no_arrays():
    loaded = modules_after("import kvarn.scheduler, kvarn.cache")
    assert "numpy" not in loaded


def test_imports_take_little_more_than_what_they_import():
    """A ratio in one run: numpy, jinja2 and the standard library's modules are as slow as the machine is."""
    best = min(ours / others for ours, others in (work_of_imports("import kvarn; kvarn.LLM") for _ in range(3)))
    assert best < 1.25, f"{best:.2f} times the work of all other modules"

"""Counts the instructions of the hot kernels with callgrind and compares them with the record: `make instructions`.

A rise of more than 3 % fails. `--update` writes the record, instruction_counts.json, anew. What is counted are the AVX2
kernels, since Valgrind knows no AVX-512: the kernels of both are one source, so most rises show in either; a change of
vec_avx512.h alone does not. Counts of one compiler are exact and the same on every machine; of different compilers they
cannot be compared. Exit codes: 0 no rise; 1 a rise, or a kernel without a record; 2 nothing could be counted.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from building import build

RECORD = Path(__file__).with_name("instruction_counts.json")
ALLOWED = 0.03


@dataclass(frozen=True)
class Counts:
    """Instructions of one call of each kernel, and what compiled them."""

    compiler: str
    flags: str
    kernels: dict[str, int]


@dataclass
class Comparison:
    """A table of both counts, remarks, and why the check fails (empty: it passes)."""

    table: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def compare(recorded: Counts, now: Counts) -> Comparison:
    """Kernels that rose by more than ALLOWED fail, unless compilers differ; so do kernels that only one side has."""
    result = Comparison([f"{'kernel':<28}{'recorded':>12}{'now':>12}{'change':>9}"])
    comparable = recorded.compiler == now.compiler
    if not comparable:
        result.remarks.append(
            f"The record is of {recorded.compiler}, this is {now.compiler}: the counts cannot be compared."
        )
    elif recorded.flags != now.flags:
        result.remarks.append(f"The compiler's flags changed: the record is of '{recorded.flags}'.")
    for name in [*now.kernels, *(name for name in recorded.kernels if name not in now.kernels)]:
        before, after = recorded.kernels.get(name), now.kernels.get(name)
        change = "" if before is None or after is None else f"{after / before - 1:+.2%}"
        result.table.append(f"{name:<28}{before or '-':>12}{after or '-':>12}{change:>9}")
        if before is None or after is None:
            result.failures.append(f"{name}: {'not recorded' if before is None else 'no longer counted'}; --update")
        elif comparable and after > before * (1 + ALLOWED):
            result.failures.append(f"{name}: {change}, more than {ALLOWED:.0%}")
        elif comparable and after < before * (1 - ALLOWED):
            result.remarks.append(f"{name}: {change}. Record it with --update, or a rise back to there goes unseen.")
    return result


def count(program: Path) -> Counts:
    """Runs `count_kernels` under callgrind, kernel by kernel."""
    about = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    fields = [line.split(": ", 1) for line in about.splitlines()]
    values = {key: value for key, value in fields if key != "kernel"}
    kernels = {value: count_kernel(program, value) for key, value in fields if key == "kernel"}
    return Counts(values["compiler"], values["flags"], kernels)


def count_kernel(program: Path, name: str) -> int:
    """Instructions within `counted`; raises RuntimeError with what Valgrind said."""
    valgrind = ["valgrind", "--tool=callgrind", "--toggle-collect=counted", "--callgrind-out-file=/dev/null"]
    run = subprocess.run([*valgrind, program, name], check=False, capture_output=True, text=True)
    collected = re.search(r"Collected : (\d+)", run.stderr)
    if run.returncode or collected is None or collected[1] == "0":
        raise RuntimeError(f"counting '{name}' failed:\n{run.stderr}")
    return int(collected[1])


def main() -> int:
    parser = argparse.ArgumentParser(description="Counts the instructions of the hot kernels.")
    parser.add_argument("--update", action="store_true", help=f"write {RECORD.name} anew")
    update = parser.parse_args().update
    if platform.machine() not in ("x86_64", "AMD64"):
        print("The counted kernels are those of AVX2, which this machine does not have.")
        return 2
    if shutil.which("valgrind") is None:
        print("valgrind is missing; on Debian: apt-get install valgrind", file=sys.stderr)
        return 2
    try:
        now = count(build("instructions", "-DKVARN_COUNT=ON", ("count_kernels",)) / "count_kernels")
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    if update:
        RECORD.write_text(json.dumps(asdict(now), indent=2) + "\n")
    result = compare(Counts(**json.loads(RECORD.read_text())), now)
    print("\n".join([*result.table, *result.remarks]))
    for failure in result.failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if result.failures else 0


if __name__ == "__main__":
    sys.exit(main())

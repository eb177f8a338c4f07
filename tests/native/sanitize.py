"""Builds the native checks under sanitizers and runs them: `make sanitize`.

AddressSanitizer and UBSan run all kernels of the instruction sets this machine has over random shapes; ThreadSanitizer
runs the thread pool.
"""

from __future__ import annotations

import subprocess

from building import build

RUNS = {"address,undefined": ("check_kernels", "check_pool"), "thread": ("check_pool",)}


def main() -> None:
    for sanitizers, targets in RUNS.items():
        folder = build(f"sanitize-{sanitizers.replace(',', '-')}", f"-DKVARN_SANITIZE={sanitizers}", targets)
        for target in targets:
            print(f"{sanitizers}: {target}", flush=True)
            subprocess.run([folder / target], check=True)


if __name__ == "__main__":
    main()

"""Compiles what steps of tiny models launch (see `compiled.py`): `python compile_steps.py` prints a line for each kernel."""

from compiled import compiling
from op_programs import groups_of, ragged

from kvarn.backends import KvCacheSpec, StepLimits
from kvarn.backends.cuda import CudaBackend
from kvarn.config import CudaConfig
from kvarn.tensors import DType
from kvarn.testing.models import tiny_model

CASES = (
    ("gemma3_text", "bfloat16", "dense", "float16"),
    ("gpt2", "float16", "int8", "int8"),
    ("qwen3", "bfloat16", "int4", "float16"),
)


def main() -> None:
    """A prompt beside a decode, then a decode alone."""
    for family, dtype, weights, kv in CASES:
        model = tiny_model(family, dtype=DType.F32)
        backend = CudaBackend(CudaConfig(dtype, weights, device="cpu"))
        limits = StepLimits(64, 4, 512)
        executable = backend.load(model.program, model, KvCacheSpec(8 * groups_of(model), 16, kv), limits)
        with compiling() as kernels:
            for parts in ([(range(30), 0), ([1], 17)], [([1], 30)]):
                executable.execute(ragged(parts, num_groups=groups_of(model), outputs=[0]))
        for kernel in kernels:
            print(f"{family:<12} {kernel.name:<24} {kernel.registers:>4} registers {kernel.stack:>5} B stack")


if __name__ == "__main__":
    main()

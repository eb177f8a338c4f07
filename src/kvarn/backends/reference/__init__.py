"""The definition: a program run op by op in plain NumPy float32, and the oracle of every other back-end."""

from kvarn.backends.reference.executable import ReferenceBackend, ReferenceExecutable

__all__ = ["ReferenceBackend", "ReferenceExecutable"]

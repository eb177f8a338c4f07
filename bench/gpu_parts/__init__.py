"""The parts of bench/gpu.py: what each measures on a card, and how it is told."""

"""Triton kernels, one op family a file: each public function takes tensors, launches, and returns at once."""

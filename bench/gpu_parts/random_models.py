"""Random weights made on the device, for kvarn and for transformers: the same numbers in both."""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvarn.models import program_from_config
from kvarn.models.decoder import HF_NAMES
from kvarn.models.in_memory import InMemoryModel
from kvarn.models.source import reference_of, with_prefix
from kvarn.program import Program
from kvarn.tensors import DType, Tensor

SHIFTS = 1 << 16
"""Weights are cut from one pool of numbers, each from a place of its own among so many."""


def random_model(settings: dict[str, Any], device: str, seed: int = 0) -> InMemoryModel:
    """A model of that config.json with bf16 weights in the host's memory, which share one pool of random numbers.

    Matrices are normal with a variance that keeps activations of about one; norms' weights lie around one.
    """
    config, program = program_from_config(settings, "hf")
    pool = _pool(max(weight.num_elements for weight in program.weights) + SHIFTS, config.hidden_size, device, seed)
    tensors = {}
    for weight in program.weights:
        begin = zlib.crc32(weight.name.encode()) % SHIFTS
        values = pool[begin : begin + weight.num_elements]
        if weight.name.endswith("norm.weight"):
            values = (values + 1).to(torch.bfloat16)
        tensors[weight.name] = Tensor(DType.BF16, weight.shape, _bytes(values))
    return InMemoryModel(config, program, tensors)


def transformers_model(model: InMemoryModel, settings: dict[str, Any], device: str, dtype: torch.dtype) -> Any:
    """transformers' model of the same config with the same weights, on the device, its attention SDPA."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {key: value for key, value in settings.items() if key != "model_type"}
    config = AutoConfig.for_model(settings["model_type"], **fields)
    with torch.device(device):
        twin = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    _copy_weights(model.program, model, dict(twin.named_parameters()))
    return twin.eval().requires_grad_(False)


def _copy_weights(program: Program, model: InMemoryModel, parameters: dict[str, torch.nn.Parameter]) -> None:
    names = with_prefix(HF_NAMES, "model.")
    for weight in program.weights:
        stored = torch.from_numpy(model.tensor(weight.name).data).view(torch.bfloat16).reshape(weight.shape)
        parameters[reference_of(names, weight.name).name].data.copy_(stored)


def _pool(size: int, hidden: int, device: str, seed: int) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    values = torch.randn(size, generator=generator, device=device, dtype=torch.float32)
    return (values / math.sqrt(hidden)).to(torch.bfloat16).cpu()


def _bytes(values: torch.Tensor) -> NDArray[np.uint8]:
    array: NDArray[np.uint8] = values.contiguous().view(torch.uint8).numpy()
    return array

"""Whether there is a card that runs what this back-end makes, and what memory it has. torch is imported when asked."""

from __future__ import annotations

from kvarn.errors import ConfigError

INSTALL = "pip install 'kvarn[cuda]' installs PyTorch and Triton"


def check_device(device: str) -> None:
    """Raises ConfigError, with the next step, where torch, Triton or the card is missing."""
    try:
        import torch
        import triton  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"device {device} needs {error.name}, which is not installed: {INSTALL}") from None
    if device != "cuda":
        return
    if torch.version.cuda is None:
        raise ConfigError(
            f"device {device} needs PyTorch with CUDA, but {torch.__version__} is built without: install one for your "
            "driver from https://pytorch.org/get-started"
        )
    if not torch.cuda.is_available():
        raise ConfigError(f"device {device}: PyTorch finds no NVIDIA driver or card; `nvidia-smi` says what is there")


def check_types(device: str, dtype: str, kv_dtype: str) -> None:
    """Raises ConfigError for types that kernels cannot be compiled with for this card: Ampere is the first that
    multiplies bfloat16, Ada the first that converts e4m3. For devices that `check_device` has passed."""
    if device != "cuda":
        return
    import torch

    has = torch.cuda.get_device_capability(device)
    for setting, value, what, least in (
        ("dtype", dtype, "bfloat16", (8, 0)),
        ("kv_cache_dtype", kv_dtype, "bfloat16", (8, 0)),
        ("kv_cache_dtype", kv_dtype, "fp8_e4m3", (8, 9)),
    ):
        if value == what and has < least:
            raise ConfigError(
                f"{setting} {what} needs a card of compute capability {least[0]}.{least[1]} or later; "
                f"{torch.cuda.get_device_name(device)} has {has[0]}.{has[1]}"
            )


def card_name(device: str) -> str:
    """Which card it is. Raises ConfigError as `check_device` does."""
    check_device(device)
    import torch

    return torch.cuda.get_device_name(device) if device == "cuda" else "Triton's interpreter"


def card_memory(device: str) -> tuple[int, str]:
    """Bytes that are free on the card, and which card it is. Raises ConfigError as `check_device` does."""
    check_device(device)
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return free, f"free on the GPU beside CUDA's context, {card_name(device)}"

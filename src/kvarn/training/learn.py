"""Training heads: AdamW, a cosine schedule, checkpoints that a later run goes on from with the same result."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from kvarn.errors import ConfigError
from kvarn.spec.heads import HeadsShape
from kvarn.training.batches import Batch, Window, chosen, make_batch
from kvarn.training.nets import Net, beginning, make_net, trained
from kvarn.training.store import TextStore
from kvarn.training.target import Target

CHECKPOINT_SECONDS = 30.0
WARM_UP = 0.03
"""Share of the training in which the learning rate rises."""
TEACHER_TOKENS = 64
"""The target's likeliest tokens at a place, which guesses are trained towards."""
LATER = 0.8
"""What each further guess weighs beside the one before it (Cai et al. 2024, section 2.2.1)."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long, and how. steps None: until `seconds` of training have passed, those of earlier runs counted."""

    steps: int | None
    seconds: float
    sequences: int = 16
    """Windows in a step."""
    length: int = 64
    """Anchors in a window."""
    ahead: int = 3
    """Guesses that are trained."""
    rate: float = 1e-3
    """Learning rate at its highest."""
    seed: int = 0


def fast_products() -> torch.autocast:
    """Products of matrices in bfloat16, summed in float32, where the processor has them: five times as fast."""
    has_it: bool = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.autocast("cpu", torch.bfloat16, enabled=has_it)


@dataclass(slots=True)
class Progress:
    """How far a training has come."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0


class Learner:
    """Heads in training. Owns parameters and optimizer."""

    def __init__(
        self, kind: str, shape: HeadsShape, target: Target, ids: NDArray[np.int32], schedule: Schedule, key: str
    ) -> None:
        """ids: int32[draft_vocab], the tokens that heads can say. key: names all that the result depends on."""
        self.progress = Progress()
        self._kind = kind
        self._target = target
        self._schedule = schedule
        self._key = key
        self._params = trained(beginning(kind, shape, target, ids, schedule.seed))
        self._net: Net = make_net(kind, shape, self._params, target)
        self._optimizer = torch.optim.AdamW(
            self._params.values(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self._ids = torch.from_numpy(ids.astype(np.int64))
        self._teacher = torch.from_numpy(target.rows(target.logits.weight, ids))

    def train(
        self, store: TextStore, windows: Sequence[Window], checkpoint: Path, told: Callable[[float], None]
    ) -> None:
        """Trains to the schedule's end. told: of the share that is done. Raises ConfigError where there are no windows.
        """
        if not windows:
            raise ConfigError("--data: too few answers to train on; give more prompts or --max-tokens")
        plan, progress = self._schedule, self.progress
        started, saved = time.monotonic() - progress.seconds, time.monotonic()
        while (share := self._share()) < 1:
            now = chosen(windows, plan.sequences, plan.seed, progress.step)
            self._step(make_batch(store, now, plan.length, plan.ahead))
            progress.step += 1
            progress.seconds = time.monotonic() - started
            told(share)
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                self.save(checkpoint)
                saved = time.monotonic()
        self.save(checkpoint)

    def acceptance(self, store: TextStore, windows: Sequence[Window]) -> tuple[float, ...]:
        """How often each guess is the token that came, of those whose guesses before were."""
        plan = self._schedule
        right = np.zeros(plan.ahead + 1, np.int64)
        asked = np.zeros(plan.ahead, np.int64)
        for start in range(0, len(windows), plan.sequences):
            batch = make_batch(store, windows[start : start + plan.sequences], plan.length, plan.ahead)
            with torch.no_grad():
                logits = self._guess(batch)[1]
            still = np.ones(batch.valid.shape[:2], np.bool_)
            for k, guess in enumerate(logits):
                came = batch.tokens[:, 2 + k : 2 + k + plan.length]
                still &= batch.valid[:, :, k]
                asked[k] += still.sum()
                still &= self._ids[guess.argmax(-1)].numpy() == came
                right[k] += still.sum()
        return tuple(float(r / a) if a else 0.0 for r, a in zip(right, asked, strict=False))

    def tensors(self) -> dict[str, NDArray[np.floating]]:
        """The heads as a file has them."""
        found: dict[str, NDArray[np.floating]] = {}
        for name, value in self._params.items():
            values = value.detach().numpy()
            found[name] = values.astype(np.float16) if values.ndim == 2 else values.copy()
        return found

    def _share(self) -> float:
        plan, progress = self._schedule, self.progress
        return progress.step / plan.steps if plan.steps is not None else progress.seconds / max(plan.seconds, 1e-9)

    def _guess(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Hidden states after the target's last norm, and the logits of each guess."""
        normed = torch.from_numpy(self._target.normed(batch.features))
        features = normed if self._kind == "medusa" else torch.from_numpy(batch.features)
        plan = self._schedule
        with fast_products():
            return normed, self._net.guess(features, torch.from_numpy(batch.tokens), plan.length, plan.ahead)

    def _step(self, batch: Batch) -> None:
        """One step: each guess against what the target itself would have said there."""
        plan = self._schedule
        share = self._share()
        warm = min(1.0, (share + 1e-3) / WARM_UP)
        for group in self._optimizer.param_groups:
            group["lr"] = plan.rate * warm * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
        normed, guesses = self._guess(batch)
        logits = self._target.logits
        with torch.no_grad():
            with fast_products():
                said = F.linear(normed, self._teacher).float() * logits.scale
            if logits.softcap is not None:
                said = logits.softcap * torch.tanh(said / logits.softcap)
            most, places = said.topk(min(TEACHER_TOKENS, said.shape[-1]))
            said = most.softmax(-1)
        valid = torch.from_numpy(batch.valid)
        loss = torch.zeros(())
        for k, guess in enumerate(guesses):
            where, rows = valid[:, :, k], slice(1 + k, 1 + k + plan.length)
            # Cross entropy against the target's likeliest tokens, which have nearly all of its probability.
            of_those = guess.float().log_softmax(-1).gather(-1, places[:, rows])
            each = -(said[:, rows] * of_those).sum(-1)
            loss = loss + LATER**k * (each * where).sum() / max(1, int(where.sum()))
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(list(self._params.values()), 1.0)
        self._optimizer.step()
        self.progress.tokens += int(batch.valid[:, :, 0].sum())

    def save(self, path: Path) -> None:
        """Writes a checkpoint: whole, or not at all."""
        tensors: dict[str, Tensor] = {}
        for name, value in self._params.items():
            tensors[f"value.{name}"] = value.detach()
            state = self._optimizer.state.get(value)
            if state:
                tensors[f"mean.{name}"], tensors[f"square.{name}"] = state["exp_avg"], state["exp_avg_sq"]
        progress = self.progress
        said = {"key": self._key, "step": progress.step, "seconds": progress.seconds, "tokens": progress.tokens}
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_bytes(save(tensors, {name: str(value) for name, value in said.items()}))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def resume(self, path: Path) -> None:
        """Goes on from a checkpoint. Raises ConfigError where it is damaged, or of another training."""
        try:
            with safe_open(str(path), framework="pt") as file:
                said: Mapping[str, str] = file.metadata() or {}
                if said.get("key") != self._key:
                    raise ConfigError(f"{path} is of another training (model, data or setting); leave --resume out")
                self._take({name: file.get_tensor(name) for name in file.keys()}, int(said["step"]))  # noqa: SIM118
                self.progress = Progress(int(said["step"]), float(said["seconds"]), int(said["tokens"]))
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ConfigError(f"{path} is no checkpoint to go on from: {error}") from error

    def _take(self, tensors: Mapping[str, Tensor], step: int) -> None:
        for name, value in self._params.items():
            if tensors[f"value.{name}"].shape != value.shape:
                raise ValueError(f"{name} has another shape")
            with torch.no_grad():
                value.copy_(tensors[f"value.{name}"])
            if step:
                self._optimizer.state[value] = {
                    "step": torch.tensor(float(step)),
                    "exp_avg": tensors[f"mean.{name}"].clone(),
                    "exp_avg_sq": tensors[f"square.{name}"].clone(),
                }

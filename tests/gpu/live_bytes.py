"""`LiveBytes`: the bytes of the tensors that are alive, as a card's allocator would count them, in the interpreter.

There the card is the CPU, too. Counted are tensors that are allocated or made of such; not what NumPy allocated, which
is the host's, nor the interpreter's own tensors while a kernel runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

from kvarn.backends.cuda.memory import aligned


class LiveBytes(TorchDispatchMode):
    """Watches within a `with`. now, most: bytes alive after the last operation that allocated, and at most so far."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._in_kernel = False

    @property
    def now(self) -> int:
        """Of tensors that are alive."""
        self._live = {key: found for key, found in self._live.items() if not found[0].expired()}
        return sum(size for _, size in self._live.values())

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and counts what it made."""
        kwargs = kwargs or {}
        result = op(*args, **kwargs)
        if self._in_kernel:
            return result
        given = [self._key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        of_card = kwargs.get("device") is not None or any(key in self._live for key in given)
        for leaf in tree_leaves(result):
            if of_card and isinstance(leaf, torch.Tensor) and self._key(leaf) not in given:
                storage = leaf.untyped_storage()
                self._live[self._key(leaf)] = StorageWeakRef(storage), aligned(storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    @staticmethod
    def _key(tensor: torch.Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def __enter__(self) -> LiveBytes:
        self._launch = launch = interpreter.GridExecutor.__call__

        def watched(executor: Any, *args: Any, **kwargs: Any) -> None:
            self._in_kernel = True
            try:
                launch(executor, *args, **kwargs)
            finally:
                self._in_kernel = False

        interpreter.GridExecutor.__call__ = watched
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        interpreter.GridExecutor.__call__ = self._launch

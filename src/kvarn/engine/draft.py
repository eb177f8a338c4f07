"""The draft model of an engine: whether it fits the target, what it takes, and loading it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from kvarn.backends import Backend, Executable, KvCacheSpec, MemoryUse, StepLimits
from kvarn.config import SpeculativeConfig
from kvarn.engine.loadable import LoadableModel, stored_types
from kvarn.errors import ConfigError
from kvarn.planning import MemoryPlan, Uses
from kvarn.program import Program
from kvarn.sampling import Sampler
from kvarn.spec.draft_model import DraftModelDrafter, draft_limits
from kvarn.spec.fewer_tokens import CutSource, with_fewer_tokens
from kvarn.spec.same_vocabulary import check_same_vocabulary
from kvarn.tensors import TensorSource


@dataclass(slots=True)
class DraftModel:
    """A model that guesses for another. Owns its executable, once loaded, and what `on_close` closes."""

    model: LoadableModel
    spellings: Sequence[str]
    """How its tokens are spelt, by id (`kvarn.text.spellings`)."""
    backend: Backend
    name: str = "the draft model"
    on_close: Callable[[], None] = lambda: None
    """The weights must stay open until then."""
    vocab: int = 0
    """Tokens that it can say (`SpeculativeConfig.draft_vocab`)."""
    _executable: Executable | None = field(default=None, init=False)

    @property
    def program(self) -> Program:
        """The model's program, with its keys and values in one KV group: the first of the target."""
        program = replace(self.model.program, one_kv_group=True)
        return with_fewer_tokens(program, self.vocab) if self.vocab else program

    @property
    def weights(self) -> TensorSource:
        """The program's weights."""
        source = self.model.weights
        return CutSource(source, [w.name for w in self.model.program.weights], self.vocab) if self.vocab else source

    def check(self, target: Program, spellings: Sequence[str], name: str, max_model_len: int | None) -> None:
        """Raises ConfigError where it cannot guess for the target: for another vocabulary, or where no layer of the
        target keeps all of `max_model_len` tokens, so that blocks are given back before the draft model saw them."""
        check_same_vocabulary(spellings, self.spellings, name, self.name)
        window = target.kv_groups.windows[0]
        if window is not None and (max_model_len is None or max_model_len > window):
            raise ConfigError(
                f"speculative model: a draft model needs a target with a layer that sees all tokens, but those of "
                f"{name} see the last {window}; with max_model_len up to {window} all are kept"
            )

    def uses(self, target: Program, config: SpeculativeConfig) -> Uses:
        """What it takes beside the target, by the target's cache and limits: probabilities of its guesses among it."""
        program, weights = self.program, self.weights
        dtypes = stored_types(program, weights)

        def use(kv: KvCacheSpec, limits: StepLimits) -> MemoryUse:
            found = self.backend.memory_use(program, dtypes, kv, draft_limits(limits, program.max_positions))
            return replace(found, activations=found.activations + 4 * config.max_step_drafts * target.vocab_size)

        return use

    def load(
        self, memory: MemoryPlan, sampler: Sampler, vocab_size: int, config: SpeculativeConfig
    ) -> DraftModelDrafter:
        """The drafter. sampler, vocab_size: the target's. Raises as `Backend.load` does."""
        limits = draft_limits(memory.limits, self.model.program.max_positions)
        self._executable = self.backend.load(self.program, self.weights, memory.kv, limits)
        return DraftModelDrafter(
            self._executable, sampler, limits, memory.num_blocks, memory.block_size, vocab_size, config.max_step_drafts
        )

    def close(self) -> None:
        """Closes the executable, then the files. Idempotent if `on_close` is."""
        if self._executable is not None:
            self._executable.close()
        self.on_close()

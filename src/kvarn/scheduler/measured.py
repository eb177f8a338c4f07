"""`MeasuredCost`: what a step costs on this machine, learned from the steps that were taken."""

from __future__ import annotations

from kvarn.scheduler.cost import StepShape

PRIOR = (2e-3, 1e-3, 1e-4, 1e-7)
"""Seconds of a step, of a token, of a sampled row and of a key looked at, as long as nothing was measured."""
PRIOR_WEIGHT = 1e-2
"""What the prior counts beside one measured step, for each coefficient."""
MEMORY = 32
"""Steps of similar size after which one counts a third."""
CLIP = 4.0
"""A step that took more than this many times what was expected (the machine was busy elsewhere) counts as this much."""
EAGER = 32
"""Observations up to which each one is taken in at once; later, every eighth time."""

_Row = tuple[float, ...]


class MeasuredCost:
    """seconds = a + b · tokens + c · sampled + d · attended, none of them negative, by weighted least squares.

    Errors count relative to the time, so that short steps matter as much as long ones. Older steps fade, but only
    behind newer ones of similar size: an hour of decodes does not make it forget what prompts cost. Not thread-safe.
    """

    def __init__(self) -> None:
        self._bins: dict[int, _Sums] = {}
        self._coefficients: _Row = PRIOR
        self._num_observed = 0
        self._num_new = 0

    @property
    def num_observed(self) -> int:
        """Steps that were told of."""
        return self._num_observed

    def seconds(self, shape: StepShape) -> float:
        """Expected wall time of a step, in seconds, above 0."""
        if self._num_new and (self._num_observed <= EAGER or self._num_new >= 8):
            self._coefficients = self._solve()
            self._num_new = 0
        return max(1e-6, sum(c * x for c, x in zip(self._coefficients, _features(shape), strict=True)))

    def observe(self, shape: StepShape, seconds: float) -> None:
        """Takes a measured step in. Steps without tokens and times that are not above 0 are ignored."""
        if not shape.num_tokens or not seconds > 0:
            return
        sums = self._bins.setdefault(shape.num_tokens.bit_length(), _Sums())
        if sums.weight >= 1:
            seconds = min(seconds, CLIP * self.seconds(shape))
        sums.add([p * x / seconds for p, x in zip(PRIOR, _features(shape), strict=True)])
        self._num_observed += 1
        self._num_new += 1

    def _solve(self) -> _Row:
        """Least squares in units of the prior; coefficients below 0 are set to 0, the lowest first."""
        size = len(PRIOR)
        matrix = [[sum(b.matrix[i][j] for b in self._bins.values()) for j in range(size)] for i in range(size)]
        vector = [sum(b.vector[i] for b in self._bins.values()) + PRIOR_WEIGHT for i in range(size)]
        for i in range(size):
            matrix[i][i] += PRIOR_WEIGHT
        kept = list(range(size))
        while True:
            found = _gauss([[matrix[i][j] for j in kept] for i in kept], [vector[i] for i in kept])
            if min(found, default=0) >= 0:
                break
            del kept[found.index(min(found))]
        units = dict(zip(kept, found, strict=True))
        return tuple(PRIOR[i] * units.get(i, 0.0) for i in range(size))


class _Sums:
    """The normal equations of steps of similar size, fading."""

    def __init__(self) -> None:
        size = len(PRIOR)
        self.matrix = [[0.0] * size for _ in range(size)]
        self.vector = [0.0] * size
        self.weight = 0.0

    def add(self, row: list[float]) -> None:
        """row: the features over the measured time, so that 1 is what they should sum to."""
        fade = 1 - 1 / MEMORY
        self.weight = self.weight * fade + 1
        for i, x in enumerate(row):
            self.vector[i] = self.vector[i] * fade + x
            line = self.matrix[i]
            for j, y in enumerate(row):
                line[j] = line[j] * fade + x * y


def _features(shape: StepShape) -> tuple[float, ...]:
    return (1.0, shape.num_tokens, shape.num_sampled, shape.num_attended)


def _gauss(matrix: list[list[float]], vector: list[float]) -> list[float]:
    """Solves a positive definite system. Both are overwritten."""
    size = len(vector)
    for i in range(size):
        for k in range(i + 1, size):
            factor = matrix[k][i] / matrix[i][i]
            vector[k] -= factor * vector[i]
            for j in range(i, size):
                matrix[k][j] -= factor * matrix[i][j]
    for i in reversed(range(size)):
        vector[i] = (vector[i] - sum(matrix[i][j] * vector[j] for j in range(i + 1, size))) / matrix[i][i]
    return vector

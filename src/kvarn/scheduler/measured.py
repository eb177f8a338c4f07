"""`MeasuredCost`: what a step costs on this machine, learned from the steps that were taken."""

from __future__ import annotations

import math

from kvarn.scheduler.cost import StepShape

PRIOR = (2e-3, 1e-3, 1e-4, 1e-7)
"""Seconds of a step, of a token, of a sampled row and of a key looked at, as long as nothing was measured; then what
they are to one another, as long as the measured steps do not say."""
PRIOR_WEIGHT = 1e-3
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

    Errors count relative to the time that steps of similar size take, so that short steps matter as much as long ones.
    Older steps fade, but only behind newer ones of similar size: an hour of decodes does not make it forget what
    prompts cost. Not thread-safe.
    """

    def __init__(self) -> None:
        self._bins: dict[int, _Sums] = {}
        self._prior: _Row = PRIOR
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
        return max(1e-6, _dot(self._coefficients, _features(shape)))

    def observe(self, shape: StepShape, seconds: float) -> None:
        """Takes a measured step in. Steps without tokens and times that are not above 0 are ignored."""
        if not shape.num_tokens or not 0 < seconds < math.inf:
            return
        features = _features(shape)
        if not self._num_observed:
            scale = seconds / _dot(PRIOR, features)
            self._prior = tuple(scale * p for p in PRIOR)
        size = shape.num_tokens.bit_length()
        if size in self._bins:
            seconds = min(seconds, CLIP * self.seconds(shape))
        self._bins.setdefault(size, _Sums()).add(features, seconds)
        self._num_observed += 1
        self._num_new += 1

    def _solve(self) -> _Row:
        """Least squares in units of the prior; coefficients below 0 are set to 0, the lowest first."""
        size = range(len(PRIOR))
        matrix = [[PRIOR_WEIGHT * (i == j) for j in size] for i in size]
        vector = [PRIOR_WEIGHT for _ in size]
        for sums in self._bins.values():
            units = [p / sums.mean for p in self._prior]
            for i in size:
                vector[i] += units[i] * sums.vector[i] / sums.mean
                for j in size:
                    matrix[i][j] += units[i] * units[j] * sums.matrix[i][j]
        kept = list(size)
        while True:
            found = _gauss([[matrix[i][j] for j in kept] for i in kept], [vector[i] for i in kept])
            if min(found) >= 0:
                break
            del kept[found.index(min(found))]
        share = dict(zip(kept, found, strict=True))
        return tuple(self._prior[i] * share.get(i, 0.0) for i in size)


class _Sums:
    """The normal equations of steps of similar size, fading. Never without steps."""

    def __init__(self) -> None:
        size = range(len(PRIOR))
        self.matrix = [[0.0 for _ in size] for _ in size]
        self.vector = [0.0 for _ in size]
        self._weight = 0.0
        self._seconds = 0.0

    @property
    def mean(self) -> float:
        """Seconds of a step."""
        return self._seconds / self._weight

    def add(self, features: _Row, seconds: float) -> None:
        """One more step."""
        fade = 1 - 1 / MEMORY
        self._weight = self._weight * fade + 1
        self._seconds = self._seconds * fade + seconds
        for i, x in enumerate(features):
            self.vector[i] = self.vector[i] * fade + x * seconds
            line = self.matrix[i]
            for j, y in enumerate(features):
                line[j] = line[j] * fade + x * y


def _dot(coefficients: _Row, features: _Row) -> float:
    return sum(c * x for c, x in zip(coefficients, features, strict=True))


def _features(shape: StepShape) -> _Row:
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

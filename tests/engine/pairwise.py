"""Few cases in which every value of every factor meets every value of every other."""

import itertools


def pairwise(factors):
    """Dicts with a value for each factor, chosen greedily until all pairs of values are in some case.

    factors: values by name. As in AETG (Cohen et al. 1997), but without its random candidates: each case begins with a
    pair that is not covered yet, and each further factor takes the value that covers most pairs with those before it.
    """
    names = list(factors)
    missing = {
        frozenset({(a, x), (b, y)})
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(range(len(factors[a])), range(len(factors[b])))
    }
    cases = []
    while missing:
        case = dict(min(missing, key=sorted))
        for name in names:
            if name not in case:
                case[name] = max(
                    range(len(factors[name])),
                    key=lambda value, name=name, case=case: (
                        sum(frozenset({(name, value), other}) in missing for other in case.items()),
                        -sum(earlier[name] == value for earlier in cases),
                    ),
                )
        missing -= {frozenset(pair) for pair in itertools.combinations(case.items(), 2)}
        cases.append(case)
    return [{name: factors[name][case[name]] for name in names} for case in cases]


def uncovered(factors, cases):
    """Pairs of values that are in no case."""
    return [
        (a, x, b, y)
        for a, b in itertools.combinations(factors, 2)
        for x, y in itertools.product(factors[a], factors[b])
        if not any(case[a] == x and case[b] == y for case in cases)
    ]


SAMPLING = {
    "greedy": {"temperature": 0.0},
    "hot": {"temperature": 1.0, "seed": 3},
    "penalties": {
        "temperature": 0.7, "top_p": 0.9, "seed": 4, "frequency_penalty": 0.5, "repetition_penalty": 1.1,
    },
}  # fmt: skip
"""Ways to sample, for a factor of that name."""

"""The oracle models, each made once."""

import pytest
from oracles import CASES, make_oracle


@pytest.fixture(scope="session")
def oracle(tmp_path_factory):
    """Oracles by the name of their case."""
    pytest.importorskip("torch", reason="the oracle needs torch")
    pytest.importorskip("transformers", reason="the oracle is transformers")
    made = {}

    def get(name):
        if name not in made:
            kind, changes = CASES[name]
            made[name] = make_oracle(kind, changes, tmp_path_factory.mktemp(name), seed=list(CASES).index(name))
        return made[name]

    return get

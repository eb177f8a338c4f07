import pytest

from kvarn.training.run import TrainSettings


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    """A file of 80 prompts, of which four are held out."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(f"{i * i % 97} and {chr(97 + i % 26) * (i % 5)}" for i in range(80)))
    return path


@pytest.fixture
def settings_for(prompts, tmp_path):
    """Settings of a training of a few steps."""

    def make(kind, **changes):
        given = {
            "data": prompts, "out": tmp_path / f"{kind}.safetensors", "work": tmp_path / "work", "steps": 60,
            "draft_vocab": 128, "max_tokens": 48, "data_bytes": 1 << 22, "max_num_seqs": 8, "rate": 1e-2,
        }  # fmt: skip
        return TrainSettings(kind, **{**given, **changes})

    return make

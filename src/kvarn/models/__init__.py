"""Model families: a config and weight names in, a `Program` and its tensors out. One file per family."""

from kvarn.models.config import ModelConfig
from kvarn.models.content import content_key
from kvarn.models.registry import Model, load_model, program_from_config

__all__ = ["Model", "ModelConfig", "content_key", "load_model", "program_from_config"]

"""Model files to tensors: GGUF and Hugging Face folders (`open_model`), the catalog, and pulling."""

from kvarn.weights.files import ModelFiles, open_model

__all__ = ["ModelFiles", "open_model"]

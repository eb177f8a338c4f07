"""What a model's numbers are worth: quality measured by one command, on the program that serves."""

from kvarn.eval.divergence import Divergence, divergence
from kvarn.eval.perplexity import PerplexityResult, perplexity

__all__ = ["Divergence", "PerplexityResult", "divergence", "perplexity"]

"""What a model's numbers are worth: quality measured by one command, on the program that serves."""

from kvarn.eval.perplexity import PerplexityResult, perplexity

__all__ = ["PerplexityResult", "perplexity"]

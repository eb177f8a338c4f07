"""Logits to tokens: the rules (`ReferenceSampler`), and the native twin that serves (`NativeSampler`)."""

from kvarn.sampling.base import Draft, Sampler, TokenMasks
from kvarn.sampling.native import NativeSampler
from kvarn.sampling.reference import ReferenceSampler
from kvarn.sampling.rules import RuleBook

__all__ = ["Draft", "NativeSampler", "ReferenceSampler", "RuleBook", "Sampler", "TokenMasks"]

"""Structured output: what a request's grammar allows, as masks over the vocabulary. Built on llguidance.

`GrammarCompiler` turns a `kvarn.request.Grammar` into a `CompiledGrammar`, in a thread of its own, after a trial in a
process of its own. `GrammarMasks` has a matcher for each running sequence and computes, while the model computes,
which tokens may come next. Imported when the first grammar comes.
"""

from kvarn.grammar.compiler import CompiledGrammar, GrammarCompiler, GrammarStats
from kvarn.grammar.masks import GrammarMasks, StepMasks
from kvarn.grammar.vocabulary import GrammarVocabulary

__all__ = [
    "CompiledGrammar", "GrammarCompiler", "GrammarMasks", "GrammarStats", "GrammarVocabulary", "StepMasks",
]  # fmt: skip

"""Heads that guess ahead, trained on what their model says itself (`kvarn spec train`).

`prompts` reads what to ask, `collect` lets kvarn's own engine answer and keeps tokens and hidden states in a `store`,
`target` has of the model what heads are measured by, `nets` the heads in torch, and `learn` trains them. `run` is all
of it in order. torch is imported by `nets` and `learn` only.
"""

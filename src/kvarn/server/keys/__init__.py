"""API keys: who may ask, how much, and how soon it comes. Secrets are kept as keyed digests, here and in the keys file.

`records` is what a key is, `file` how keys are kept, `bucket` how rates are held, `account` what a key has used, and
`ring` all of them together, with the file read again where it has changed.
"""

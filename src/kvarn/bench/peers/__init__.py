"""Other engines, each behind a script that its own Python runs: `python SCRIPT MODEL THREADS VARIANT TASKS`.

A script imports nothing of kvarn, so that a peer lives in an environment of its own. MODEL is a path, VARIANT one of
the settings that `kvarn.bench.compare` lists, TASKS a JSON list of all tasks to come, for sizes. The script prints one
JSON line when the model is loaded: {"load_s": seconds, "peak_rss": bytes, "info": text}. For each JSON line on stdin,
{"op": "prefill" or "decode", "tokens", "batch", "depth"} (see `kvarn.bench.tasks.Task`), it does the work and prints
{"seconds": wall time, "peak_rss": bytes}. Whatever the engine itself writes goes to stderr. stdin's end ends it.
`peer_protocol.serve` does all of this but the work.
"""

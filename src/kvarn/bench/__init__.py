"""How fast, and how far from what the machine can do: `kvarn bench` and `kvarn profile`.

`roofline` measures the machine, `tasks` says what work is timed and what it must move and multiply, `worker` is the
process that does it, `latency` and `compare` put both together; `profile` looks inside a step.
`spec` measures what guessing ahead brings, from `spec_prompts`, with a `spec_lane` for each way to guess.
"""

"""Load on a server that speaks OpenAI's API, and what it feels like to its clients: `kvarn bench serve`.

`datasets` says what is asked (of `lengths`, in tokens by `tokens`), `arrivals` when. `client` sends requests and keeps
what comes with the time it came; `load` runs it, open loop or closed. Only then, when nothing is measured any more,
`answers` reads the streams (`sse`), `metrics` counts, and `slo` judges. `point` is one such measurement, `sweep` looks
for the highest load that holds, `compare` has two servers in turns, and `tables`, `plots` and `page` show it all.
"""

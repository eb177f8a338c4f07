"""An engine that is none: speaks the protocol of `kvarn.bench.peers`. VARIANT is what it does.

A number: so many times a millisecond a token. "silent": ends before it is ready. "mute": ends at the first task.
"rubbish": answers with something else. "instant": says that work takes no time.
"""

import json
import sys

_path, threads, variant, tasks = sys.argv[1:]
if variant == "silent":
    sys.exit("the model does not please me")
print(json.dumps({"load_s": 0.25, "peak_rss": 1 << 20, "info": f"fake on {threads}"}), flush=True)
for line in sys.stdin:
    task = json.loads(line)
    assert task in json.loads(tasks)
    if variant == "mute":
        sys.exit("enough")
    if variant == "rubbish":
        print("42", flush=True)
        continue
    seconds = 0.0 if variant == "instant" else float(variant) * 1e-3 * task["tokens"] * task["batch"]
    print(json.dumps({"seconds": seconds, "peak_rss": 2 << 20}), flush=True)

"""Serving without a model: the real scheduler and cache, a cost model fitted to this machine, and a clock that jumps.

`traffic` says who arrives when (a trace's file, or `synthetic`), `settings` what the server is like, `batching` who is
let in when, `simulator` runs it, and `results` and `report` say what came of it. `fit` makes the cost model.
"""

from kvarn.simulate.results import Fairness, Results
from kvarn.simulate.settings import Settings
from kvarn.simulate.simulator import simulate
from kvarn.simulate.synthetic import Synthetic, make_traffic
from kvarn.traffic import Arrival, read_traffic

__all__ = ["Arrival", "Fairness", "Results", "Settings", "Synthetic", "make_traffic", "read_traffic", "simulate"]

"""What the engine did, step by step: recorded in a bounded ring, written for Perfetto, told in plain words.

`recorder` is the scheduler's observer that keeps it, `chrome` the file (Chrome's trace event format, which
ui.perfetto.dev and chrome://tracing open), `history` reads it back, `explain` and `summary` say what is in it.
"""

from kvarn.tracing.chrome import write_trace
from kvarn.tracing.history import History, read_trace
from kvarn.tracing.recorder import TraceRecorder

__all__ = ["History", "TraceRecorder", "read_trace", "write_trace"]

"""`python -m kvarn.testing.faulty_server serve …`: `kvarn serve`, but SIGUSR1 lets the next step of an engine fail."""

from __future__ import annotations

import signal
import sys

import kvarn.server
from kvarn.cli import main
from kvarn.testing.faults import FaultOnDemand


def _install() -> None:
    faults, serve = FaultOnDemand(), kvarn.server.serve
    faults.on_signal(signal.SIGUSR1)
    kvarn.server.serve = lambda options, told=None, **_: serve(options, told, observer=faults)


if __name__ == "__main__":
    _install()
    main(sys.argv[1:])

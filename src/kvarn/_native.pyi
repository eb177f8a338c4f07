# The native module's types are checked where it is wrapped (backends/cpu, sampling/native); here it is open.
from typing import Any

def __getattr__(name: str) -> Any: ...

"""Tools: what a request offers and wants called, the grammar that follows from it, and calls in what the model says."""

from kvarn.server.tools.calls import CallDelta, CallReader
from kvarn.server.tools.formats import ToolFormat, tool_format
from kvarn.server.tools.use import ToolUse
from kvarn.server.tools.voice import Thought, Voice

__all__ = ["CallDelta", "CallReader", "Thought", "ToolFormat", "ToolUse", "Voice", "tool_format"]

"""The command `harmoq`, one file per command. May import every room, but only when a command runs.

The order of the imports is the order of the commands in the help.
"""

# isort: off
from harmoq_ao.cli.common import app
from harmoq_ao.cli import demo, quantize, evaluate, upscale, inspect, report, export

# isort: on

__all__ = ["app", "demo", "evaluate", "export", "inspect", "quantize", "report", "upscale"]

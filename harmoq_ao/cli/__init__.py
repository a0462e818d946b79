"""The command `harmoq`, a file for each of its commands.

The order of the imports is the order of the help.
"""

# isort: off
from harmoq_ao.cli.common import app
from harmoq_ao.cli import demo, quantize, evaluate, upscale, inspect, report, export

# isort: on

__all__ = ["app", "demo", "evaluate", "export", "inspect", "quantize", "report", "upscale"]

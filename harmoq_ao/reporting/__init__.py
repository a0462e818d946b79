"""The report of a quantized model: one HTML page that needs nothing but a browser.

Imports ``runtime`` and what that may import.
"""

from harmoq_ao.reporting.document import Scene, build_report, write_report
from harmoq_ao.reporting.pictures import Source

__all__ = ["Scene", "Source", "build_report", "write_report"]

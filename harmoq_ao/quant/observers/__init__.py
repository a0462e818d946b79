"""Observers: statistics of one operand in bounded memory, and the quantization range they suggest.

An observer sees every calibration tensor of its operand once and keeps

* the exact minimum and maximum, over everything and, if asked, per channel (index along the contracted axis);
* a uniform random sample of rows (one row = all channels of one token) or of single values (`reservoir.py`).

`OBSERVERS` maps the names used in configurations to classes; they differ in how they turn statistics into a range.
"""

from harmoq_ao.quant.observers.base import OperandObserver
from harmoq_ao.quant.observers.histogram import HistogramObserver
from harmoq_ao.quant.observers.minmax import MinMaxObserver
from harmoq_ao.quant.observers.mse import MSEObserver
from harmoq_ao.quant.observers.percentile import PercentileObserver

OBSERVERS: dict[str, type[OperandObserver]] = {
    "minmax": MinMaxObserver,
    "percentile": PercentileObserver,
    "mse": MSEObserver,
    "histogram": HistogramObserver,
}
"""Observer classes by the name that a configuration uses."""

__all__ = [
    "OBSERVERS",
    "HistogramObserver",
    "MSEObserver",
    "MinMaxObserver",
    "OperandObserver",
    "PercentileObserver",
]

"""Published methods to compare with, on the same sites, quantizers and images as HarmoQ; mixed precision.

Imports ``conversion``, ``harmonization`` and what those may import.
"""

from harmoq_ao.baselines.base import Baseline, Budget
from harmoq_ao.baselines.brecq import BRECQ
from harmoq_ao.baselines.condiquant import CondiQuant
from harmoq_ao.baselines.dbdc_pac import DBDCPac
from harmoq_ao.baselines.dobi import DOBI
from harmoq_ao.baselines.granular_dq import GranularDQ
from harmoq_ao.baselines.minmax import MinMax
from harmoq_ao.baselines.pams import PAMS
from harmoq_ao.baselines.percentile import Percentile
from harmoq_ao.baselines.two_dquant import TwoDQuant

BASELINES: dict[str, Baseline] = {
    baseline.name: baseline
    for baseline in (
        MinMax(),
        Percentile(),
        DOBI(),
        TwoDQuant(),
        CondiQuant(),
        BRECQ(),
        PAMS(),
        DBDCPac(),
        GranularDQ(),
    )
}
"""Baselines by the word that selects them on the command line, in the order of the tables."""

__all__ = [
    "BASELINES",
    "BRECQ",
    "DOBI",
    "PAMS",
    "Baseline",
    "Budget",
    "CondiQuant",
    "DBDCPac",
    "GranularDQ",
    "MinMax",
    "Percentile",
    "TwoDQuant",
]

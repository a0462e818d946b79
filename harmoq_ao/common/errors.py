"""Typed errors; each says what was found, what was expected and what to do."""

from __future__ import annotations


def shown(value: object, most: int = 120) -> str:
    """Representation of an untrusted value in a message: truncated, and never an error of its own.

    Python refuses to write out integers of many digits and deeply nested containers.
    """
    try:
        text = repr(value)
    except Exception:
        text = f"{type(value).__name__} that cannot be written out"
    return text if len(text) <= most else f"{text[:most]}..."


class HarmoqError(Exception):
    """Base of all errors raised on purpose by harmoq_ao.

    Args:
        what: One sentence that names what went wrong.
        found: What was found.
        expected: What is accepted.
        remedy: What the user can do now.
    """

    rank: int | None = None
    """The rank on which it was raised, where ranks do different work; None where all ranks raise alike."""

    def __init__(self, what: str, *, found: object = None, expected: object = None, remedy: str | None = None) -> None:
        self.what = what
        self.found = found
        self.expected = expected
        self.remedy = remedy
        parts = [what.rstrip(".") + "."]
        if found is not None:
            parts.append(f"Found: {found}.")
        if expected is not None:
            parts.append(f"Expected: {expected}.")
        if remedy is not None:
            parts.append(f"What to do: {remedy.rstrip('.')}.")
        super().__init__(" ".join(parts))


class ConfigError(HarmoqError, ValueError):
    """A configuration value is out of range, or a rule matches no site."""


class TraceError(HarmoqError):
    """A module's forward could not be traced as an FX graph (raised under ``strict=True``)."""


class CalibrationError(HarmoqError):
    """Calibration data is missing or unusable, or a site was never reached."""


class InputError(HarmoqError, ValueError):
    """A tensor given to a model has the wrong shape, type or values (NaN, infinity)."""


class ImageError(HarmoqError, ValueError):
    """An image file or array cannot be used."""


class DatasetError(HarmoqError, ValueError):
    """A folder of images is missing, empty, or its pairs do not match."""


class CheckpointError(HarmoqError, ValueError):
    """A float checkpoint is corrupt, of an unknown architecture, or unsafe to load."""


class SavedModelError(HarmoqError, ValueError):
    """A saved quantized model is corrupt, incomplete, or does not fit its architecture."""


class OutputError(HarmoqError, OSError):
    """An output could not be written; an existing file is untouched."""


class OpenVinoError(HarmoqError, RuntimeError):
    """OpenVINO is missing, or cannot run a model."""


class ExportError(HarmoqError, RuntimeError):
    """A model could not be exported, or the package for it is missing."""


class RankLostError(HarmoqError, RuntimeError):
    """Another process of a distributed run failed, was killed, or did not answer in time."""


class RayError(HarmoqError, RuntimeError):
    """Ray is missing, does not start, or cannot run the model."""


class CompilerError(HarmoqError, RuntimeError):
    """torch.compile was requested where no compiler is installed."""


class KernelError(HarmoqError, RuntimeError):
    """A low-bit kernel was called with unsupported operands."""

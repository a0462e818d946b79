"""Packages of an extra: imported where they are needed, or an error that says what to install."""

from __future__ import annotations

import importlib
from types import ModuleType

from harmoq_ao.common.errors import HarmoqError


def require(
    name: str,
    packages: tuple[str, ...],
    error: type[HarmoqError],
    *,
    extra: str,
    expected: str | None = None,
    otherwise: str = "",
) -> ModuleType:
    """Import packages that need not be installed, and return the first.

    Args:
        name: What the error says is missing.
        packages: Names to import.
        error: Type of the error.
        extra: Extra of harmoq-ao that brings them.
        expected: The packages as the error names them.
        otherwise: What else the user can do, to follow the command that installs them.

    Raises:
        HarmoqError: Of the given type: one of them cannot be imported.
    """
    try:
        modules = [importlib.import_module(package) for package in packages]
    except ImportError as missing:
        raise error(
            f"{name} is not installed",
            found=str(missing),
            expected=expected,
            remedy=f'pip install "harmoq-ao[{extra}]"{otherwise}',
        ) from missing
    return modules[0]

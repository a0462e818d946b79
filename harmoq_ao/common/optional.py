"""Optional packages: imported on use, with an error that names the extra to install."""

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
    """Import optional packages and return the first.

    Args:
        name: Name of the missing thing in the error.
        packages: Names to import.
        error: Type of the error.
        extra: The extra of harmoq-ao that installs them.
        expected: Names of the packages in the error.
        otherwise: An alternative for the user, appended to the install command.

    Raises:
        HarmoqError: Of the given type, where one cannot be imported.
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

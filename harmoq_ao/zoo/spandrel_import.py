"""One architecture of spandrel without the others.

``import spandrel`` imports every architecture it knows and torchvision, which takes as long as importing torch. The
package itself is therefore put in place with its contents deferred until somebody asks for one of its names. The same
time again goes into torch's compiler, which older versions of einops import to announce themselves to it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
import warnings
from contextlib import suppress
from types import ModuleType
from typing import Any

_lock = threading.RLock()


class _Deferred(ModuleType):
    """A package whose ``__init__`` is executed when a name of it is first asked for; submodules do not wait for it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):  # what inspection asks of any module
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        with _lock:
            if name not in vars(self) and "_deferred" in vars(self):
                del vars(self)["_deferred"]
                assert self.__spec__ is not None
                assert self.__spec__.loader is not None
                self.__spec__.loader.exec_module(self)
            if name not in vars(self):
                raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
            return vars(self)[name]


def import_architecture(name: str) -> ModuleType:
    """Import a module below ``spandrel.architectures``, and of spandrel only what that imports.

    Raises:
        ImportError: There is no such module.
    """
    with _lock:
        spec = None if "spandrel" in sys.modules else importlib.util.find_spec("spandrel")
        if spec is not None:
            package = importlib.util.module_from_spec(spec)
            package.__class__ = _Deferred
            vars(package)["_deferred"] = True
            sys.modules["spandrel"] = package
        _import_einops()
    return importlib.import_module(name)


def _import_einops() -> None:
    """Import einops, which many architectures use, without ``torch._dynamo``.

    Before 0.8.2 einops registers its functions there, or leaves it where that import fails; then torch registers them
    itself once it compiles a function that uses einops (``_allow_in_graph_einops`` in ``torch/_dynamo/decorators.py``).
    """
    if "torch._dynamo" in sys.modules or "einops._torch_specific" in sys.modules:
        return
    sys.modules["torch._dynamo"] = None  # type: ignore[assignment]
    try:
        with warnings.catch_warnings(), suppress(ImportError):
            warnings.simplefilter("ignore", ImportWarning)
            importlib.import_module("einops._torch_specific")
    finally:
        del sys.modules["torch._dynamo"]

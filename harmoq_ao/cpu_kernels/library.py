"""The C++ kernels as one shared library per instruction set, built at first use and kept in a cache.

Without a library (no compiler, one that fails, a library that does not load) models run without these kernels:
`kernels` returns None, a warning is logged once, and `status` says what happened and what helps.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from harmoq_ao.cpu_kernels import compiler as compilers
from harmoq_ao.cpu_kernels.build_cache import VARIABLE, BuildCache, CacheUnusableError
from harmoq_ao.cpu_kernels.compiler import BuildFailure, Compiler
from harmoq_ao.cpu_kernels.instruction_sets import NAMES, SWITCH, best_of_cpu, check_name, chosen, switch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Status:
    """Whether the CPU kernels can be used.

    Attributes:
        available: Whether they can.
        isa: The instruction set they are for, None where they are switched off.
        reason: One sentence of what happened.
        remedy: The command or setting that helps, None where nothing is amiss.
    """

    available: bool
    isa: str | None
    reason: str
    remedy: str | None = None

    @property
    def sentence(self) -> str:
        """Reason and remedy, for reports."""
        return f"{self.reason}." if self.remedy is None else f"{self.reason}. What to do: {self.remedy}."


_outcomes: dict[str | None, tuple[ModuleType | None, Status]] = {}
_lock = threading.Lock()


def kernels(isa: str | None = None) -> ModuleType | None:
    """The operators of an instruction set, a namespace of ``torch.ops``; None where they cannot be used.

    The first call loads the library, and builds it unless the cache has it: half a minute, with a message where
    standard error is a terminal. What came of it holds for the process. Threads may call this at the same time.

    Args:
        isa: ``default``, ``avx2``, ``avx512`` or ``avx512_bf16``; by default the best that this CPU has and that
            ``HARMOQ_CPU_KERNELS`` and ``ATEN_CPU_CAPABILITY`` allow.

    Raises:
        ConfigError: `isa` or ``HARMOQ_CPU_KERNELS`` is unknown.
    """
    return _outcome(isa)[0]


def required() -> ModuleType:
    """The operators of the instruction set in use, for callers that have asked whether there are any.

    Raises:
        ConfigError: ``HARMOQ_CPU_KERNELS`` is unknown.
        RuntimeError: There are none.
    """
    namespace, status = _outcome(None)
    if namespace is None:
        raise RuntimeError(status.sentence)
    return namespace


def status(isa: str | None = None) -> Status:
    """What `kernels` returns for the same argument, and why; calls it.

    Raises:
        ConfigError: `isa` or ``HARMOQ_CPU_KERNELS`` is unknown.
    """
    return _outcome(isa)[1]


def _outcome(isa: str | None) -> tuple[ModuleType | None, Status]:
    if isa is None:
        isa = chosen()
    else:
        check_name(isa, "Unknown instruction set of the CPU kernels")
    if isa not in _outcomes:
        with _lock:
            if isa not in _outcomes:  # another thread may have been first
                _outcomes[isa] = _attempt(isa)
    return _outcomes[isa]


def _attempt(isa: str | None) -> tuple[ModuleType | None, Status]:
    if isa is None:
        return None, Status(False, None, f"The CPU kernels are switched off ({SWITCH}=off)", f"unset {SWITCH}")
    if NAMES.index(isa) > NAMES.index(best_of_cpu()):
        reason = f"This CPU cannot run the CPU kernels for {isa}"
        return None, Status(False, isa, reason, f"choose {best_of_cpu()} or a lower one")
    try:
        note = _load_or_build(isa)
    except (BuildFailure, OSError) as failure:
        # The system's errors: no room for temporary files, or sources that cannot be read.
        remedy = failure.remedy if isinstance(failure, BuildFailure) else "set TMPDIR to a folder with free space"
        result = Status(False, isa, f"The CPU kernels are not used: {failure}", remedy)
        logger.warning("%s", result.sentence)
        return None, result
    result = Status(True, isa, f"The CPU kernels are those for {isa}")
    if note is not None:
        reason = f"{result.reason}, built for this process only: {note}"
        result = Status(True, isa, reason, f"set {VARIABLE} to a folder of your own")
        logger.warning("%s", result.sentence)
    return getattr(torch.ops, f"harmoq_{isa}"), result


def _load_or_build(isa: str) -> str | None:
    """Load the library of an instruction set; returns why it could not be kept, None where it is.

    Raises:
        BuildFailure: There is no library that loads.
    """
    cache, note = _cache()
    base = f"kernels-{isa}-{_key_of_sources(isa)}"
    try:
        compiler = compilers.find_compiler()
    except BuildFailure:
        if cache is None or not _loads_from(cache, f"{base}-*.so"):  # what any compiler built
            raise
        return None
    name = f"{base}-{_digest(compiler.version)}"
    if cache is None:
        with _announced(isa, compiler):
            _build_and_load(isa, compiler, None, name)
        return note
    if _loads_from(cache, f"{name}.so"):
        return None
    _refuse_what_failed(cache, name, isa)
    with _announced(isa, compiler), cache.alone(name):
        if _loads_from(cache, f"{name}.so"):  # built by another process meanwhile
            return None
        _refuse_what_failed(cache, name, isa)
        return _build_and_load(isa, compiler, cache, name)


def _cache() -> tuple[BuildCache | None, str | None]:
    """The cache, or None and why there is none."""
    try:
        home = os.environ.get("XDG_CACHE_HOME", "")
        # A relative path is invalid, says the XDG base directory specification.
        base = Path(home) if os.path.isabs(home) else Path.home() / ".cache"
        return BuildCache(Path(os.environ.get(VARIABLE) or base / "harmoq-ao") / "cpu_kernels"), None
    except RuntimeError as error:  # no home
        return None, f"there is no home folder ({error})"
    except CacheUnusableError as error:
        return None, str(error)


def _loads_from(cache: BuildCache, pattern: str) -> bool:
    """Whether a library of the cache fits the pattern and could be loaded; one that does not load is built anew."""
    path = cache.find(pattern)
    try:
        return path is not None and _load(path)
    except OSError:
        return False


def _load(path: Path) -> bool:
    torch.ops.load_library(str(path))
    return True


def _refuse_what_failed(cache: BuildCache, name: str, isa: str) -> None:
    """Raise what a build of `name` raised within the last day, unless the user asks for kernels."""
    failure = None if switch() else cache.recent_failure(name)
    if failure is not None:
        reason, remedy = failure
        raise BuildFailure(f"{reason} (not tried again within a day)", f"{remedy}, or set {SWITCH}={isa} to try again")


def _build_and_load(isa: str, compiler: Compiler, cache: BuildCache | None, name: str) -> str | None:
    """Build, keep and load the library; returns why it could not be kept, None where it is.

    Raises:
        BuildFailure: The compiler failed, or its library does not load.
    """
    try:
        # Compilers that were stopped may still be writing.
        with tempfile.TemporaryDirectory(prefix="harmoq-ao-", ignore_cleanup_errors=True) as scratch:
            library, note = _build(isa, compiler, cache, Path(scratch)), None
            try:
                library = cache.keep(f"{name}.so", library) if cache else library
            except CacheUnusableError as error:
                note = str(error)
            _load_what_was_built(library)  # it stays loaded when its file is gone
    except BuildFailure as failure:
        if cache is not None:
            cache.remember_failure(name, failure.reason, failure.remedy)
        raise
    return note


def _load_what_was_built(library: Path) -> None:
    try:
        _load(library)
    except OSError as error:
        found = error.__cause__ or error  # torch names the path only; the loader says why
        raise BuildFailure(
            f"The library that was built does not load ({' '.join(str(found).split())})",
            f"set {VARIABLE} to a folder from which programs may run, or CXX to the g++ of this system",
        ) from error


def _build(isa: str, compiler: Compiler, cache: BuildCache | None, scratch: Path) -> Path:
    """Compile what the cache has no object file of, and link."""
    objects, missing = dict[Path, Path](), dict[Path, Path]()
    for source in _sources():
        name = f"{source.stem}-{isa}-{_digest(_key_of_headers(isa), source.read_text(), compiler.version)}.o"
        kept = cache.find(name) if cache else None
        objects[source] = kept or scratch / name
        if kept is None:
            missing[source] = scratch / name
    compilers.compile_objects(compiler, isa, missing)
    for path in missing.values():
        with suppress(CacheUnusableError):  # said of the library
            if cache is not None:
                cache.keep(path.name, path)
    library = scratch / f"harmoq_{isa}.so"
    compilers.link(compiler, list(objects.values()), library)
    return library


def _sources() -> list[Path]:
    sources = sorted(compilers.SOURCES.glob("*.cpp"))
    if not sources:
        raise BuildFailure(f"There are no sources in {compilers.SOURCES}", "install harmoq-ao again")
    return sources


def _key_of_sources(isa: str) -> str:
    return _digest(_key_of_headers(isa), *(text for path in _sources() for text in (path.name, path.read_text())))


def _key_of_headers(isa: str) -> str:
    folder = compilers.SOURCES
    headers = [path.read_text() for path in (*sorted(folder.rglob("*.h")), folder / "exports.map")]
    return _digest(torch.__version__, str(torch.version.git_version), *compilers.flags(isa), *headers)


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


@contextmanager
def _announced(isa: str, compiler: Compiler) -> Iterator[None]:
    """Context manager that tells that kernels are built, with a spinner, where standard error is a terminal."""
    from harmoq_ao.common.progress import is_shown  # it imports rich

    message = f"Building the CPU kernels for {isa} with {compiler.command[0]}, once per machine and version"
    begin = time.monotonic()
    if is_shown(None):
        from rich.console import Console

        console = Console(stderr=True)
        console.print(message)
        with console.status("compiling ..."):
            yield
    else:
        logger.info("%s", message)
        yield
    logger.info("Built the CPU kernels for %s in %.1f s", isa, time.monotonic() - begin)

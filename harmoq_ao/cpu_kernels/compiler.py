"""From C++ sources to a shared library, with the compiler of this machine."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from harmoq_ao.cpu_kernels.instruction_sets import FLAGS

SOURCES = Path(__file__).parent / "csrc"
TIMEOUT = 600.0
"""Seconds for compiling all sources, and for linking them."""

_COMMON_FLAGS = (
    *("-std=c++20", "-O3", "-fPIC", "-fopenmp", "-DAT_PARALLEL_OPENMP=1"),
    # Results must not depend on what a compiler contracts.
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    # Libraries of several instruction sets may be loaded: none may take the inline functions of another.
    *("-fvisibility=hidden", "-fvisibility-inlines-hidden"),
)
_INSTALL = {
    "apt-get": "apt-get install g++",
    "dnf": "dnf install gcc-c++",
    "apk": "apk add g++",
    "pacman": "pacman -S gcc",
    "zypper": "zypper install gcc-c++",
}


class BuildFailure(Exception):  # noqa: N818 - no error of the user's: the model runs without
    """Kernels could not be built or loaded.

    Args:
        reason: One sentence of what happened.
        remedy: The command or setting that helps.
    """

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: how it is called, and the first line that it says of its version."""

    command: tuple[str, ...]
    version: str


def find_compiler() -> Compiler:
    """The compiler that ``CXX`` names, else the first of ``c++`` and ``g++`` on the path that is GCC's.

    Raises:
        BuildFailure: There is none, or it does not run.
    """
    named = os.environ.get("CXX", "").strip()
    try:
        candidates = [tuple(shlex.split(named))] if named else [("c++",), ("g++",)]
    except ValueError:  # a quotation that does not end
        candidates = [(named,)]
    failures = []
    for command in candidates:
        if not shutil.which(command[0]):
            continue
        try:
            return _compiler(command)
        except BuildFailure as failure:
            failures.append(failure)
    if failures:
        raise failures[0]
    if named:
        raise BuildFailure(f"CXX names no program: {named}", "set CXX to g++, or unset it")
    raise BuildFailure("There is no C++ compiler on the path", _how_to_install())


def _how_to_install() -> str:
    return next((command for tool, command in _INSTALL.items() if shutil.which(tool)), "install g++")


def _compiler(command: tuple[str, ...]) -> Compiler:
    call = (*command, "--version")
    try:
        done = subprocess.run(
            call, capture_output=True, text=True, errors="replace", timeout=30, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise _failed(command, f"does not say its version ({type(error).__name__})") from error
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        raise _failed(command, f"does not say its version (exit status {done.returncode})")
    if "clang" in lines[0].lower():
        # Its OpenMP is a second runtime beside torch's, whose threads know nothing of torch.set_num_threads.
        raise BuildFailure(f"The compiler {shlex.join(command)} is clang, the CPU kernels need g++", _how_to_install())
    return Compiler(command, lines[0])


def _failed(command: Sequence[str], how: str) -> BuildFailure:
    return BuildFailure(f"The compiler {shlex.join(command)} {how}", "set CXX to another g++ (version 12 works)")


def flags(isa: str) -> tuple[str, ...]:
    """Options that decide what is compiled; paths are not among them."""
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    return (*_COMMON_FLAGS, abi, f"-DHARMOQ_NAMESPACE=harmoq_{isa}", *FLAGS[isa])


def compile_objects(compiler: Compiler, isa: str, objects: dict[Path, Path]) -> None:
    """Compile each source to its object file, as many at once as there are processors.

    Raises:
        BuildFailure: The compiler failed, or took longer than `TIMEOUT`.
    """
    root = Path(torch.__file__).parent / "include"
    include = (f"-I{root}", f"-I{root / 'torch' / 'csrc' / 'api' / 'include'}")
    call = (*compiler.command, *flags(isa), *include, "-c")
    run_all([(*call, str(source), "-o", str(target)) for source, target in objects.items()], compiler)


def link(compiler: Compiler, objects: Sequence[Path], target: Path) -> None:
    """Link object files to a shared library that exports nothing: operators register themselves when it is loaded.

    Raises:
        BuildFailure: The compiler failed, or took longer than `TIMEOUT`.
    """
    torch_libraries = Path(torch.__file__).parent / "lib"
    # torch's own OpenMP runtime, so that kernels share its threads; a torch from a distribution uses the system's.
    openmp = [str(path) for path in sorted(torch_libraries.glob("libgomp*.so*"))[:1]] or ["-fopenmp"]
    options = ["-shared", f"-Wl,--version-script={SOURCES / 'exports.map'}", f"-L{torch_libraries}"]
    libraries = ["-ltorch_cpu", "-lc10", *openmp]
    run_all([(*compiler.command, *options, *map(str, objects), *libraries, "-o", str(target))], compiler)


def run_all(commands: Sequence[Sequence[str]], compiler: Compiler) -> None:
    """Run calls of a compiler side by side; the first that fails, or an interrupt, ends all of them.

    Raises:
        BuildFailure: One failed, or all together took longer than `TIMEOUT`.
    """
    end = time.monotonic() + TIMEOUT
    waiting, running = list(commands), list[_Call]()
    try:
        while waiting or running:
            while waiting and len(running) < _processors():
                running.append(_Call(waiting.pop(0), compiler))
            for call in [call for call in running if call.has_ended()]:
                running.remove(call)
            if time.monotonic() > end:
                raise _failed(compiler.command, f"did not finish within {TIMEOUT:.0f} s")
            time.sleep(0.02)
    finally:
        for call in running:
            call.stop()


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Call:
    """A compiler at work, in a process group of its own: its driver starts others, which would outlive it."""

    def __init__(self, command: Sequence[str], compiler: Compiler) -> None:
        self.compiler = compiler
        self.log = Path(f"{command[-1]}.log")  # not a pipe, which must be read lest it fills
        try:
            with open(self.log, "wb") as log:
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env={**os.environ, "LC_ALL": "C"},
                )
        except OSError as error:
            raise _failed(compiler.command, f"does not start: {error.strerror or error}") from error

    def has_ended(self) -> bool:
        """Whether it has; raises `BuildFailure` where it failed."""
        status = self.process.poll()
        if status is None or status == 0:
            return status == 0
        how = f"was stopped by signal {-status}" if status < 0 else f"failed with exit status {status}"
        said = first_error(self.log.read_text(errors="replace"))
        raise _failed(self.compiler.command, f"{how}: {said}" if said else how)

    def stop(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def first_error(text: str) -> str:
    """The line of a compiler's output that tells most: the first error, else the last line; at most 200 characters."""
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    error = next((line for line in lines if "error:" in line), lines[-1] if lines else "")
    return error.rpartition("error: ")[2][:200].rstrip(".")

"""Building, keeping and loading the CPU kernels, and what happens where that fails.

The sources here are small ones that compile in a moment and leave a mark in the environment of the process when loaded.
"""

from __future__ import annotations

import logging
import os
import runpy
import shutil
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from harmoq_ao.common.errors import ConfigError, OutputError
from harmoq_ao.cpu_kernels import build_cache, compiler, instruction_sets, library
from harmoq_ao.cpu_kernels.build_cache import BuildCache, CacheUnusableError
from tests.waiting import is_running, until

needs_gcc = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")

SOURCE = """
#include <cstdlib>
#include "mark.h"
static const int loaded = setenv(MARK, "loaded", 1);
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with small sources and an empty cache; nothing was attempted yet, and no switch is set."""
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "mark.h").write_text('#define MARK "HARMOQ_TEST_MARK"\n')
    (sources / "one.cpp").write_text(SOURCE)
    (sources / "two.cpp").write_text("int two() { return 2; }\n")
    (sources / "exports.map").write_text("{ local: *; };\n")
    monkeypatch.setattr(compiler, "SOURCES", sources)
    monkeypatch.setattr(library, "_outcomes", {})
    monkeypatch.setenv("HARMOQ_CACHE", str(tmp_path / "cache"))
    for name in ("HARMOQ_CPU_KERNELS", "ATEN_CPU_CAPABILITY", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HARMOQ_TEST_MARK", "")
    return tmp_path


def again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    monkeypatch.setattr(library, "_outcomes", {})


def script(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that says its version, and otherwise notes its call in ``calls`` and runs `body`; named by ``CXX``."""
    path = folder / "compiler"
    path.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && {{ echo "g++ (a test) 12"; exit; }}\necho "$@" >> {folder}/calls\n{body}\n'
    )
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    return path


def calls(folder: Path) -> int:
    return len((folder / "calls").read_text().splitlines()) if (folder / "calls").exists() else 0


def loaded_mark() -> str | None:
    """The mark in the environment of the process, which ``os.environ`` does not see."""
    import ctypes

    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_char_p
    value = getenv(b"HARMOQ_TEST_MARK")
    return value.decode() if value else None


@needs_gcc
def test_built_once_then_taken_from_the_cache(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(place, 'exec g++ "$@"', monkeypatch)
    assert library.kernels("default") is torch.ops.harmoq_default
    assert loaded_mark() == "loaded"
    assert library.status("default") == library.Status(True, "default", "The CPU kernels are those for default")
    assert library.status("default").sentence == "The CPU kernels are those for default."
    assert calls(place) == 3  # two sources, one link
    again(monkeypatch)
    assert library.kernels("default") is not None
    assert calls(place) == 3


@needs_gcc
@pytest.mark.parametrize(("changed", "compiled"), [("two.cpp", 1), ("mark.h", 2)])
def test_what_changed_is_compiled_anew(
    place: Path, monkeypatch: pytest.MonkeyPatch, changed: str, compiled: int
) -> None:
    script(place, 'exec g++ "$@"', monkeypatch)
    library.kernels("default")
    with open(place / "csrc" / changed, "a") as file:
        file.write("// changed\n")
    again(monkeypatch)
    assert library.kernels("default") is not None
    assert calls(place) == 3 + compiled + 1


@needs_gcc
def test_instruction_sets_and_compilers_have_libraries_of_their_own(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = script(place, 'exec g++ "$@"', monkeypatch)
    monkeypatch.setattr(library, "best_of_cpu", lambda: "avx2")
    assert library.kernels("default") is not library.kernels("avx2")
    path.write_text(path.read_text().replace("(a test) 12", "(a test) 13"))
    again(monkeypatch)
    assert library.kernels("default") is not None
    assert calls(place) == 9


@needs_gcc
def test_a_library_exports_nothing(place: Path) -> None:
    library.kernels("default")
    (built,) = (place / "cache" / "cpu_kernels").glob("*.so")
    with open(built, "rb") as file:
        assert file.read(4) == b"\x7fELF"
    names = subprocess.run(["nm", "-D", "--defined-only", built], capture_output=True, text=True, check=True).stdout
    assert names == ""


@needs_gcc
def test_without_a_compiler_a_kept_library_is_used(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library.kernels("default")
    again(monkeypatch)
    monkeypatch.setenv("PATH", str(place))
    assert library.kernels("default") is not None
    assert library.status("default").remedy is None


def test_no_compiler(place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("PATH", str(place))
    assert library.kernels("default") is None
    assert library.kernels("default") is None
    status = library.status("default")
    assert status.reason == "The CPU kernels are not used: There is no C++ compiler on the path"
    assert status.remedy == "install g++"
    assert caplog.messages == [status.sentence]  # once


def test_the_remedy_is_the_command_of_this_system(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "dnf").write_text("#!/bin/sh\n")
    (place / "dnf").chmod(0o755)
    monkeypatch.setenv("PATH", str(place))
    assert library.status("default").sentence == (
        "The CPU kernels are not used: There is no C++ compiler on the path. What to do: dnf install gcc-c++."
    )


@pytest.mark.parametrize(
    ("named", "reason"),
    [
        ("/nowhere/g++", "CXX names no program: /nowhere/g++"),
        ("'g++", "CXX names no program: 'g++"),
        ("false", "The compiler false does not say its version (exit status 1)"),
    ],
)
def test_a_compiler_that_is_none(place: Path, monkeypatch: pytest.MonkeyPatch, named: str, reason: str) -> None:
    monkeypatch.setenv("CXX", named)
    assert library.kernels("default") is None
    assert library.status("default").reason == f"The CPU kernels are not used: {reason}"


@needs_gcc
def test_the_next_compiler_is_taken_where_one_does_not_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "c++").write_text("#!/bin/sh\nexit 1\n")
    (place / "c++").chmod(0o755)
    monkeypatch.setenv("PATH", str(place), prepend=os.pathsep)
    assert compiler.find_compiler().command == ("g++",)


def test_clang_is_not_used_beside_the_openmp_of_gcc(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = script(place, "exit 0", monkeypatch)
    path.write_text(path.read_text().replace("g++ (a test)", "Debian clang version"))
    assert library.kernels("default") is None
    assert "is clang" in library.status("default").reason
    assert calls(place) == 0


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            "echo 'one.cpp:3:7: error: no such thing.' >&2; echo more >&2; exit 1",
            "failed with exit status 1: no such thing",
        ),
        ("exit 3", "failed with exit status 3"),
        ("ulimit -c 0; kill -SEGV $$", "was stopped by signal 11"),
    ],
)
def test_a_compiler_that_fails(place: Path, monkeypatch: pytest.MonkeyPatch, body: str, said: str) -> None:
    path = script(place, body, monkeypatch)
    assert library.kernels("default") is None
    status = library.status("default")
    assert not status.available
    assert status.reason == f"The CPU kernels are not used: The compiler {path} {said}"
    assert status.remedy == "set CXX to another g++ (version 12 works)"


def test_a_failure_is_remembered_for_a_day_unless_kernels_are_asked_for(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(place, "exit 1", monkeypatch)
    library.kernels("default")
    before = calls(place)
    again(monkeypatch)
    assert library.kernels("default") is None
    assert calls(place) == before
    assert "not tried again within a day" in library.status("default").reason
    monkeypatch.setenv("HARMOQ_CPU_KERNELS", "default")
    again(monkeypatch)
    assert library.kernels() is None
    assert calls(place) > before
    monkeypatch.delenv("HARMOQ_CPU_KERNELS")
    before = calls(place)
    (record,) = (place / "cache" / "cpu_kernels").glob("*.failed")
    os.utime(record, (0, 0))
    again(monkeypatch)
    library.kernels("default")
    assert calls(place) > before


def test_a_compiler_that_hangs_is_ended_with_all_it_started(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(place, f"sleep 600 & echo $! >> {place}/sleepers; wait", monkeypatch)
    monkeypatch.setattr(compiler, "TIMEOUT", 1.0)
    assert library.kernels("default") is None
    assert "did not finish within 1 s" in library.status("default").reason
    sleepers = [int(line) for line in (place / "sleepers").read_text().split()]
    assert sleepers
    assert until(lambda: not any(is_running(number) for number in sleepers))


def test_a_compiler_that_writes_garbage(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(place, 'for target; do :; done; echo garbage > "$target"', monkeypatch)  # the last argument
    assert library.kernels("default") is None
    assert "The library that was built does not load" in library.status("default").reason


@needs_gcc
def test_a_library_with_a_missing_symbol(place: Path) -> None:
    (place / "csrc" / "two.cpp").write_text("int missing(); int two = missing();\n")
    assert library.kernels("default") is None
    assert "undefined symbol" in library.status("default").reason


def test_sources_that_are_not_installed(place: Path) -> None:
    shutil.rmtree(place / "csrc")
    (place / "csrc").mkdir()
    (place / "csrc" / "exports.map").write_text("")
    assert library.kernels("default") is None
    assert library.status("default").remedy == "install harmoq-ao again"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def unloadable(path: Path) -> None:
    other = path.with_name("text")
    other.write_text("whole, but no library")
    BuildCache(path.parent).keep(path.name, other)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@needs_gcc
@pytest.mark.parametrize("damage", [cut, flip, unloadable, empty])
def test_a_damaged_library_is_built_anew(
    place: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]
) -> None:
    script(place, 'exec g++ "$@"', monkeypatch)
    library.kernels("default")
    # Where nothing is loaded from yet: the loader takes a path that it knows for loaded.
    shutil.copytree(place / "cache", place / "copy")
    monkeypatch.setenv("HARMOQ_CACHE", str(place / "copy"))
    (built,) = (place / "copy" / "cpu_kernels").glob("*.so")
    damage(built)
    again(monkeypatch)
    assert library.kernels("default") is not None
    assert calls(place) == 4  # linked again, from the objects that are kept
    assert BuildCache(built.parent).find(built.name) == built


@needs_gcc
def test_a_damaged_object_is_compiled_anew(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(place, 'exec g++ "$@"', monkeypatch)
    library.kernels("default")
    folder = place / "cache" / "cpu_kernels"
    for path in folder.iterdir():
        path.unlink() if path.suffix == ".so" else flip(path) if path.suffix == ".o" else None
    again(monkeypatch)
    assert library.kernels("default") is not None
    assert calls(place) == 6


@pytest.fixture(params=["read-only", "full", "open to others", "of somebody else", "a file", "no home"])
def unusable(request: pytest.FixtureRequest, place: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A cache that cannot be used, for the reason returned."""
    folder = place / "cache" / "cpu_kernels"
    folder.mkdir(parents=True, mode=0o700)
    if request.param == "read-only":
        monkeypatch.setenv("HARMOQ_CACHE", "/proc/self")  # even the administrator cannot write there
        return "cannot be made"
    if request.param == "full":

        @contextmanager
        def full(path: Path) -> Iterator[None]:
            raise OutputError(f"{path} could not be written", found="OSError: No space left on device")
            yield

        monkeypatch.setattr(build_cache, "atomic_write", full)
        return "No space left on device"
    if request.param == "open to others":
        folder.chmod(0o777)
        return "can be written by others"
    if request.param == "of somebody else":
        user = os.geteuid()
        if user == 0:
            os.chown(folder, 4242, -1)
        else:
            monkeypatch.setattr(os, "geteuid", lambda: user + 1)
        return "belongs to somebody else"
    if request.param == "a file":
        folder.rmdir()
        folder.write_text("")
        return "cannot be made"
    monkeypatch.delenv("HARMOQ_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def no_home() -> Path:
        raise RuntimeError("nobody lives here")

    monkeypatch.setattr(Path, "home", no_home)
    return "there is no home folder (nobody lives here)"


@needs_gcc
def test_without_a_cache_the_process_has_a_library_of_its_own(
    place: Path, unusable: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scratch = place / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    assert library.kernels("default") is not None
    assert loaded_mark() == "loaded"
    status = library.status("default")
    assert status.available
    assert status.reason.startswith("The CPU kernels are those for default, built for this process only: ")
    assert unusable in status.reason
    assert status.remedy == "set HARMOQ_CACHE to a folder of your own"
    assert caplog.messages == [status.sentence]
    assert not list(scratch.iterdir())


def test_no_room_for_temporary_files(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(place, "exit 0", monkeypatch)
    monkeypatch.setattr("tempfile.tempdir", str(place / "missing"))
    assert library.kernels("default") is None
    status = library.status("default")
    assert status.reason.startswith("The CPU kernels are not used: ")
    assert "No such file or directory" in status.reason
    assert status.remedy == "set TMPDIR to a folder with free space"


@pytest.mark.parametrize(("home", "expected"), [("/somewhere", "/somewhere"), ("relative", None), ("", None)])
def test_the_place_of_the_cache(place: Path, monkeypatch: pytest.MonkeyPatch, home: str, expected: str | None) -> None:
    monkeypatch.delenv("HARMOQ_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    monkeypatch.setenv("HOME", str(place))
    asked: list[Path] = []
    monkeypatch.setattr(library, "BuildCache", asked.append)
    library._cache()
    base = Path(expected) if expected else place / ".cache"
    assert asked == [base / "harmoq-ao" / "cpu_kernels"]


def test_the_cache_is_closed_to_others_and_loses_what_is_unused(tmp_path: Path) -> None:
    cache = BuildCache(tmp_path / "a" / "b")
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    (tmp_path / "new").write_bytes(b"content")
    old = cache.keep("old", tmp_path / "new")
    os.utime(old, (0, 0))
    used = cache.keep("used", tmp_path / "new")
    assert not old.exists()
    assert cache.find("us*") == used
    assert cache.find("o*") is None


PROGRAM = """
    import sys
    from pathlib import Path
    from harmoq_ao.cpu_kernels import compiler, library
    compiler.SOURCES = Path(sys.argv[1])
    print("ready", flush=True)
    sys.stdin.readline()
    print(library.kernels("default") is not None, library.status("default").sentence, flush=True)
"""


@needs_gcc
def test_two_processes_at_once_build_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(place, 'sleep 0.5; exec g++ "$@"', monkeypatch)
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(place / "csrc")]
    both = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in both:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in both:
        assert process.communicate()[0] == "True The CPU kernels are those for default.\n"
        assert process.returncode == 0
    assert calls(place) == 3


@needs_gcc
def test_a_lock_that_is_never_given_back_does_not_stop_a_build(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_cache, "WAIT", 0.3)
    script(place, 'exec g++ "$@"', monkeypatch)
    entered: list[str] = []
    real = BuildCache.alone

    @contextmanager
    def twice(cache: BuildCache, name: str) -> Iterator[None]:
        with real(cache, name):
            entered.append(name)
            with real(cache, name):  # held already, by a descriptor of its own, as another process would hold it
                yield

    monkeypatch.setattr(BuildCache, "alone", twice)
    assert library.kernels("default") is not None
    assert len(entered) == 1
    with real(BuildCache(place / "cache" / "cpu_kernels"), entered[0]):
        pass  # given back


@needs_gcc
def test_threads_build_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(place, 'sleep 0.2; exec g++ "$@"', monkeypatch)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(library.kernels, ["default"] * 4))
    assert found == [torch.ops.harmoq_default] * 4
    assert calls(place) == 3


@needs_gcc
def test_a_terminal_shows_that_kernels_are_built(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    library.kernels("default")
    shown = " ".join(capsys.readouterr().err.split())
    assert "Building the CPU kernels for default with c++, once per machine and version" in shown
    again(monkeypatch)
    library.kernels("default")
    assert capsys.readouterr().err == ""


@needs_gcc
def test_elsewhere_it_is_logged(
    place: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO):
        library.kernels("default")
    assert caplog.messages[0] == "Building the CPU kernels for default with c++, once per machine and version"
    assert caplog.messages[1].startswith("Built the CPU kernels for default in ")
    assert capfd.readouterr() == ("", "")


ORDER = list(instruction_sets.NAMES)


@pytest.mark.parametrize("best", ORDER)
@pytest.mark.parametrize("setting", [None, *ORDER])
@pytest.mark.parametrize("torch_limit", [None, "default", "avx2", "avx512", "nonsense"])
def test_never_an_instruction_set_that_the_cpu_lacks(
    monkeypatch: pytest.MonkeyPatch, best: str, setting: str | None, torch_limit: str | None
) -> None:
    monkeypatch.setattr(instruction_sets, "best_of_cpu", lambda: best)
    monkeypatch.setenv("HARMOQ_CPU_KERNELS", setting or "")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", torch_limit or "")
    limit = setting or (torch_limit if torch_limit in ("default", "avx2") else "avx512_bf16")
    assert instruction_sets.chosen() == ORDER[min(ORDER.index(best), ORDER.index(limit))]


@pytest.mark.parametrize(
    ("machine", "queries", "best"),
    [
        ("aarch64", "_is_avx2_supported _is_avx512_supported", "default"),
        ("x86_64", "", "default"),
        ("x86_64", "_is_avx2_supported", "avx2"),
        ("AMD64", "_is_avx2_supported _is_avx512_supported _is_vnni_supported", "avx512"),
        (
            "x86_64",
            "_is_avx2_supported _is_avx512_supported _is_vnni_supported _is_avx512_bf16_supported",
            "avx512_bf16",
        ),
    ],
)
def test_the_best_of_a_cpu(monkeypatch: pytest.MonkeyPatch, machine: str, queries: str, best: str) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(instruction_sets, "_has", lambda query: query in queries.split())
    assert instruction_sets.best_of_cpu.__wrapped__() == best


def test_a_higher_one_on_request_says_that_this_cpu_cannot(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "best_of_cpu", lambda: "avx2")
    assert library.kernels("avx512") is None
    assert library.status("avx512").reason == "This CPU cannot run the CPU kernels for avx512"


def test_switched_off(place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("HARMOQ_CPU_KERNELS", "off")
    assert library.kernels() is None
    assert library.status() == library.Status(
        False, None, "The CPU kernels are switched off (HARMOQ_CPU_KERNELS=off)", "unset HARMOQ_CPU_KERNELS"
    )
    assert not caplog.messages  # the user knows


@pytest.mark.parametrize("value", ["sse", "AVX2", "on"])
def test_unknown_names(place: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    with pytest.raises(ConfigError, match=f"Unknown instruction set.*Found: '{value}'.*Expected: default, avx2"):
        library.kernels(value)
    monkeypatch.setenv("HARMOQ_CPU_KERNELS", value)
    with pytest.raises(ConfigError, match=f"HARMOQ_CPU_KERNELS has.*Found: '{value}'.*Expected: off, default, avx2"):
        library.kernels()


@pytest.mark.parametrize(("value", "code", "said"), [("off", 1, "switched off"), ("default", 0, "those for default")])
def test_the_command(place: Path, monkeypatch: pytest.MonkeyPatch, value: str, code: int, said: str) -> None:
    if value != "off":
        monkeypatch.setattr(
            library, "_outcomes", {value: (torch.ops.harmoq_default, library.Status(True, value, said))}
        )
    monkeypatch.setenv("HARMOQ_CPU_KERNELS", value)
    written: list[str] = []
    monkeypatch.setattr(sys.stdout, "write", written.append)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("harmoq_ao.cpu_kernels", run_name="__main__")
    assert int(ended.value.code or 0) == code
    assert said in "".join(written)


def test_sources_are_installed() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["harmoq_ao.cpu_kernels"]
    files = [p.relative_to(compiler.SOURCES.parent) for p in compiler.SOURCES.rglob("*") if p.is_file()]
    assert {path.suffix for path in files} == {".cpp", ".h", ".map"}
    assert all(any(path.match(pattern) for pattern in patterns) for path in files)


def test_importing_imports_no_build_tools() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import harmoq_ao.cpu_kernels.library; "
        "print(*sys.modules.keys() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {name.partition(".")[0] for name in done.stdout.split()} & {"setuptools", "distutils", "rich"}
    assert "torch.utils.cpp_extension" not in done.stdout.split()


def test_a_cache_below_a_file_is_said_to_be_unusable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheUnusableError, match="cannot be made"):
        BuildCache(tmp_path / "file" / "cache")

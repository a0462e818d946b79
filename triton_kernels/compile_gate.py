"""Compile every kernel for GPUs that need not be there, and hold the machine code to a table.

``python -m harmoq_ao.triton_kernels.compile_gate`` checks, for all of `ARCHITECTURES` and in as many processes as
there are processors: it compiles; on NVIDIA no stack, so no spilled registers; integer tensor-core
instructions where they are expected; shared memory within the limit; no fused multiply-add where exact codes are
made; at most 10 % more instructions than `compile_budget.json` says. ``--update`` writes that file. Instruction
counts repeat where timings do not, but they belong to one version of Triton: under another one only the structure is
checked. Nothing has ever run on AMD, and tile sizes are those for NVIDIA: there, spilled registers are recorded, not
refused.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from harmoq_ao.triton_kernels.compile_cases import CASES, Case
from harmoq_ao.triton_kernels.launch import OPTIONS

logger = logging.getLogger(__name__)

BUDGET = Path(__file__).with_name("compile_budget.json")
_NVIDIA = (80, 86, 89, 90, 120)
_AMD = ("gfx942", "gfx950")
ARCHITECTURES = {f"sm_{number}": GPUTarget("cuda", number, 32) for number in _NVIDIA} | {
    name: GPUTarget("hip", name, 64) for name in _AMD
}
_KIB = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_120": 99, "gfx942": 64, "gfx950": 160}
SHARED_LIMIT = {name: kib * 1024 for name, kib in _KIB.items()}
TOLERANCE = 1.1
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(r"^\s*(?:/\*[0-9a-f]{4,}\*/)?\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\b.*;", re.MULTILINE)


@dataclass(frozen=True)
class Measured:
    """Machine code of one case on one architecture.

    Attributes:
        instructions: Instructions of the whole kernel, each counted once, padding left out.
        executed: Those that a warp issues, the longest loop as often as it runs; 0 for AMD.
        registers: Registers of a thread.
        shared: Bytes of shared memory of a program.
        stack: Bytes of stack of a thread: spilled registers.
        integer_mma: Integer tensor-core instructions among them.
        float_mma: Floating-point ones.
        fused: Fused multiply-adds.
    """

    instructions: int
    executed: int
    registers: int
    shared: int
    stack: int
    integer_mma: int
    float_mma: int
    fused: int


def measure(case: Case, architecture: str) -> Measured:
    """Compile ``case`` and count."""
    compiled = compile_case(case, ARCHITECTURES[architecture])
    return _measure_amd(compiled) if "amdgcn" in compiled.asm else _measure_nvidia(compiled, case.trips)


def disassemble(compiled: Any) -> tuple[str, str]:
    """Resource usage and SASS of a kernel compiled for NVIDIA."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return _tool("cuobjdump", "-res-usage", file.name), _tool("nvdisasm", "-c", file.name)


def opcodes_of(listing: str) -> list[str]:
    """Opcodes of a SASS listing, without modifiers and padding."""
    return [kind for code in _INSTRUCTION.findall(listing) if (kind := code.split(".")[0]) != "NOP"]


def executed(listing: str, trips: int) -> int:
    """Instructions that a warp issues: all of them once, those of backward branches ``trips`` times."""
    places: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    count = 0
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            places[label[1]] = count
        count += len(opcodes_of(line + "\n"))
        branch = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)
        if branch and branch[1] in places:
            first = places[branch[1]]
            # A loop within this one, such as the wait for a barrier, runs with it.
            loops = [loop for loop in loops if loop[0] < first] + [(first, count)]
    return count + (trips - 1) * sum(last - first for first, last in loops)


def _measure_nvidia(compiled: Any, trips: int) -> Measured:
    usage, listing = disassemble(compiled)
    kinds = opcodes_of(listing)
    return Measured(
        instructions=len(kinds),
        executed=executed(listing, trips),
        registers=_number(r"REG:(\d+)", usage),
        shared=int(compiled.metadata.shared),
        stack=_number(r"STACK:(\d+)", usage),
        integer_mma=kinds.count("IMMA") + kinds.count("IGMMA"),
        float_mma=kinds.count("HMMA") + kinds.count("HGMMA"),
        fused=kinds.count("FFMA"),
    )


def _measure_amd(compiled: Any) -> Measured:
    text = compiled.asm["amdgcn"]
    opcodes = re.findall(r"^\s+([vs]_\w+|ds_\w+|global_\w+|buffer_\w+|flat_\w+|scratch_\w+)\b", text, re.MULTILINE)
    matrix = [code for code in opcodes if code.startswith("v_mfma")]
    integer = sum("_i8" in code for code in matrix)
    return Measured(
        instructions=len(opcodes) - opcodes.count("s_nop"),
        executed=0,
        registers=_number(r"\.vgpr_count:\s*(\d+)", text),
        shared=int(compiled.metadata.shared),
        stack=_number(r"\.private_segment_fixed_size:\s*(\d+)", text),
        integer_mma=integer,
        float_mma=len(matrix) - integer,
        fused=sum("_fma_f32" in code or "_fmac_f32" in code for code in opcodes),
    )


def compile_case(case: Case, target: GPUTarget) -> Any:
    """The compiled kernel of a case; nothing of it runs."""
    names = case.kernel.arg_names
    missing = set(names) ^ set(case.arguments)
    if missing:
        raise ValueError(f"{case.name}: arguments do not match the kernel: {sorted(missing)}")
    signature: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for position, name in enumerate(names):
        value = case.arguments[name]
        parts = value if isinstance(value, tuple) else (value,)
        if all(isinstance(part, str) and (part.startswith("*") or part in ("i32", "fp32")) for part in parts):
            signature[name] = value
            # Launchers find pointers aligned as torch allocates them, and sizes that are multiples of 16.
            paths = [(position, at) for at in range(len(parts))] if isinstance(value, tuple) else [(position,)]
            attributes |= {
                path: [["tt.divisibility", 16]] for path, part in zip(paths, parts, strict=True) if part != "fp32"
            }
        else:
            signature[name] = "constexpr"
            constants[name] = value
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **OPTIONS}
    return triton.compile(source, target=target, options=options)


def problems(case: Case, architecture: str, found: Measured, budget: int | None) -> list[str]:
    """What is wrong with the machine code of a case; nothing if it passes."""
    wrong = []
    if found.stack and not architecture.startswith("gfx"):
        wrong.append(f"{found.stack} bytes of stack: registers spill")
    if found.shared > SHARED_LIMIT[architecture]:
        wrong.append(f"{found.shared} bytes of shared memory, limit {SHARED_LIMIT[architecture]}")
    if case.integer_mma and not found.integer_mma:
        wrong.append("no int8 tensor-core instruction")
    if case.unfused and found.fused:
        wrong.append(f"{found.fused} fused multiply-adds: codes may differ from the reference")
    if budget is not None and found.instructions > budget * TOLERANCE:
        wrong.append(f"{found.instructions} instructions, budget {budget}")
    return wrong


def read_budget() -> tuple[str, dict[str, dict[str, int]]]:
    """Triton version of the table, and its rows by ``case @ architecture``."""
    if not BUDGET.exists():
        return "", {}
    table = json.loads(BUDGET.read_text())
    return table["triton"], table["kernels"]


def check(architectures: Sequence[str], cases: Iterable[Case], update: bool = False) -> list[str]:
    """Measure all cases, log a row for each, and return what is wrong."""
    version, rows = read_budget()
    # Another compiler counts otherwise, so its budgets say nothing.
    same = version == triton.__version__
    if not same and not update:
        logger.warning("Budgets are of Triton %s, this is %s: structure only", version, triton.__version__)
    wrong = []
    for case, architecture, found in measured(architectures, list(cases)):
        name = f"{case.name} @ {architecture}"
        budget = rows[name]["instructions"] if same and not update and name in rows else None
        here = problems(case, architecture, found, budget)
        if same and not update and name not in rows:
            here.append("not in the table: run with --update")
        logger.info("%-48s %s %s", name, _row(found), "; ".join(here) or "ok")
        wrong += [f"{name}: {problem}" for problem in here]
        rows[name] = asdict(found)
    if update:
        known = {f"{case.name} @ {architecture}" for case in CASES for architecture in ARCHITECTURES}
        BUDGET.write_text(_table({name: row for name, row in rows.items() if name in known}))
    return wrong


def measured(architectures: Sequence[str], cases: Sequence[Case]) -> Iterator[tuple[Case, str, Measured]]:
    """All cases on all architectures, compiled in as many processes as there are processors."""
    # Names travel, not cases: a process imports the kernels itself.
    keys = [(case, architecture) for case in cases for architecture in architectures]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        found = pool.map(_measure_named, [case.name for case, _ in keys], [name for _, name in keys])
        for (case, architecture), row in zip(keys, found, strict=True):
            yield case, architecture, row


def _measure_named(case: str, architecture: str) -> Measured:
    return measure(next(known for known in CASES if known.name == case), architecture)


def _table(rows: dict[str, dict[str, int]]) -> str:
    """The table as JSON, a line for each kernel, so that differences read as a table too."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(rows.items()))
    return f'{{\n "triton": {json.dumps(triton.__version__)},\n "kernels": {{\n{lines}\n }}\n}}\n'


def _row(found: Measured) -> str:
    return (
        f"{found.instructions:6d} instr {found.executed:6d} issued {found.registers:4d} reg {found.shared:7d} B shared "
        f"{found.integer_mma:4d} int mma {found.float_mma:4d} float mma"
    )


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / name, *arguments], check=True, capture_output=True, text=True).stdout


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"no {pattern} in the listing")
    return int(match[1])


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description="Compile all kernels without a GPU and check the machine code.")
    parser.add_argument("--arch", action="append", choices=tuple(ARCHITECTURES), help="default: all")
    parser.add_argument("--only", default="", help="part of the names of the cases to compile")
    parser.add_argument("--update", action="store_true", help="write the table of budgets")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    cases = [case for case in CASES if options.only in case.name]
    wrong = check(options.arch or tuple(ARCHITECTURES), cases, options.update)
    for problem in wrong:
        logger.error("FAILED %s", problem)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

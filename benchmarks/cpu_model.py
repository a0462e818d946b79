"""Whole-model speed on this CPU: DAT-light x2 at W8A8 and W4A4 against float32 eager, interleaved in one process.

Run ``python -m benchmarks.cpu_model --output benchmarks/results/cpu_model.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import harmoq_ao
from benchmarks.measuring import environment, paired_ratio, percentiles, random_image, write_json
from harmoq_ao.common.allocator import keep_memory
from harmoq_ao.images import CalibrationCrops, skimage_photographs

Contender = Callable[[torch.Tensor], torch.Tensor]


def contenders(bits: list[tuple[int, int]]) -> dict[str, Contender]:
    """The float model, in float32 and bfloat16, and ours."""
    model = harmoq_ao.load_demo_model(2).model
    half = harmoq_ao.load_demo_model(2).model.bfloat16()
    found: dict[str, Contender] = {"float32 eager": model, "bfloat16 eager": lambda x: half(x.bfloat16()).float()}
    crops = CalibrationCrops(list(skimage_photographs("calibration").values()), size=64, count=8, downscale=2)
    for weight_bits, act_bits in bits:
        prepared = harmoq_ao.prepare_harmoq(model, harmoq_ao.HarmoqConfig(weight_bits, act_bits))
        quantized = harmoq_ao.convert_harmoq(harmoq_ao.calibrate(prepared, crops, show_progress=False))
        name = f"W{weight_bits}A{act_bits}"
        found[name] = quantized
        found[f"{name}, bfloat16 rest"] = harmoq_ao.convert_harmoq(prepared, float_dtype=torch.bfloat16)
    return found


def measure(found: dict[str, Contender], size: int, rounds: int) -> dict[str, list[float]]:
    """Seconds per call, every contender once a round, on fresh random images."""
    times: dict[str, list[float]] = {name: [] for name in found}
    with torch.no_grad():
        for index in range(rounds + 2):
            image = random_image(size, index)
            for name, model in found.items():
                start = time.perf_counter()
                model(image)
                if index >= 2:  # the first rounds warm up
                    times[name].append(time.perf_counter() - start)
    return times


def summary(times: dict[str, list[float]], size: int) -> dict[str, Any]:
    """p20, p50, p80 in ms, and the median ratio of float32 eager to each contender within a round."""
    base = times["float32 eager"]
    rows = {
        name: {**percentiles(values), "speed_vs_float32_eager": round(paired_ratio(base, values), 3)}
        for name, values in times.items()
    }
    described = {"model": "DAT-light x2", "image": [1, 3, size, size], "rounds": len(base)}
    return {**described, **environment(), "results": rows}


def main() -> None:
    """Measure and print; write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    keep_memory()
    found = contenders([(8, 8), (4, 4)])
    result = summary(measure(found, arguments.size, arguments.rounds), arguments.size)
    print(json.dumps(result, indent=2))
    if arguments.output:
        write_json(arguments.output, result)


if __name__ == "__main__":
    main()

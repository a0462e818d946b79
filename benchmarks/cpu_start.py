"""What does starting cost: imports, loading a saved model, and one image upscaled by a new process?

Each command is a process of its own and taken whole. Two that are compared take turns, after a round that warms the
caches, and ratios are taken within rounds. DAT-light x2 as `cpu_peers` quantizes it, and a photograph of 256x256.

    python -m benchmarks.cpu_start

Prints a table, and writes nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import skimage.data
from PIL import Image

from benchmarks.cpu_peers import SCALE, Job, quantized_model
from benchmarks.measuring import paired_ratio
from harmoq_ao import save_quantized
from harmoq_ao.recipes.documents import markdown_table
from harmoq_ao.zoo import demo_checkpoint

SPANDREL = """
import sys, numpy, torch
from PIL import Image
from spandrel import ModelLoader
checkpoint, source, target = sys.argv[1:]
model = ModelLoader("cpu").load_from_file(checkpoint)
image = torch.from_numpy(numpy.array(Image.open(source))).permute(2, 0, 1)[None] / 255
with torch.inference_mode():
    y = model(image)[0].clamp(0, 1)
Image.fromarray((y.permute(1, 2, 0) * 255).round().byte().numpy()).save(target)
"""
"""The shortest script that upscales an image with a float checkpoint."""

LOADING = """
import sys, time
import torch, harmoq_ao
load = harmoq_ao.load_quantized  # imports what it needs
start = time.process_time()
load(sys.argv[1])
print(time.process_time() - start)
"""


def seconds(command: list[str], threads: int) -> tuple[float, str]:
    """Wall-clock seconds of a process, and what it printed.

    Raises:
        subprocess.CalledProcessError: It failed.
    """
    start = time.perf_counter()
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)}
    )
    return time.perf_counter() - start, done.stdout


def compared(base: list[str], other: list[str], rounds: int, threads: int) -> dict[str, str]:
    """Medians of both, and how many times longer the other one takes, as cells of the table."""
    times: tuple[list[float], list[float]] = ([], [])
    for index in range(rounds + 1):
        for found, command in zip(times, (base, other), strict=True):
            taken = seconds(command, threads)[0]
            if index:
                found.append(taken)
    medians = [f"{statistics.median(found):.2f}" for found in times]
    return {"yardstick s": medians[0], "harmoq s": medians[1], "ratio": f"{1 / paired_ratio(*times):.2f}"}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("build/cpu_peers"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        image, target, saved = f"{folder}/image.png", f"{folder}/upscaled.png", f"{folder}/w8a8"
        # saved by this version: of another one's sites nothing is taken on trust, and loading runs the network
        save_quantized(quantized_model(Job("dat-light", 128, options.work), 8), saved)
        Image.fromarray(skimage.data.astronaut()[:256, :256]).save(image)
        python = [sys.executable, "-c"]
        rows = {
            "import harmoq_ao / import torch": ([*python, "import torch"], [*python, "import harmoq_ao"]),
            "harmoq upscale / spandrel script": (
                [*python, SPANDREL, str(demo_checkpoint(SCALE)), image, target],
                [sys.executable, "-m", "harmoq_ao.cli", "upscale", saved, image, "-o", target, "--overwrite"],
            ),
        }
        table = [{"": name, **compared(*pair, options.rounds, options.threads)} for name, pair in rows.items()]
        loads = [float(seconds([*python, LOADING, saved], options.threads)[1]) for _ in range(options.rounds + 1)]
    print(markdown_table(pd.DataFrame(table)))
    print(f"load_quantized: {statistics.median(loads[1:]):.2f} s of CPU time")


if __name__ == "__main__":
    main()

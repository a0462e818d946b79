"""Is an exported OpenVINO IR as fast as `lower_openvino`, and does it compute the same?

Two processes take turns, one call each per round, on the same fresh random image: the file of ``harmoq export
model.xml``, run by OpenVINO alone, and the quantized model lowered in Python. Both take OpenVINO's choice for the float
parts, bfloat16 where the CPU multiplies it.

    python -m benchmarks.exported --model dat-light --bits 8

Needs ``pip install "harmoq-ao[bench,demo]"``.
"""

from __future__ import annotations

import argparse
import json
from contextlib import closing
from pathlib import Path

from benchmarks.cpu_peers import MODELS, Job, Worker, quantized_model
from benchmarks.measuring import environment, paired_ratio, percentiles


def main() -> None:
    """Measure and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="dat-light")
    parser.add_argument("--bits", type=int, choices=(8, 4, 2), default=8)
    parser.add_argument("--size", type=int, default=128, help="side of the image in pixels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--work", type=Path, default=Path("build/cpu_peers"), help="folder of models, kept")
    options = parser.parse_args()
    job = Job(options.model, options.size, options.work)
    quantized_model(job, options.bits)  # made once, not by both
    name = f"harmoq W{options.bits}A{options.bits}"
    with (
        closing(Worker(f"{name}, OpenVINO", job, None, options.threads)) as lowered,
        closing(Worker(f"{name}, exported IR", job, None, options.threads)) as exported,
    ):
        rounds = [(lowered.ask(seed), exported.ask(seed)) for seed in range(1, options.rounds + 3)][2:]
    before, after = zip(*rounds, strict=True)
    found = {"lowered": percentiles(before), "exported": percentiles(after), "ratio": paired_ratio(before, after)}
    about = {"model": options.model, "bits": options.bits, "size": options.size, "threads": options.threads}
    print(json.dumps({**about, "rounds": options.rounds, **found, **environment(("openvino", "onnx"))}))


if __name__ == "__main__":
    main()

"""How fast are whole models on this CPU, ours and everybody else's, and what does each lose in PSNR?

Every contender runs in a process of its own. One contender at a time is measured against two yardsticks, float32 eager
and OpenVINO bfloat16, or what of them works: they take turns, one call each per round, on the same fresh random image,
and the ratios are taken within rounds. A contender is done once; run the script again to go on where it stopped.

All that calibrate do so on the same crops. PSNR is of luma on Set5, in tiles of the size that is timed, for every
contender alike, since most of them take one size only.

    python -m benchmarks.cpu_peers --set5 data/Set5 --output benchmarks/results

Needs ``pip install "harmoq-ao[bench,demo]"``; a contender that does not work is recorded with its error.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

import harmoq_ao as h
from benchmarks.measuring import (
    environment,
    one_line,
    paired_ratio,
    percentiles,
    random_image,
    read_results,
    write_results,
)
from benchmarks.peers import Run, bfloat16_run, for_size, hat_s, swinir_light, torchao_int8
from harmoq_ao.common.allocator import keep_memory
from harmoq_ao.config import Profile
from harmoq_ao.images import skimage_photographs
from harmoq_ao.recipes.charts import new_figure, save_figure, styled
from harmoq_ao.recipes.documents import markdown_table
from harmoq_ao.recipes.store import write_text
from harmoq_ao.runtime.openvino.compiling import compile_on_cpu
from harmoq_ao.runtime.tiling import pad_to_multiple, upscale

SCALE = 2
CROPS = 32
UNTRAINED_CROPS = 2  # of models whose weights are random: ranges are needed, good ones are not
CALIBRATION_SIZE = 128  # of our models' crops; theirs take the size that is timed only
FRAME = (720, 1280)
OVERLAP = 16  # of tiles
MODELS = ("dat-light", "swinir-light", "hat-s")
YARDSTICKS = ("float32 eager", "OpenVINO bf16")
_RATIOS = tuple(f"vs {name}" for name in YARDSTICKS)
PACKAGES = ("openvino", "nncf", "onnxruntime", "onnx", "torchao", "spandrel")


@dataclass(frozen=True)
class Job:
    """What is measured.

    Attributes:
        model: ``dat-light`` (trained weights), ``swinir-light`` or ``hat-s`` (random weights: no PSNR).
        size: Side of the image, or of the tiles of a frame, in pixels.
        work: Folder of quantized models, kept between contenders.
        isa: Instruction set that torch and our kernels are held to; None for all that the CPU has.
        frame: Whether a frame of 1280x720 is upscaled in tiles.
    """

    model: str
    size: int
    work: Path
    isa: str | None = None
    frame: bool = False

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of what is timed."""
        return FRAME if self.frame else (self.size, self.size)

    def build(self) -> nn.Module:
        """The float model."""
        if self.model == "dat-light":
            return h.load_demo_model(SCALE).model
        torch.manual_seed(0)
        return (hat_s if self.model == "hat-s" else swinir_light)(SCALE).eval()

    def fixed(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The float model with its masks ready for the size."""
        return for_size(self.build().to(dtype), (self.size, self.size))

    def crops(self, size: int | None = None) -> list[Tensor]:
        """Calibration crops `[3, size, size]`, by default of the size that is timed."""
        photographs = list(skimage_photographs("calibration").values())
        return list(h.CalibrationCrops(photographs, size=size or self.size, count=self.crop_count, downscale=SCALE))

    @property
    def crop_count(self) -> int:
        """Number of calibration crops."""
        return CROPS if self.model == "dat-light" else UNTRAINED_CROPS


# --- contenders -------------------------------------------------------------------------------------------------------


def _onnx_file(job: Job) -> Path:
    path = job.work / f"{job.model}-{job.size}.onnx"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_path = path.with_suffix(".partial")
        torch.onnx.export(job.build(), (random_image(job.size, 0),), str(partial_path), opset_version=17, dynamo=False)
        partial_path.rename(path)
    return path


def _onnx_session(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def _onnx_int8(job: Job) -> Run:
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    source, target = _onnx_file(job), job.work / f"{job.model}-{job.size}-int8.onnx"
    name = onnx.load(str(source)).graph.input[0].name

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.images = iter(job.crops())

        def get_next(self) -> dict[str, Any] | None:
            image = next(self.images, None)
            return None if image is None else {name: image[None].numpy()}

    quantize_static(
        str(source),
        str(target),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        op_types_to_quantize=["MatMul", "Gemm"],
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        extra_options={"MatMulConstBOnly": True},
    )
    return _onnx_session(target)


def _openvino_model(job: Job) -> Any:
    import openvino as ov

    image = random_image(job.size, 0)
    return ov.convert_model(job.build(), example_input=image, input=[ov.PartialShape(list(image.shape))])


def _openvino_run(model: Any, **options: str) -> Run:
    compiled = compile_on_cpu(model, INFERENCE_NUM_THREADS=torch.get_num_threads(), NUM_STREAMS=1, **options)
    return lambda x: torch.from_numpy(compiled(x.numpy(), share_inputs=True)[0])


def _nncf(job: Job, precision: str) -> Run:
    import nncf

    images = nncf.Dataset([crop[None].numpy() for crop in job.crops()])
    model = nncf.quantize(
        _openvino_model(job),
        images,
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=CROPS,
        fast_bias_correction=True,
    )
    return _openvino_run(model, INFERENCE_PRECISION_HINT=precision)


def quantized_model(job: Job, bits: int, per_token: bool = False, profile: Profile = "deploy") -> h.QuantizedModel:
    """Our model, from the work folder where it was made before."""
    kind = "-token" if per_token else "" if profile == "deploy" else f"-{profile}"
    folder = job.work / f"{job.model}-w{bits}a{bits}{kind}"
    if not folder.exists():
        rules = [h.SiteRule(kind="linear", dynamic=True)] if per_token else []
        prepared = h.prepare_harmoq(job.build(), h.HarmoqConfig(bits, bits, rules=rules, profile=profile))
        h.save_quantized(
            h.convert_harmoq(h.calibrate(prepared, job.crops(CALIBRATION_SIZE), show_progress=False)), folder
        )
    return h.load_quantized(folder)


def _native_compiled(job: Job, bits: int) -> Run:
    return h.compile_model(quantized_model(job, bits).set_float_dtype(torch.bfloat16), keep=1)


def _lowered(job: Job, bits: int, per_token: bool = False) -> Run:
    return h.lower_openvino(quantized_model(job, bits, per_token), keep=1)


def _exported(job: Job, bits: int) -> Run:
    """The file of ``harmoq export model.xml``, by OpenVINO alone."""
    path = job.work / f"{job.model}-{job.size}-w{bits}a{bits}.xml"
    if not path.exists():
        h.export_openvino(quantized_model(job, bits), path, (job.size, job.size))
    return _openvino_run(path)


CONTENDERS: dict[str, Callable[[Job], Run]] = {
    "float32 eager": Job.build,
    "bfloat16 eager": lambda job: bfloat16_run(job.fixed(torch.bfloat16)),
    "torch.compile float32": lambda job: torch.compile(job.fixed(), dynamic=False),
    "torch.compile bf16": lambda job: bfloat16_run(torch.compile(job.fixed(torch.bfloat16), dynamic=False)),
    "torchao int8 dynamic": lambda job: torchao_int8(job.fixed()),
    "ONNX Runtime float32": lambda job: _onnx_session(_onnx_file(job)),
    "ONNX Runtime int8": _onnx_int8,
    "OpenVINO float32": lambda job: _openvino_run(_openvino_model(job), INFERENCE_PRECISION_HINT="f32"),
    "OpenVINO bf16": lambda job: _openvino_run(_openvino_model(job), INFERENCE_PRECISION_HINT="bf16"),
    "NNCF int8": partial(_nncf, precision="f32"),
    "NNCF int8, bf16 rest": partial(_nncf, precision="bf16"),
    **{f"harmoq W{b}A{b}": partial(quantized_model, bits=b) for b in (8, 4, 2)},
    "harmoq W4A4, paper": partial(quantized_model, bits=4, profile="paper"),
    **{f"harmoq W{b}A{b}, torch.compile": partial(_native_compiled, bits=b) for b in (8, 4, 2)},
    **{f"harmoq W{b}A{b}, OpenVINO": partial(_lowered, bits=b) for b in (8, 4, 2)},
    **{f"harmoq W{b}A{b}, exported IR": partial(_exported, bits=b) for b in (8, 4, 2)},
    "harmoq W4A4 per token, OpenVINO": partial(_lowered, bits=4, per_token=True),
}


# --- one process per contender ----------------------------------------------------------------------------------------


def serve(name: str, job: Job, set5: Path | None, threads: int, pipe: Connection) -> None:
    """Build a contender, then answer questions: the seed of an image with seconds, ``psnr`` with decibels, ``memory``
    with the peak of resident memory since it was built, in MiB.

    The first answer comes when it is built; an answer that is text is the error that ended it.
    """
    warnings.simplefilter("ignore")
    keep_memory()
    torch.set_num_threads(threads)
    try:
        for answer in _answers(name, job, set5, pipe):
            pipe.send(answer)
    except EOFError:  # no more questions
        pass
    except Exception as error:  # whatever another library fails with is a result
        pipe.send(one_line(error))
        raise


@torch.no_grad()
def _answers(name: str, job: Job, set5: Path | None, pipe: Connection) -> Iterator[float]:
    model = CONTENDERS[name](job)
    model(random_image(job.size, 0))
    timed = partial(upscale, model, scale=SCALE, tile=job.size, overlap=OVERLAP) if job.frame else model
    _forget_peak()
    yield 0.0
    while True:
        question = pipe.recv()
        if question == "psnr":
            yield float("nan") if set5 is None else _psnr(model, job, set5)
        elif question == "memory":
            yield _peak_mebibytes()
        else:
            image = random_image(job.image_size, question)
            start = time.perf_counter()
            timed(image)
            yield time.perf_counter() - start


def _forget_peak() -> None:
    """Let the system count the peak of resident memory anew: building a contender is not what is measured."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_mebibytes() -> float:
    status = Path("/proc/self/status").read_text()
    return float(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def _psnr(model: Run, job: Job, set5: Path) -> float:
    def fixed(image: Tensor) -> Tensor:
        padded, (height, width) = pad_to_multiple(image, job.size)
        return model(padded)[..., : height * SCALE, : width * SCALE]

    table = h.evaluate(fixed, h.load_pairs(set5, None, SCALE), SCALE, tile=job.size, overlap=OVERLAP)
    return float(table.mean.psnr)


class Worker:
    """A contender in a process of its own.

    Raises:
        RuntimeError: It cannot be built; the message is its error.
    """

    def __init__(self, name: str, job: Job, set5: Path | None, threads: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.name = name
        self.pipe, other = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(name, job, set5, threads, other))
        self.process.start()
        other.close()  # so that the end of the process is the end of the answers
        try:
            self.answer()
        except RuntimeError:
            self.close()
            raise

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()

    def ask(self, question: int | str) -> float:
        """The answer to one question; see :func:`serve`.

        Raises:
            RuntimeError: The contender failed; the message is its error.
        """
        self.pipe.send(question)
        return self.answer()

    def answer(self) -> float:
        """The next answer.

        Raises:
            RuntimeError: The contender failed; the message is its error.
        """
        try:
            found = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(f"{self.name} ended with status {self.process.exitcode}") from None
        if isinstance(found, str):
            raise RuntimeError(found)
        return float(found)


def measure(
    worker: Worker, yardsticks: list[Worker], rounds: int, set5: Path | None, warm_up: int = 2
) -> dict[str, Any]:
    """Seconds per round of one contender and of the yardsticks beside it, as a result to store."""
    workers = {w.name: w for w in [*yardsticks, worker]}
    times: dict[str, list[float]] = {name: [] for name in workers}
    for index in range(rounds + warm_up):
        for name, each in workers.items():
            seconds = each.ask(index + 1)
            if index >= warm_up:
                times[name].append(seconds)
    found: dict[str, Any] = percentiles(times[worker.name])
    for name in (w.name for w in yardsticks):
        found[f"speed_vs_{name.replace(' ', '_')}"] = round(paired_ratio(times[name], times[worker.name]), 3)
    found["peak_mib"] = round(worker.ask("memory"))
    psnr = None if set5 is None else round(worker.ask("psnr"), 3)
    return {**found, "psnr_y": psnr, "seconds": times}


# --- results ----------------------------------------------------------------------------------------------------------


def run(job: Job, options: Any) -> None:
    """Measure what is not measured yet, storing after each contender."""
    other = "" if (job.size, options.threads, job.isa) == (128, 2, None) else f"-{job.size}-{options.threads}"
    other += f"-{job.isa}" if job.isa else ""
    other = "-frame" if job.frame else other
    path = options.output / f"cpu_peers_{job.model}{other}.jsonl"
    set5 = options.set5 if job.model == "dat-light" else None
    about, known = read_results(path)
    rows = {row["contender"]: row for row in known}
    missing = [name for name in options.contenders if "p50_ms" not in rows.get(name, {})]
    if not missing:
        return
    about |= {"model": f"{job.model} x{SCALE}", "image": [1, 3, *job.image_size], "rounds": options.rounds}
    about |= {"tile": job.size} if job.frame else {}
    about |= {"isa": job.isa} if job.isa else {}
    about |= {"calibration_crops": job.crop_count, **environment(PACKAGES)}
    with ExitStack() as stack:
        start = partial(Worker, job=job, set5=set5, threads=options.threads)
        yardsticks: dict[str, Worker] = {}
        for name in options.yardsticks:
            try:
                yardsticks[name] = stack.enter_context(closing(start(name)))
            except RuntimeError as error:
                rows[name] = {"contender": name, "error": str(error)}
        for name in missing:
            with ExitStack() as own:
                try:
                    worker = yardsticks.get(name) or own.enter_context(closing(start(name)))
                    # one tile has warmed a frame's contender up
                    row = measure(worker, list(yardsticks.values()), options.rounds, set5, 0 if job.frame else 2)
                except (RuntimeError, OSError) as error:
                    row = {"error": str(error)}
            rows[name] = {"contender": name, **row}
            write_results(path, about, rows.values())
            print({k: v for k, v in rows[name].items() if k != "seconds"}, flush=True)


def markdown(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The results as a table with what they were measured on."""
    machine = ", ".join(f"{key} {about.get(key)}" for key in ("cpu", "threads", "torch", *PACKAGES))
    lines = []
    for row in rows:
        cells = {"contender": row["contender"], "p20 ms": row.get("error", "")}
        if "error" not in row:
            cells |= {f"{p} ms": f"{row[f'{p}_ms']:.1f}" for p in ("p20", "p50", "p80")}
            speeds = {y: row.get(f"speed_vs_{y}".replace(" ", "_")) for y in YARDSTICKS}
            cells |= {f"vs {y}": f"{speed:.2f}" for y, speed in speeds.items() if speed is not None}
            cells["MiB"] = str(row["peak_mib"])
            cells["PSNR dB"] = "" if row["psnr_y"] is None else f"{row['psnr_y']:.3f}"
        lines.append(cells)
    columns = ["contender", "p20 ms", "p50 ms", "p80 ms", *_RATIOS, "MiB", "PSNR dB"]
    table = pd.DataFrame(lines, columns=columns).fillna("")
    tiles = f" in tiles of {about['tile']}" if "tile" in about else ""
    held = f", held to {about['isa']}" if about.get("isa") else ""
    threads = f", threads {about['threads']}" if "threads" in about else ""
    head = f"## {about['model']}, {about['image'][3]}x{about['image'][2]} input{tiles}{threads}{held}"
    return f"{head}\n\n{machine}; {about['rounds']} rounds.\n\n{markdown_table(table)}"


@styled
def chart(about: dict[str, Any], rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of the speed against float32 eager, the PSNR beside them."""
    rows = [row for row in reversed(rows) if "p50_ms" in row]
    figure = new_figure(7.0, 0.32 * len(rows) + 0.9)
    axis = figure.subplots()
    names, speeds = ([row[key] for row in rows] for key in ("contender", "speed_vs_float32_eager"))
    colours = ["#c2410c" if name.startswith("harmoq") else "#94a3b8" for name in names]
    bars = axis.barh(names, speeds, color=colours)
    quality = ("" if row["psnr_y"] is None else f", {row['psnr_y']:.2f} dB" for row in rows)
    labels = [f" {speed:.2f}x{decibels}" for speed, decibels in zip(speeds, quality, strict=True)]
    axis.bar_label(bars, labels, fontsize=8)
    axis.margins(x=0.3, y=0.02)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel(f"speed against float32 eager, {about['model']}, {about['threads']} threads")
    save_figure(figure, path)


def write_pages(folder: Path) -> str:
    """Markdown and charts of all results in a folder; returns the Markdown."""
    pages = ["# Whole models on a CPU"]
    for path in sorted(folder.glob("cpu_peers_*.jsonl")):
        about, known = read_results(path)
        rows = [row for name in CONTENDERS for row in known if row["contender"] == name]
        pages.append(markdown(about, rows))
        if path.stem.removeprefix("cpu_peers_") in MODELS:  # at the usual size, with all threads
            chart(about, rows, path.with_suffix(".png"))
    text = "\n\n".join(pages) + "\n"
    write_text(folder / "cpu_peers.md", text)
    return text


def main() -> None:
    """Measure, and write JSON lines, Markdown and a chart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, action="append")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--frame", action="store_true", help="a frame of 1280x720 in tiles of the size")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--contenders", type=lambda text: text.split(";"), default=list(CONTENDERS), help="A;B;C")
    parser.add_argument("--yardsticks", type=lambda text: text.split(";"), default=list(YARDSTICKS), help="A;B")
    parser.add_argument("--set5", type=Path, help="benchmark root with HR and LR_bicubic/X2")
    parser.add_argument("--isa", choices=("avx2",), help="hold torch and our kernels to it")
    parser.add_argument("--work", type=Path, default=Path("build/cpu_peers"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.isa:  # read by the contenders' processes when they start
        for name in ("ATEN_CPU_CAPABILITY", "HARMOQ_CPU_KERNELS", "ONEDNN_MAX_CPU_ISA"):
            os.environ[name] = options.isa
    if unknown := [name for name in options.contenders + options.yardsticks if name not in CONTENDERS]:
        parser.error(f"unknown contenders: {', '.join(unknown)}; known: {'; '.join(CONTENDERS)}")
    for name in options.model or MODELS:
        run(Job(name, options.size, options.work, options.isa, options.frame), options)
    print(write_pages(options.output))


if __name__ == "__main__":
    main()

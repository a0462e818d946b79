"""`harmoq quantize`: a float checkpoint and photographs in, a saved model out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

import harmoq_ao
from harmoq_ao.cli.common import FloatDtype, app, err, join_ranks, out, summary
from harmoq_ao.common.choices import METHODS, PRESET_NAMES
from harmoq_ao.common.errors import ConfigError, shown
from harmoq_ao.common.output import check_output_file, make_folder

if TYPE_CHECKING:
    from torch import Tensor

    from harmoq_ao import EncodedImage, LoadedModel, PreparedModel, SiteRule
    from harmoq_ao.baselines.sensitivity import Measured

_RULE = re.compile(r"(?P<sites>.+):[Ww](?P<weight>[0-9]{1,4})[Aa](?P<act>[0-9]{1,4})")
_MEASURED_CROPS = 6  # of held-out photographs, for the losses of mixed precision
_MEASURED_SIDE = 48  # at most: every site runs these crops at every bit width
_KINDS = ("linear", "matmul", "conv2d")


@app.command()
def quantize(
    ctx: typer.Context,
    checkpoint: Annotated[
        str,
        typer.Argument(help="A .pth or .safetensors that spandrel recognizes, a folder of transformers, or demo:x2."),
    ],
    output: Annotated[Path, typer.Argument(help="Folder for the saved model.")],
    calibration: Annotated[
        str,
        typer.Option(help="Photographs: a folder, a pattern, a list of paths (.txt), a .parquet, or hf:NAME[:SPLIT]."),
    ],
    weight_bits: Annotated[int, typer.Option(help="Bits of weights, 2 to 8; 16 or 32 leaves them in float.")] = 8,
    act_bits: Annotated[int, typer.Option(help="Bits of activations, 2 to 8; 16 or 32 leaves them in float.")] = 8,
    profile: Annotated[str, typer.Option(help="Quantization profile: deploy or paper.")] = "deploy",
    matmul_bits: Annotated[
        int | None, typer.Option(help="Bits of attention products; by default the profile's.")
    ] = None,
    conv_bits: Annotated[int, typer.Option(help="Bits of convolutions; 32 leaves them in float.")] = 32,
    observer: Annotated[str, typer.Option(help="Activation observer: minmax, percentile, mse or histogram.")] = "mse",
    joint_scale: Annotated[str, typer.Option(help="Joint scales: hso or none.")] = "hso",
    relative_maps: Annotated[
        bool,
        typer.Option(
            help="Quantize attention maps relative to the largest entry of each row, where products are quantized.",
        ),
    ] = True,
    rule: Annotated[
        list[str] | None,
        typer.Option(help="GLOB:W8A8 or KIND:W8A8, repeatable; the last that matches a site wins."),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="Mixed precision: fewest weight bits that lose at most this many dB on held-out photographs."
        ),
    ] = None,
    target_size: Annotated[
        int | None,
        typer.Option(min=1, help="Mixed precision: best weight bits for a saved model of this many bytes."),
    ] = None,
    method: Annotated[str, typer.Option(help=f"Quantization method: {', '.join(METHODS)}.")] = "harmoq",
    preset: Annotated[
        str,
        typer.Option(help=f"Amount of optimization: {', '.join(PRESET_NAMES)}; auto is none at 8 bits and fast below."),
    ] = "auto",
    crops: Annotated[
        int | None, typer.Option(min=1, help="Number of calibration crops; by default the preset's.")
    ] = None,
    crop_size: Annotated[int, typer.Option(min=8, help="Side of a calibration crop in low-resolution pixels.")] = 64,
    downscale: Annotated[
        bool,
        typer.Option(
            "--downscale/--lr",
            help="Photographs are high-resolution (default), or low-resolution already.",
        ),
    ] = True,
    weights: Annotated[
        str,
        typer.Option(help="Of a checkpoint that holds several: ema (averaged), model, or auto: ema if it is there."),
    ] = "auto",
    column: Annotated[str | None, typer.Option(help="Image column of a data set that has several.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of crops and of the observers' samples.")] = 0,
    float_dtype: Annotated[
        FloatDtype, typer.Option(help="Type of the parts that are not quantized.")
    ] = FloatDtype.float32,
    device: Annotated[str, typer.Option(help="Device of calibration and refinement: cpu, cuda or cuda:1.")] = "cpu",
) -> None:
    """Quantize a float checkpoint with a few photographs, and save it.

    Under torchrun all processes share calibration and refinement; the first one prints and saves.
    """
    from harmoq_ao.baselines.methods import check_method
    from harmoq_ao.common.devices import device_named
    from harmoq_ao.conversion.save import check_model_folder
    from harmoq_ao.harmonization.presets import preset as preset_of

    join_ranks(ctx)
    config = harmoq_ao.HarmoqConfig(  # checks the texts and says what they may be
        weight_bits,
        act_bits,
        profile,  # type: ignore[arg-type]
        matmul_bits=matmul_bits,
        conv_bits=conv_bits,
        observer=observer,  # type: ignore[arg-type]
        joint_scale=joint_scale,  # type: ignore[arg-type]
        relative_maps=relative_maps,
        rules=tuple(map(parse_rule, rule or ())),
        seed=seed,
    )
    check_method(method)
    check_model_folder(output)
    place = device_named(device)
    chosen = _preset_for(preset, weight_bits, act_bits)
    settings = preset_of(chosen)
    count = crops or settings.crops
    photographs = harmoq_ao.find_images(calibration, learned=count, column=column)
    loaded = harmoq_ao.open_float(checkpoint, weights=weights)  # type: ignore[arg-type]
    for note in loaded.notes:
        out.print(escape(f"{checkpoint}: {note}."), highlight=False, soft_wrap=True)
    loaded.model.to(place)
    learned, held_out = harmoq_ao.split_photographs(photographs, seed)
    cut = _Cutter(loaded, crop_size, loaded.scale if downscale else 1, seed)
    seen = cut(learned, count)
    mixture = None
    if max_drop is not None or target_size is not None:
        kept = cut.with_references(held_out)
        _check_mixable(method)
        mixture = harmoq_ao.mix_bits(loaded, seen, kept, config, max_drop=max_drop, max_bytes=target_size)
        config = replace(config, rules=(*config.rules, *mixture.rules()))
        out.print(mixture.describe(), highlight=False)
    progress = make_folder(output.absolute().parent) / f"{output.name}.progress.safetensors"
    check_output_file(progress)
    prepared = harmoq_ao.prepare_with(
        method,
        loaded,
        seen,
        config,
        preset=chosen,
        held_out=cut(held_out, settings.held_out) if held_out and settings.refine is not None else (),
        checkpoint=progress,
    )
    if mixture is not None:
        prepared.history = mixture.recorded(prepared.history)
    _save(prepared, output, float_dtype, loaded, f"{config.widths}, {profile}, {method}, {chosen}")
    progress.unlink(missing_ok=True)


def _preset_for(preset: str, weight_bits: int, act_bits: int) -> str:
    """The preset that `auto` stands for: at 8 bits optimization has nothing to win back."""
    if preset != "auto":
        return preset
    return "none" if min(weight_bits, act_bits) >= 8 else "fast"


@dataclass(frozen=True)
class _Cutter:
    """Cuts the crops of photographs that a model takes; for a model of one channel, their luma.

    Args:
        loaded: The float model.
        size: Side of a crop in low-resolution pixels.
        factor: Downscaling of the photographs.
        seed: Seed of the positions.
    """

    loaded: LoadedModel
    size: int
    factor: int
    seed: int

    def __call__(self, photographs: Sequence[Path | EncodedImage], count: int) -> list[Tensor]:
        """Cut ``count`` low-resolution crops `[C, size, size]`."""
        from harmoq_ao.common.progress import track

        cut = harmoq_ao.CalibrationCrops(photographs, self.size, count, self.factor, self.seed)
        return [self._channels(crop) for crop in track(cut, "Cutting crops")]

    def with_references(self, photographs: Sequence[Path | EncodedImage]) -> list[Measured]:
        """Cut crops together with their high-resolution references, to measure losses on.

        Raises:
            ConfigError: There are no photographs, or none of high resolution.
        """
        from harmoq_ao.baselines.sensitivity import Measured

        if not photographs or self.factor < 2:
            raise ConfigError(
                "Mixed precision is measured on held-out high-resolution photographs",
                found=f"{len(photographs)} held out, to be downscaled by {self.factor}",
                expected="at least two photographs, larger than the input of the model",
                remedy="leave out --lr, and give at least two photographs",
            )
        size = min(self.size, _MEASURED_SIDE)
        cut = harmoq_ao.CalibrationCrops(photographs, size, _MEASURED_CROPS, self.factor, self.seed)
        return [Measured(self._channels(cut[i]), self._channels(cut.reference(i))) for i in range(len(cut))]

    def _channels(self, crop: Tensor) -> Tensor:
        from harmoq_ao.images import luma

        return crop if self.loaded.input_channels == 3 else luma(crop)


def _check_mixable(method: str) -> None:
    if method != "harmoq":
        raise ConfigError(
            "Mixed precision takes its sensitivities from HarmoQ's calibration",
            found=f"--method {method}",
            expected="--method harmoq",
        )


def _save(prepared: PreparedModel, output: Path, dtype: FloatDtype, loaded: LoadedModel, settings: str) -> None:
    """Convert, save and summarize on the first rank; the others wait."""
    from harmoq_ao.common.distributed import is_first, wait_for_all

    if not is_first():
        wait_for_all()
        return
    with err.status("Converting to integers"):
        quantized = harmoq_ao.convert_harmoq(prepared, float_dtype=dtype.torch).cpu()
    harmoq_ao.save_quantized(quantized, output)
    wait_for_all()
    size, reference = harmoq_ao.folder_bytes(output), harmoq_ao.float_bytes(loaded.model)
    title = f"[bold]{escape(str(output))}[/]: {loaded.architecture} x{loaded.scale}, {settings}"
    out.print(title, soft_wrap=True)
    out.print(summary(quantized.report()), highlight=False)
    out.print(f"{size:,} bytes, {reference / size:.2f}x smaller than {reference:,} bytes of float32", highlight=False)


def parse_rule(text: str) -> SiteRule:
    """Parse `GLOB:W8A8`, or a kind of site in place of the glob.

    Raises:
        ConfigError: The form is another, or bits are out of range.
    """
    match = _RULE.fullmatch(text)
    if match is None:
        raise ConfigError(
            "A rule cannot be parsed",
            found=shown(text),
            expected="GLOB:W8A8, such as '*.attn.qkv:W8A8' or 'matmul:W8A8'",
        )
    sites, weight, act = match["sites"], int(match["weight"]), int(match["act"])
    if sites in _KINDS:
        return harmoq_ao.SiteRule(kind=sites, weight_bits=weight, act_bits=act)  # type: ignore[arg-type]
    return harmoq_ao.SiteRule(sites, weight_bits=weight, act_bits=act)

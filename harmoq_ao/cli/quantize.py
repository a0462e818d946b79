"""`harmoq quantize`: a float checkpoint and photographs in, a saved model out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from harmoq_ao.baselines.methods import METHODS, check_method, prepare_with
from harmoq_ao.baselines.mixed_precision import mix_bits
from harmoq_ao.baselines.sensitivity import Measured
from harmoq_ao.cli.common import (
    FloatDtype,
    app,
    err,
    out,
    summary,
    work_together,
)
from harmoq_ao.common.devices import device_named
from harmoq_ao.common.distributed import is_first, wait_for_all
from harmoq_ao.common.errors import ConfigError, shown
from harmoq_ao.common.progress import track
from harmoq_ao.config import HarmoqConfig, JointScale, Observer, Profile, SiteRule
from harmoq_ao.conversion.convert import convert_harmoq
from harmoq_ao.conversion.save import float_bytes, folder_bytes, save_quantized
from harmoq_ao.harmonization.presets import PRESETS
from harmoq_ao.harmonization.presets import preset as preset_of
from harmoq_ao.images import (
    CalibrationCrops,
    EncodedImage,
    find_images,
    luma,
    split_photographs,
)
from harmoq_ao.runtime.upscaler import open_float

_RULE = re.compile(r"(?P<sites>.+):[Ww](?P<weight>[0-9]{1,4})[Aa](?P<act>[0-9]{1,4})")
_MEASURED_CROPS = 6  # of photographs kept aside, to measure bits by need on
_MEASURED_SIDE = 48  # at most; every site runs them at every width
_KINDS = ("linear", "matmul", "conv2d")


@app.command()
def quantize(
    ctx: typer.Context,
    checkpoint: Annotated[str, typer.Argument(help="A .pth or .safetensors that spandrel knows, or demo:x2, x3, x4.")],
    output: Annotated[Path, typer.Argument(help="Folder for the saved model.")],
    calibration: Annotated[
        str,
        typer.Option(help="Photographs: a folder, a pattern, a list of paths (.txt), a .parquet, or hf:NAME[:SPLIT]."),
    ],
    weight_bits: Annotated[int, typer.Option(help="2 to 8; 16 or 32 is off.")] = 8,
    act_bits: Annotated[int, typer.Option(help="2 to 8; 16 or 32 is off.")] = 8,
    profile: Annotated[str, typer.Option(help="deploy or paper.")] = "deploy",
    matmul_bits: Annotated[int | None, typer.Option(help="Attention products; the profile chooses.")] = None,
    conv_bits: Annotated[int, typer.Option(help="Convolutions; 32 leaves them in float.")] = 32,
    observer: Annotated[str, typer.Option(help="minmax, percentile, mse or histogram.")] = "mse",
    joint_scale: Annotated[str, typer.Option(help="hso, search or none.")] = "hso",
    relative_maps: Annotated[
        bool,
        typer.Option(
            "--relative-maps",
            help="Attention maps relative to their rows' largest entries, where products are quantized.",
        ),
    ] = False,
    rule: Annotated[
        list[str] | None, typer.Option(help="GLOB:W8A8 or KIND:W8A8, repeatable; the last that matches a site wins.")
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(help="Fewest weight bits per site that lose at most so many dB on photographs kept aside."),
    ] = None,
    target_size: Annotated[
        int | None, typer.Option(min=1, help="Best weight bits per site for a saved model of so many bytes.")
    ] = None,
    method: Annotated[str, typer.Option(help=f"{', '.join(METHODS)}.")] = "harmoq",
    preset: Annotated[
        str,
        typer.Option(help=f"How much optimisation: {', '.join(PRESETS)}; auto is none at 8 bits and fast below."),
    ] = "auto",
    crops: Annotated[int | None, typer.Option(min=1, help="Number of calibration crops; the preset's choice.")] = None,
    crop_size: Annotated[int, typer.Option(min=8, help="Side of a crop in low-resolution pixels.")] = 64,
    downscale: Annotated[
        bool,
        typer.Option("--downscale/--lr", help="Photographs are high-resolution (default), or low-resolution already."),
    ] = True,
    column: Annotated[str | None, typer.Option(help="A data set's column of images, where it has several.")] = None,
    seed: Annotated[int, typer.Option(help="Of the crops and of the observers' samples.")] = 0,
    float_dtype: Annotated[
        FloatDtype, typer.Option(help="Type of the parts that are not integers.")
    ] = FloatDtype.float32,
    device: Annotated[str, typer.Option(help="Where to calibrate and refine: cpu, cuda, or cuda:1.")] = "cpu",
) -> None:
    """Quantize a float checkpoint with a few photographs, and save it.

    Under torchrun the processes share calibration and refinement; the first one prints and writes.
    """
    work_together(ctx)
    config = _config(
        weight_bits=weight_bits,
        act_bits=act_bits,
        profile=profile,
        matmul_bits=matmul_bits,
        conv_bits=conv_bits,
        observer=observer,
        joint_scale=joint_scale,
        relative_maps=relative_maps,
        rules=tuple(map(parse_rule, rule or ())),
        seed=seed,
    )
    check_method(method)
    place = device_named(device)
    chosen = _preset_for(preset, weight_bits, act_bits)
    settings = preset_of(chosen)
    count = crops or settings.crops
    photographs = find_images(calibration, learned=count, column=column)
    loaded = open_float(checkpoint)
    loaded.model.to(place)
    learned, held_out = split_photographs(photographs, seed)
    factor = loaded.scale if downscale else 1
    cut = partial(_crops, loaded=loaded, size=crop_size, factor=factor, seed=seed)
    seen = cut(learned, count)
    mixture = None
    if max_drop is not None or target_size is not None:
        kept = _with_references(held_out, loaded, min(crop_size, _MEASURED_SIDE), factor, seed)
        mixture = mix_bits(loaded, seen, kept, _mixable(config, method), max_drop=max_drop, max_bytes=target_size)
        config = replace(config, rules=(*config.rules, *mixture.rules()))
        out.print(mixture.describe(), highlight=False)
    progress = output.with_name(f"{output.name}.progress.safetensors")
    prepared = prepare_with(
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
    if not is_first():
        wait_for_all()
        return
    with err.status("Converting to integers"):
        quantized = convert_harmoq(prepared, float_dtype=float_dtype.torch).cpu()
    save_quantized(quantized, output)
    progress.unlink(missing_ok=True)
    wait_for_all()
    report = quantized.report()
    size, reference = folder_bytes(output), float_bytes(loaded.model)
    out.print(
        f"[bold]{escape(str(output))}[/]: {loaded.architecture} x{loaded.scale}, {config.widths}, {profile}, "
        f"{method}, {chosen}",
        soft_wrap=True,
    )
    out.print(summary(report), highlight=False)
    out.print(f"{size:,} bytes, {reference / size:.2f}x smaller than {reference:,} bytes of float32", highlight=False)


def _preset_for(preset: str, weight_bits: int, act_bits: int) -> str:
    """`auto`: 8 bits lose nothing that optimisation could win back."""
    if preset != "auto":
        return preset
    return "none" if min(weight_bits, act_bits) >= 8 else "fast"


def _crops(
    photographs: Sequence[Path | EncodedImage], count: int, *, loaded: Any, size: int, factor: int, seed: int
) -> list[Any]:
    """Crops for a model; for one of a single channel their luma."""
    cut = CalibrationCrops(photographs, size, count, factor, seed)
    return [crop if loaded.input_channels == 3 else luma(crop) for crop in track(cut, "Cutting crops")]


def _with_references(
    photographs: Sequence[Path | EncodedImage], loaded: Any, size: int, factor: int, seed: int
) -> list[Measured]:
    """Crops with what the photographs have in their place, to measure losses on."""
    if not photographs or factor < 2:
        raise ConfigError(
            "Bits by need are chosen on high-resolution photographs that are kept aside",
            found=f"{len(photographs)} kept aside, made low-resolution by {factor}",
            expected="two photographs or more, larger than what the model takes",
            remedy="leave out --lr, and give two photographs or more",
        )
    cut = CalibrationCrops(photographs, size, _MEASURED_CROPS, factor, seed)
    gray = loaded.input_channels == 1
    pairs = [(cut[i], cut.reference(i)) for i in range(len(cut))]
    return [Measured(luma(x), luma(y)) if gray else Measured(x, y) for x, y in pairs]


def _mixable(config: HarmoqConfig, method: str) -> HarmoqConfig:
    """Sensitivities are those of HarmoQ's calibration."""
    if method != "harmoq":
        raise ConfigError("Bits by need are HarmoQ's", found=f"--method {method}", expected="--method harmoq")
    return config


def parse_rule(text: str) -> SiteRule:
    """`GLOB:W8A8` (or a kind of site for the glob) as a rule.

    Raises:
        ConfigError: Another form, or bits out of range.
    """
    match = _RULE.fullmatch(text)
    if match is None:
        raise ConfigError(
            "A rule is not readable",
            found=shown(text),
            expected="GLOB:W8A8, such as '*.attn.qkv:W8A8' or 'matmul:W8A8'",
        )
    sites, weight, act = match["sites"], int(match["weight"]), int(match["act"])
    if sites in _KINDS:
        return SiteRule(kind=sites, weight_bits=weight, act_bits=act)  # type: ignore[arg-type]
    return SiteRule(sites, weight_bits=weight, act_bits=act)


def _config(*, profile: str, observer: str, joint_scale: str, **settings: Any) -> HarmoqConfig:
    """Text options are checked by the configuration itself, which says what it would have taken."""
    chosen: tuple[Profile, Observer, JointScale] = (profile, observer, joint_scale)  # type: ignore[assignment]
    return HarmoqConfig(profile=chosen[0], observer=chosen[1], joint_scale=chosen[2], **settings)

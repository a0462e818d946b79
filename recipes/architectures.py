"""Small random-weight instances of every architecture of spandrel 0.4.2 that multiplies matrices outside convolutions.

An entry is complete enough to exercise all code paths of its architecture (shifted and unshifted windows, every
attention kind, every sampler that matters) and small enough to run in about a second on one core. The coverage table
and the tests go through this list, so a new architecture is covered by adding one entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import nn

Size = tuple[int, int]


@dataclass(frozen=True)
class Architecture:
    """One architecture at toy size.

    Attributes:
        name: Architecture id of spandrel, with a variant after a slash where there are several.
        arguments: Keyword arguments of the constructor.
        sizes: Image sizes `(height, width)` the float model takes: three, of which the last is no multiple of the
            attention window, unless `multiple` or `notes` say that the original refuses such sizes.
        channels: Channels of the input image.
        batches: Batch sizes the float model takes.
        multiple: Every side must be a multiple of this; 1 where the original pads by itself.
        notes: What a reader should know about this entry.
        cls: Name of the class where it is not that of the architecture.
    """

    name: str
    arguments: Mapping[str, object]
    sizes: tuple[Size, ...] = ((16, 16), (16, 24), (19, 13))
    channels: int = 3
    batches: tuple[int, ...] = (1, 3)
    multiple: int = 1
    notes: str = ""
    cls: str = ""

    def build(self, seed: int = 0) -> nn.Module:
        """Build the model in evaluation mode; the same seed always gives the same weights."""
        package = self.name.partition("/")[0]
        constructor = getattr(import_module(f"spandrel.architectures.{package}"), self.cls or package)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = constructor(**self.arguments)
            _perturb_constants(model)
        model.eval()
        return model

    def example(self, size: Size | None = None, batch: int = 1, seed: int = 0) -> torch.Tensor:
        """Random image `[batch, channels, height, width]` in `[0, 1)`; the first size by default."""
        height, width = size or self.sizes[0]
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(batch, self.channels, height, width, generator=generator)


@torch.no_grad()
def forward(model: nn.Module, image: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Run `model` on `image` `[B, C, H, W]` and return the image it makes.

    The random state is fixed because AuraSR draws noise in its forward; architectures that return a tuple put the image
    first.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        output = model(image)
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def _perturb_constants(model: nn.Module) -> None:
    """Move parameters off their constant initial values.

    Several architectures start residual scales, temperatures and norms at exactly 0 or 1: a branch multiplied by zero,
    or a forgotten norm, would pass every comparison of outputs.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):
            parameter.add_(0.1 * torch.randn_like(parameter))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.add_(0.1 * torch.randn_like(module.running_mean))
            module.running_var.mul_(0.5 + torch.rand_like(module.running_var))


_SWIN = {"img_size": 16, "embed_dim": 12, "depths": [2, 2], "num_heads": [2, 2], "window_size": 8, "mlp_ratio": 2.0}
_DAT = {"img_size": 16, "embed_dim": 16, "expansion_factor": 2.0, "upscale": 2}

ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture("SwinIR/light", {**_SWIN, "upscale": 2, "upsampler": "pixelshuffledirect"}),
    Architecture(
        "SwinIR/classical",
        {**_SWIN, "upscale": 2, "upsampler": "pixelshuffle", "resi_connection": "3conv", "ape": True},
        sizes=((16, 16), (13, 16), (11, 13)),
        notes="absolute position embedding: only images that pad to img_size",
    ),
    Architecture("SwinIR/real", {**_SWIN, "upscale": 4, "upsampler": "nearest+conv"}),
    Architecture("Swin2SR", {**_SWIN, "upscale": 2, "upsampler": "pixelshuffledirect"}),
    Architecture(
        "HAT",
        {**_SWIN, "upscale": 2, "upsampler": "pixelshuffle", "compress_ratio": 3, "squeeze_factor": 6, "num_feat": 16},
    ),
    Architecture(
        "DAT", {**_DAT, "split_size": [4, 8], "depth": [4, 2], "num_heads": [2, 2], "upsampler": "pixelshuffle"}
    ),
    Architecture(
        "DAT/light",
        {
            **_DAT,
            "split_size": [8, 16],
            "depth": [3],
            "num_heads": [2],
            "resi_connection": "3conv",
            "upsampler": "pixelshuffledirect",
        },
    ),
    Architecture(
        "ATD",
        {
            **_SWIN,
            "upscale": 2,
            "upsampler": "pixelshuffledirect",
            "category_size": 32,
            "num_tokens": 8,
            "reducted_dim": 4,
        },
    ),
    Architecture(
        "DRCT",
        {**_SWIN, "upscale": 2, "upsampler": "pixelshuffle", "gc": 6},
        sizes=((16, 16), (16, 24), (40, 32)),
        multiple=8,
    ),
    Architecture(
        "RGT",
        {
            "img_size": 16,
            "embed_dim": 12,
            "depth": [4, 2],
            "num_heads": [2, 2],
            "mlp_ratio": 2.0,
            "upscale": 2,
            "split_size": [4, 8],
        },
        sizes=((16, 16), (16, 24), (67, 21)),
        notes="sides of at least 16; one more recursion of its reduction from 64 on",
    ),
    Architecture(
        "CRAFT",
        {
            "embed_dim": 12,
            "depths": [2, 2],
            "num_heads": [2, 2],
            "window_size": 8,
            "split_size_0": 4,
            "split_size_1": 8,
            "upscale": 2,
        },
    ),
    Architecture(
        "GRL",
        {
            "img_size": 16,
            "embed_dim": 32,
            "upscale": 2,
            "upsampler": "pixelshuffledirect",
            "depths": [2, 2],
            "num_heads_window": [2, 2],
            "num_heads_stripe": [2, 2],
            "window_size": 8,
            "stripe_size": [8, 16],
            "stripe_shift": True,
            "anchor_window_down_factor": 4,
            "local_connection": True,
            "mlp_ratio": 2.0,
        },
    ),
    Architecture("OmniSR", {"num_feat": 16, "block_num": 1, "res_num": 2, "up_scale": 2, "window_size": 8}),
    Architecture("SCUNet", {"dim": 64, "config": [2, 1, 1, 2, 1, 1, 1]}, sizes=((64, 64), (64, 128), (70, 50))),
    Architecture(
        "Uformer",
        {
            "img_size": 64,
            "embed_dim": 8,
            "depths": [2, 1, 1, 1, 2, 1, 1, 1, 2],
            "num_heads": [1, 2, 4, 4, 4, 4, 4, 2, 1],
            "win_size": 4,
            "modulator": True,
        },
        sizes=((64, 64), (128, 128), (192, 192)),
        multiple=64,
        notes="square images only",
    ),
    Architecture(
        "FDAT", {"scale": 2, "embed_dim": 16, "num_groups": 1, "depth_per_group": 1, "num_heads": 2, "mid_dim": 16}
    ),
    Architecture("DITN", {"dim": 12, "ITL_blocks": 1, "SAL_blocks": 2, "UFONE_blocks": 1, "upscale": 2}),
    Architecture(
        "IPT",
        {"patch_size": 12, "patch_dim": 3, "n_feats": 4, "rgb_range": 1, "scale": [2], "num_heads": 4, "num_layers": 1},
        sizes=((12, 12),),
        multiple=12,
        notes="its forward takes patches of exactly patch_size",
    ),
    Architecture(
        "RestoreFormer",
        {
            "n_embed": 16,
            "embed_dim": 32,
            "ch": 32,
            "ch_mult": (1, 2),
            "num_res_blocks": 1,
            "attn_resolutions": (16,),
            "resolution": 32,
            "z_channels": 32,
            "head_size": 2,
        },
    ),
    Architecture(
        "KBNet/l",
        {"dim": 24, "num_blocks": [1, 1, 1, 1], "num_refinement_blocks": 1, "heads": [1, 2, 2, 4]},
        cls="KBNet_l",
        sizes=((16, 16), (16, 24), (40, 32)),
        multiple=8,
    ),
    Architecture(
        "KBNet/s", {"width": 8, "middle_blk_num": 1, "enc_blk_nums": [1, 1], "dec_blk_nums": [1, 1]}, cls="KBNet_s"
    ),
    Architecture("DCTLSA", {"nf": 20, "num_modules": 6, "upscale": 2, "num_head": 5}),
    Architecture(
        "RetinexFormer",
        {"n_feat": 8, "stage": 2, "num_blocks": [1, 1, 1]},
        sizes=((16, 16), (16, 24), (40, 32)),
        multiple=8,
    ),
    Architecture(
        "HVICIDNet",
        {"channels": [8, 8, 16, 32], "heads": [1, 2, 4, 8]},
        sizes=((16, 16), (16, 24), (40, 32)),
        multiple=8,
    ),
    Architecture(
        "AuraSR",
        {
            "dim": 8,
            "image_size": None,
            "input_image_size": None,
            "init_dim": 8,
            "style_network": {"dim_in": 8, "dim_out": 16, "depth": 2},
            "up_dim_mults": (1, 1, 2, 2, 2),
            "down_dim_mults": (2, 2, 2),
            "full_attn": (False, False, False, True, True),
            "self_attn_dim_head": 8,
            "self_attn_heads": 2,
            "attn_depths": (1, 1, 1, 1, 1),
            "mid_attn_depth": 1,
            "num_conv_kernels": 2,
        },
        sizes=((16, 16), (16, 24), (40, 32)),
        multiple=8,
        notes="adds random noise to its input in forward",
    ),
    Architecture(
        "SeemoRe",
        {"scale": 2, "embedding_dim": 16, "num_layers": 2, "num_experts": 3},
        sizes=((16, 16), (16, 24), (19, 21)),
        batches=(1,),
        notes="linear router only; its experts mix up batches",
    ),
    Architecture(
        "MMRealSR",
        {
            "num_in_ch": 3,
            "num_out_ch": 3,
            "num_feat": 8,
            "num_block": 1,
            "num_grow_ch": 4,
            "num_feats": [8, 8, 8, 8],
            "num_blocks": [1, 1, 1, 1],
        },
    ),
    Architecture("FBCNN", {"nc": [8, 8, 8, 512], "nb": 1}),
    Architecture(
        "GFPGAN",
        {"out_size": 32, "num_style_feat": 16, "narrow": 0.0625, "channel_multiplier": 1},
        sizes=((32, 32),),
        multiple=32,
        notes="one size only; adds random noise in forward; linears make styles only",
    ),
)

CONVOLUTIONAL = (
    *("Compact", "DRUNet", "DnCNN", "ESRGAN", "FFTformer", "LaMa", "MixDehazeNet", "MoESR", "MoSR"),
    *("NAFNet", "PLKSR", "RCAN", "RealCUGAN", "SAFMN", "SAFMNBCIE", "SPAN", "SwiftSRGAN"),
)
"""Ids of spandrel's other architectures: everything they multiply goes through convolutions (FFTformer: and FFTs)."""

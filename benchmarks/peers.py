"""Float models prepared for one image size, as whoever wants them fast would prepare them.

SwinIR, HAT and DAT make the masks of their shifted windows anew in every call unless the image has the size they were
built for (HAT: always). They make them on the CPU, in the way of CUDA graphs, and SwinIR makes them in float32, which
its attention refuses in a model of bfloat16. Masks depend on nothing but the size, so here they are made once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from spandrel.architectures.DAT import DAT
from spandrel.architectures.DAT.__arch.DAT import Adaptive_Spatial_Attention
from spandrel.architectures.HAT import HAT
from spandrel.architectures.SwinIR import SwinIR
from spandrel.architectures.SwinIR.__arch.SwinIR import SwinTransformerBlock, WindowAttention
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

Run = Callable[[Tensor], Tensor]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Core = Callable[[Tensor, "Tensor | None", float], Attend]
_KIND = ("window_size", "split_size", "shift_size")


def swinir_light(scale: int) -> nn.Module:
    """SwinIR-light with random weights."""
    return SwinIR(
        upscale=scale, img_size=64, window_size=8, depths=[6] * 4, embed_dim=60, num_heads=[6] * 4, mlp_ratio=2,
        upsampler="pixelshuffledirect",
    )  # fmt: skip


def hat_s(scale: int) -> nn.Module:
    """HAT-S with random weights."""
    return HAT(
        upscale=scale, img_size=64, patch_size=1, window_size=16, depths=(6,) * 6, embed_dim=144, num_heads=(6,) * 6,
        compress_ratio=24, squeeze_factor=24, conv_scale=0.01, overlap_ratio=0.5, mlp_ratio=2, img_range=1.0,
        upsampler="pixelshuffle", resi_connection="1conv",
    )  # fmt: skip


def dat_light(scale: int) -> nn.Module:
    """DAT-light with random weights."""
    return DAT(
        upscale=scale, img_size=64, split_size=[8, 32], depth=[18], embed_dim=60, num_heads=[6], expansion_factor=2,
        resi_connection="3conv", upsampler="pixelshuffledirect",
    )  # fmt: skip


def for_size(model: nn.Module, size: Sequence[int]) -> nn.Module:
    """Change a SwinIR, HAT or DAT so that it finds its masks ready; others are left as they are.

    Args:
        model: In its final type, on its final device.
        size: Height and width of the images that it will take, in pixels.

    Returns:
        The model itself.
    """
    masks = _Masks(next(iter(model.parameters())))
    for module in model.modules():
        mean = vars(module).get("mean")
        if isinstance(mean, Tensor):  # no buffer: it would move with the first image
            module.mean = masks.as_weights(mean)
        if isinstance(module, SwinTransformerBlock):
            module.input_resolution = _padded(size, module.window_size)  # the size of the mask it stores
            if module.shift_size:
                module.attn_mask = masks(module, module.input_resolution)
        elif isinstance(module, HAT):
            mask = masks(module, _padded(size, module.window_size), masks.like.dtype)
            module.register_buffer("attn_mask", mask, persistent=False)
            module.calculate_mask = MethodType(_hat_mask, module)
        elif isinstance(module, Adaptive_Spatial_Attention) and module.attn_mask_0 is not None:
            module.attn_mask_0, module.attn_mask_1 = masks(module, *_padded(size, max(module.split_size)))
            module.calculate_mask = MethodType(_dat_masks, module)
    return model


def bfloat16_run(model: Run) -> Run:
    """A model of bfloat16 as a function from float32 to float32."""
    return lambda x: model(x.bfloat16()).float()


def padded_attention(model: nn.Module, core: Core) -> nn.Module:
    """Change a SwinIR so that its window attention is one call of `core`, on heads padded to 16 channels.

    Fused kernels want a multiple of 8 or a power of two; SwinIR-light has 10. The padding lies in the weights of qkv
    and proj, so it costs no operator.

    Args:
        model: In its final type, on its final device, after :func:`for_size`.
        core: :func:`sdpa` or :func:`flex`.

    Returns:
        The model itself.
    """
    for module in model.modules():
        if isinstance(module, SwinTransformerBlock):
            module.attn = PaddedAttention(module.attn, module.attn_mask, core)
    return model


class PaddedAttention(nn.Module):
    """SwinIR's `WindowAttention` with padded heads, its relative position bias looked up once.

    Args:
        author: The attention it computes.
        mask: `[nW, N, N]` of the shifted windows, or None.
        core: Makes scores, softmax and values of q, k and v `[windows, heads, N, 16 k]`.
    """

    def __init__(self, author: WindowAttention, mask: Tensor | None, core: Core) -> None:
        super().__init__()
        self.heads = author.num_heads
        size = author.dim // self.heads
        wide = -(-size // 16) * 16
        with torch.no_grad():
            self.qkv = nn.Linear(author.dim, 3 * self.heads * wide).to(author.qkv.weight)
            self.qkv.weight.copy_(_padded_heads(author.qkv.weight, size, wide))
            self.qkv.bias.copy_(_padded_heads(author.qkv.bias, size, wide))
            self.proj = nn.Linear(self.heads * wide, author.dim).to(author.proj.weight)
            self.proj.weight.copy_(_padded_heads(author.proj.weight.T, size, wide).T)
            self.proj.bias.copy_(author.proj.bias)
            tokens = author.window_size[0] * author.window_size[1]
            table = author.relative_position_bias_table[author.relative_position_index.flatten()]
            bias = table.view(tokens, tokens, self.heads).permute(2, 0, 1).contiguous()
        self.attend = core(bias, mask, float(author.scale))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Windows `[W, N, C]`, as the author's; the mask was known when this was made."""
        windows, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(windows, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        out: Tensor = self.proj(self.attend(q, k, v).transpose(1, 2).reshape(windows, tokens, -1))
        return out


def sdpa(bias: Tensor, mask: Tensor | None, scale: float) -> Attend:
    """Torch's fused attention; bias and mask are added up once, as it takes one tensor."""
    both = bias[None] if mask is None else bias[None] + mask[:, None]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        images = 1 if mask is None else len(q) // len(mask)
        return F.scaled_dot_product_attention(q, k, v, both.repeat(images, 1, 1, 1), scale=scale)

    return attend


def flex(bias: Tensor, mask: Tensor | None, scale: float) -> Attend:
    """Torch's generated attention: bias and mask are looked up for each score."""

    def plain(score: Tensor, window: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + bias[head, query, key]

    def masked(score: Tensor, window: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert mask is not None
        return score + bias[head, query, key] + mask[window % len(mask), query, key]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found: Any = flex_attention(q, k, v, score_mod=plain if mask is None else masked, scale=scale)
        return found

    return attend


def _padded_heads(rows: Tensor, size: int, wide: int) -> Tensor:
    """Rows `[heads * size, ...]` with zeros up to `[heads * wide, ...]`."""
    padded = rows.new_zeros(len(rows) // size, wide, *rows.shape[1:])
    padded[:, :size] = rows.unflatten(0, (-1, size))
    return padded.flatten(0, 1)


def torchao_int8(model: nn.Module) -> nn.Module:
    """The model itself, its linears at 8 bits by torchao: weights by row, activations by token."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    def fits(module: nn.Module, _: str) -> bool:  # torchao 0.18 fails on DAT's position biases, [3, 1]
        return isinstance(module, nn.Linear) and module.in_features > 1

    quantize_(model, Int8DynamicActivationInt8WeightConfig(), filter_fn=fits)
    return model


class _Masks:
    """What ``calculate_mask`` gives, once for all blocks of a kind, in the type and on the device of the weights."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self._made: dict[str, Any] = {}

    def __call__(self, module: Any, *given: Any) -> Any:
        kind = repr([getattr(module, name, None) for name in _KIND])
        if kind not in self._made:
            found = module.calculate_mask(*given)
            pair = isinstance(found, tuple)
            self._made[kind] = tuple(map(self.as_weights, found)) if pair else self.as_weights(found)
        return self._made[kind]

    def as_weights(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.like.device, self.like.dtype)


def _padded(size: Sequence[int], multiple: int) -> tuple[int, ...]:
    return tuple(-(-side // multiple) * multiple for side in size)


def _hat_mask(module: Any, *_: Any, **__: Any) -> Tensor:
    return module.attn_mask


def _dat_masks(module: Any, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return module.attn_mask_0, module.attn_mask_1

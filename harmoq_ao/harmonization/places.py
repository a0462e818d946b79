"""Where gradient steps look: parts of crops, drawn by how much the float network adds to interpolation there.

A quantized network loses most where the float network achieves most, and most places of a photograph are not of that
kind: there it hardly differs from interpolation, quantized or not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from harmoq_ao.common import distributed
from harmoq_ao.common.progress import track
from harmoq_ao.harmonization.sampling import mirrored
from harmoq_ao.harmonization.teacher import FloatNetwork

_MIRRORINGS = 8
_STRIDE = 1_000_003  # between the generators of two seeds


class Places:
    """Parts of crops at random places, mirrored at random.

    A place is drawn with a probability in proportion to the `focus`-th power of the mean of `worth` over it. The draws
    of a step are stratified, one from each n-th of the distribution, so that its images differ.

    Args:
        crops: Images `[C, H, W]` of one size.
        worth: A number, 0 or more, for every pixel of every crop, `[n, H, W]`.
        side: Of the parts; None takes whole crops.
        focus: 0 draws all places alike.
        seed: Of the draws.
    """

    def __init__(self, crops: Sequence[Tensor], worth: Tensor, side: int | None, focus: float, seed: int) -> None:
        self.crops, self.seed = crops, seed
        height, width = worth.shape[1:]
        self.part = (height, width) if side is None else (min(side, height), min(side, width))
        means = F.avg_pool2d(worth.double()[:, None], self.part, stride=1)[:, 0]
        self.grid = means.shape[1:]
        weights = means.flatten() ** focus
        if not float(weights.sum()) > 0:  # nothing is worth more than anything else
            weights = torch.ones_like(weights)
        cumulative = weights.cumsum(0)
        self.cumulative = cumulative / cumulative[-1]  # ends with exactly 1, which no draw reaches

    def draw(self, step: int, count: int) -> list[Tensor]:
        """The `count` images of a step."""
        generator = torch.Generator().manual_seed(self.seed * _STRIDE + 7919 * step)
        strata = (torch.arange(count) + torch.rand(count, generator=generator, dtype=torch.float64)) / count
        chosen = torch.searchsorted(self.cumulative, strata, right=True).tolist()
        turns = torch.randint(_MIRRORINGS, (count,), generator=generator).tolist()
        return [mirrored(self.at(place), turn) for place, turn in zip(chosen, turns, strict=True)]

    def at(self, place: int) -> Tensor:
        """The part of a crop at a place by its number."""
        rows, columns = self.grid
        index, place = divmod(place, rows * columns)
        top, left = divmod(place, columns)
        height, width = self.part
        return self.crops[index][:, top : top + height, left : left + width]


@torch.no_grad()
def added_detail(network: FloatNetwork, crops: Sequence[Tensor], show_progress: bool | None = None) -> Tensor:
    """Squared difference of the float network's output and bicubic interpolation of its input, for every input pixel.

    Of several ranks each computes a share; all get the same.

    Args:
        network: The float network.
        crops: Images `[C, H, W]` of one size.
        show_progress: Show a progress bar; by default where standard error is a terminal.

    Returns:
        Means over channels and over the outputs of a pixel, `[n, H, W]`. 0 at the lower and right margin of crops whose
        sides are no multiples of what the network takes.
    """
    like = next(p for p in network.parameters() if p.is_floating_point())
    found = torch.zeros(len(crops), *crops[0].shape[1:], device=like.device)
    with distributed.own_share():
        for index, crop in enumerate(track(crops, "Weighing places", show=show_progress)):
            if distributed.is_mine(index):
                part = _accepted(network, crop)
                found[index, : part.shape[1], : part.shape[2]] = _added(network, part[None].to(like))
    return distributed.all_sum(found).cpu()


def _added(network: FloatNetwork, image: Tensor) -> Tensor:
    output = network.image(image).float()
    interpolated = F.interpolate(image.float(), size=output.shape[-2:], mode="bicubic", align_corners=False)
    height, width = image.shape[-2:]
    return F.adaptive_avg_pool2d((output - interpolated).square().mean(1), (height, width))[0]


def _accepted(network: FloatNetwork, crop: Tensor) -> Tensor:
    """The upper left part of `[C, H, W]` whose sides the network takes; a side shorter than any of those stays."""
    multiple = network.traits.size_multiple
    height, width = (max(side // multiple, 1) * multiple for side in crop.shape[1:])
    if network.traits.square:
        height = width = min(height, width)
    return crop[:, :height, :width]

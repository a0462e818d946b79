"""Inputs of sites: captured from the float network, and visited while the quantized one runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from harmoq_ao.common.errors import CalibrationError
from harmoq_ao.harmonization.run_until import run_until_stopped, stop_forward
from harmoq_ao.harmonization.teacher import FloatNetwork
from harmoq_ao.images import check_image_tensor
from harmoq_ao.sites.attention import PreparedAttention, decomposed_attention
from harmoq_ao.sites.base import PreparedSite
from harmoq_ao.sites.model import PreparedModel

Keep = Callable[[PreparedSite, tuple[Tensor, ...]], tuple[Tensor, ...]]
"""Selects what to keep of the arguments of a site's first call."""
_ATTENTION = inspect.signature(PreparedAttention.forward)


@torch.no_grad()
def capture_inputs(
    model: FloatNetwork, image: Tensor, paths: Iterable[str], keep: Keep, limit: int
) -> dict[str, tuple[Tensor, ...]]:
    """Inputs of the first sites of `paths` to run in one forward pass, by path, in the order of their first calls.

    Args:
        model: The float network.
        image: Image batch `[B, C, H, W]`.
        paths: Paths of the sites wanted.
        keep: Selects what is kept.
        limit: Bytes after which the forward pass ends; at least one site is captured. The rest is for the next call.
    """
    wanted = set(paths)
    kept: dict[str, tuple[Tensor, ...]] = {}

    def hook(site: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(site, PreparedSite)
        path = site.site.path
        if path in kept:
            return
        if _bytes(kept.values()) >= limit:
            stop_forward()
        kept[path] = keep(site, args)

    sites = [s for s in model.sites() if s.site.path in wanted]
    with _pre_hooks(sites, hook), _products_of_attention(model, sites):
        run_until_stopped(model, image)
    return kept


@torch.no_grad()
def visit_inputs(
    model: PreparedModel, image: Tensor, paths: Iterable[str], visit: Callable[[PreparedSite, tuple[Tensor, ...]], None]
) -> None:
    """Run the quantized network, call `visit` just before the first call of each site, and end after the last one.

    What `visit` changes about its site takes effect in that very call, so later sites see it.

    Args:
        model: The prepared model, fake-quantization on.
        image: Image batch `[B, C, H, W]`.
        paths: Paths of the sites to visit.
        visit: Takes the site and the arguments of its call.
    """
    left = set(paths)
    if not left:
        return

    def hook(site: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(site, PreparedSite)
        # A trial of a graph runs in float, to be repeated; only then is a site with active quantizers inactive.
        if site.site.path not in left or not site._active():
            return
        left.discard(site.site.path)
        visit(site, args)
        if not left:
            stop_forward()

    with _pre_hooks([s for s in model.sites() if s.site.path in left], hook):
        run_until_stopped(model, image)


def common_batch(batches: Sequence[Tensor], most: int) -> Tensor:
    """The first images of all batches as one batch; where sizes differ, their middles at the smallest size.

    Args:
        batches: Image batches `[B, C, H, W]`, or images `[C, H, W]`.
        most: Largest number of images.

    Raises:
        CalibrationError: No images.
        InputError: Not image batches.
    """
    images: list[Tensor] = []
    for batch in batches:
        batch = batch[None] if batch.dim() == 3 else batch
        check_image_tensor(batch)
        images += batch.split(1)
        if len(images) >= most:
            break
    if not images:
        raise CalibrationError("No calibration images", found="no batch", expected="at least one image batch")
    images = images[:most]
    height, width = (min(image.shape[axis] for image in images) for axis in (2, 3))
    return torch.cat([_middle(image, height, width) for image in images])


def _middle(image: Tensor, height: int, width: int) -> Tensor:
    top, left = (image.shape[2] - height) // 2, (image.shape[3] - width) // 2
    return image[:, :, top : top + height, left : left + width]


def _bytes(kept: Iterable[tuple[Tensor, ...]]) -> int:
    return sum(t.numel() * t.element_size() for tensors in kept for t in tensors)


@contextmanager
def _products_of_attention(model: nn.Module, sites: Iterable[PreparedSite]) -> Iterator[None]:
    """Context manager that also runs fused attention as its two products, if they are among `sites`.

    In float it calls no site, so nothing would be captured.
    """

    def hook(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(attention, PreparedAttention)
        call = _ATTENTION.bind(attention, *args, **kwargs)
        call.apply_defaults()
        operands = (call.arguments[name] for name in ("query", "key", "value", "attn_mask", "scale"))
        decomposed_attention(attention.qk, attention.av, *operands)

    wanted = {id(site) for site in sites}
    fused = [m for m in model.modules() if isinstance(m, PreparedAttention) and {id(m.qk), id(m.av)} & wanted]
    with ExitStack() as hooks:
        for module in fused:
            hooks.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield


@contextmanager
def _pre_hooks(sites: Iterable[PreparedSite], hook: Callable[[nn.Module, tuple[Any, ...]], None]) -> Iterator[None]:
    with ExitStack() as hooks:
        for site in sites:
            hooks.enter_context(site.register_forward_pre_hook(hook))
        yield

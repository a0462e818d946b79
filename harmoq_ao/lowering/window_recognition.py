"""Recognition of islands that are a whole window attention, from qkv to projection, by trials (see `probing`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harmoq_ao.graph import Variant
from harmoq_ao.graph.proxies import GuardFailed
from harmoq_ao.lowering.fusing import Misfit
from harmoq_ao.lowering.probing import Call, Stand, probe, random_results, uneven_results, zero_results
from harmoq_ao.sites.quantized import QuantizedMatmul

_MASKS = 2  # windows of an image that a trial has
_LARGE = 2.0**60  # beside such a score, what is added to it is lost in rounding, and its factor is read exactly
_TOLERANCE = 1e-6  # of float32, relative to the largest term


@dataclass(frozen=True)
class WindowAttention:
    """The window attention that an island computes.

    Attributes:
        qkv: Name of the linear before: rows ordered `[q, k, v]`, each `[heads, head_dim]`.
        proj: Name of the linear after.
        qkv_bias: `[3 C]` that the call of the linear before adds to its result, or None.
        proj_bias: `[O]` likewise of the linear after.
        products: Names of the score and value products where they are sites, else None.
        heads: Number of heads.
        head_dim: Channels of a head.
        cosine: Whether queries and keys are divided by their lengths.
        scale_after: Whether quantized queries are rounded before they are scaled.
        scale: `[heads]` factor of the scores.
        bias: `[heads, N, N]` added to the scores, or None.
        image: Place of the tokens `[windows, N, C]` among the leaves.
        mask: Place of the mask `[nW, N, N]`, or None.
    """

    qkv: str
    proj: str
    qkv_bias: Tensor | None
    proj_bias: Tensor | None
    products: tuple[str, str] | None
    heads: int
    head_dim: int
    cosine: bool
    scale_after: bool
    scale: Tensor
    bias: Tensor | None
    image: int
    mask: int | None


def find_window_attention(module: nn.Module, variant: Variant, leaves: list[Any]) -> WindowAttention:
    """Recognise a window attention.

    Args:
        module: A converted island.
        variant: One of its graphs.
        leaves: Arguments of a call that the graph fits.

    Raises:
        Misfit: Not a window attention, or not one that the kernels compute; the message explains why.
    """
    image, mask = _roles(leaves)
    trial = _Trial(module, variant, leaves, image, mask)
    run = trial.run(random_results(2))
    sites = _sites(module, run)
    heads, head_dim = _heads(run)
    cosine, before, after = _factors(trial, run, heads, head_dim)
    scale_after = bool((after != 1).any())
    if sites is not None and (cosine or scale_after) and bool((before != 1).any()):
        raise Misfit("its quantized queries are scaled at another place than the kernel's")
    found = WindowAttention(
        run.qkv.name,
        run.proj.name,
        _added_after(run.qkv),
        _added_after(run.proj),
        sites,
        heads,
        head_dim,
        cosine,
        scale_after,
        before * after,
        _bias(trial, heads),
        image,
        mask,
    )
    for confirmation in (run, trial.run(uneven_results(3), images=3)):
        _confirm(found, confirmation, before, after)
    return found


def _roles(leaves: list[Any]) -> tuple[int, int | None]:
    """Places of tokens and mask among the leaves; all others must be tables of integers."""
    floats = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    others = [leaf for i, leaf in enumerate(leaves) if i not in floats]
    if any(not isinstance(leaf, Tensor) or leaf.is_floating_point() for leaf in others):
        raise Misfit("it takes numbers beside tensors")
    if not 1 <= len(floats) <= 2 or any(leaves[i].dim() != 3 for i in floats):
        raise Misfit(f"it takes {len(floats)} tensors, not tokens [windows, N, C] and a mask [nW, N, N]")
    if len(floats) == 2 and leaves[floats[1]].shape[1:] != (leaves[floats[0]].shape[1],) * 2:
        raise Misfit(f"its second tensor is no mask: {tuple(leaves[floats[1]].shape)}")
    return floats[0], floats[1] if len(floats) == 2 else None


# --- trials -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """The calls of one trial: two linears, and between them one attention, in one call or in two products.

    Attributes:
        qkv: The linear before.
        scores: The score product, or the attention in one call.
        softmax: The softmax, or None where the attention is one call.
        values: The value product, or the attention in one call.
        proj: The linear after.
        output: What the graph returned.
        tokens: What it was given, `[windows, N, C]`.
        mask: `[nW, N, N]`, or None.
    """

    qkv: Call
    scores: Call
    softmax: Call | None
    values: Call
    proj: Call
    output: Any
    tokens: Tensor
    mask: Tensor | None

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, transposed keys and values, as the products take them."""
        query, key = self.scores.inputs[:2]
        return query, key, self.values.inputs[1 if self.softmax else 2]


class _Trial:
    """A graph to be run with stand-ins for its contractions, on few windows, of other tokens in every run."""

    def __init__(self, module: nn.Module, variant: Variant, leaves: list[Any], image: int, mask: int | None) -> None:
        self.module, self.variant, self.leaves, self.image, self.mask = module, variant, leaves, image, mask
        self.generator = torch.Generator().manual_seed(1)
        self.device = leaves[image].device

    def run(self, stand: Stand, masked: bool = True, images: int = 2) -> _Run:
        """One run on the windows of some images, with a mask of zeros if it is not `masked`.

        Raises:
            Misfit: The graph cannot be tried, or holds other contractions than those of an attention.
        """
        leaves = list(self.leaves)
        tokens = leaves[self.image] = self._random(images * _MASKS, *leaves[self.image].shape[1:])
        mask = None
        if self.mask is not None:
            mask = leaves[self.mask] = self._random(_MASKS, *leaves[self.mask].shape[1:]) * masked
        try:
            calls, output = probe(self.module, self.variant.graph, leaves, lambda *s: stand(*s).to(self.device))
        except GuardFailed as error:
            raise Misfit(f"its graph is for one number of windows: {error}") from error
        except Exception as error:  # whatever an author's code does with other shapes than its own
            raise Misfit(f"its graph cannot be tried: {error}") from error
        return _in_order(calls, output, tokens, mask)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device)


def _in_order(calls: list[Call], output: Any, tokens: Tensor, mask: Tensor | None) -> _Run:
    linears = [c for c in calls if c.kind == "linear"]
    products = [c for c in calls if c.kind in ("matmul", "attention")]
    if len(linears) != 2 or calls[0] is not linears[0] or calls[-1] is not linears[1]:
        raise Misfit(f"{len(linears)} linears where an attention of its own qkv and projection has 2")
    kinds = [c.kind for c in calls[1:-1]]
    if kinds not in (["attention"], ["matmul", "softmax", "matmul"]):
        raise Misfit("its products are not one attention: " + (", ".join(c.kind for c in products) or "none"))
    softmax = calls[2] if len(kinds) == 3 else None
    return _Run(linears[0], products[0], softmax, products[-1], linears[1], output, tokens, mask)


def _sites(module: nn.Module, run: _Run) -> tuple[str, str] | None:
    products = [run.scores, run.values] if run.softmax else []
    quantized = [isinstance(module.get_submodule(c.name), QuantizedMatmul) for c in products]
    if any(quantized) and not all(quantized):
        raise Misfit("one of its products is quantized, the other is not")
    return (run.scores.name, run.values.name) if any(quantized) else None


def _heads(run: _Run) -> tuple[int, int]:
    values = run.operands[2]
    if values.dim() != 4 or 3 * values.shape[1] * values.shape[3] != run.qkv.output.shape[-1]:
        raise Misfit(f"values {tuple(values.shape)} are no heads of qkv's {run.qkv.output.shape[-1]} channels")
    return values.shape[1], values.shape[3]


def _added_after(linear: Call) -> Tensor | None:
    """What a call of a linear adds to its result, `[channels]`."""
    added = linear.inputs[1] if len(linear.inputs) > 1 else None
    if added is not None and added.shape != linear.output.shape[-1:]:
        raise Misfit(f"{linear.name} adds a tensor {tuple(added.shape)} to its result")
    return added


def _parts(qkv: Call, heads: int, head_dim: int) -> Tensor:
    """q, k and v `[3, windows, heads, N, head_dim]`."""
    return qkv.output.unflatten(-1, (3, heads, head_dim)).permute(2, 0, 3, 1, 4)


# --- its constants ----------------------------------------------------------------------------------------------------


def _factors(trial: _Trial, run: _Run, heads: int, head_dim: int) -> tuple[bool, Tensor, Tensor]:
    """Whether scores are cosines, and `[heads]` factors of the queries and of the scores.

    Queries of length one along the first channel show their factor as it is, normalised or not; large scores show
    theirs, whatever is added to them.
    """

    def unit(kind: str, shape: tuple[int, ...]) -> Tensor:
        if kind != "linear":
            return torch.full(shape, _LARGE)
        channels = torch.arange(shape[-1]) % head_dim == 0
        return channels.float().expand(shape)

    shown = trial.run(unit, masked=False)
    queries = shown.operands[0]
    if queries.dim() != 4 or queries.shape[1] != heads or queries.shape[3] != head_dim:
        raise Misfit(f"queries {tuple(queries.shape)} are not those of {heads} heads of {head_dim} channels")
    before = queries[0, :, 0, 0]
    after = torch.ones_like(before)
    if shown.softmax is not None:
        scores = shown.softmax.inputs[0]
        if scores.dim() != 4 or scores.shape[1] != heads:
            raise Misfit(f"scores {tuple(scores.shape)} are not those of {heads} heads")
        after = scores[0, :, 0, 0] / _LARGE
    raw = _parts(run.qkv, heads, head_dim)[0]
    cosine = not _agree(run.operands[0], raw * before[:, None, None])
    return cosine, before, after


def _bias(trial: _Trial, heads: int) -> Tensor | None:
    """What is added to the scores of every window: read where scores and mask are zero."""
    run = trial.run(zero_results, masked=False)
    added = run.softmax.inputs[0] if run.softmax is not None else run.scores.inputs[3]
    if added is None or not bool((added != 0).any()):
        return None
    added = _spread(added, (len(run.operands[0]), heads, run.operands[0].shape[2], run.operands[1].shape[-1]))
    if not torch.equal(added, added[:1].expand_as(added)):
        raise Misfit("its position bias differs between windows")
    return added[0].contiguous()


# --- whether that is all ----------------------------------------------------------------------------------------------


def _confirm(found: WindowAttention, run: _Run, before: Tensor, after: Tensor) -> None:
    """Compare every operand of a run with what the kernel computes.

    Raises:
        Misfit: One differs.
    """
    q, k, v = _parts(run.qkv, found.heads, found.head_dim)
    if found.cosine:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    queries, keys, values = run.operands
    mixed = run.values.output
    checks: dict[str, tuple[Any, Tensor]] = {
        "qkv's input": (run.qkv.inputs[0], run.tokens),
        "the queries": (queries, q * before[:, None, None]),
        "the keys": (keys, k.transpose(-2, -1)),
        "the values": (values, v),
        "the projection's input": (run.proj.inputs[0], mixed.transpose(1, 2).flatten(2)),
        "the output": (run.output, run.proj.output),
    }
    for name, call, constant in (
        ("qkv's bias", run.qkv, found.qkv_bias),
        ("the projection's bias", run.proj, found.proj_bias),
    ):
        if constant is not None:
            checks[name] = (_added_after(call), constant)
    for name, (actual, expected) in checks.items():
        if not _agree(actual, expected):
            raise Misfit(f"{name} are computed in another way")
    _confirm_scores(found, run, after)


def _confirm_scores(found: WindowAttention, run: _Run, after: Tensor) -> None:
    """The same of bias, mask and softmax.

    Raises:
        Misfit: One differs.
    """
    shape = (*run.operands[0].shape[:3], run.operands[1].shape[-1])
    added = _added(found, run, shape)
    if run.softmax is None:
        present = run.scores.inputs[3]
        if not _agree(_spread(torch.zeros(()) if present is None else present, shape), added):
            raise Misfit("the bias and the mask are added in another way")
        return
    product = run.scores.output * after[:, None, None]
    scores = run.softmax.inputs[0]
    if not _agree(scores, product + added, product.abs() + added.abs() + 1):
        raise Misfit("the scores are computed in another way")
    if not _agree(run.values.inputs[0], torch.softmax(scores, -1)):
        raise Misfit("the attention map is computed in another way")


def _added(found: WindowAttention, run: _Run, shape: tuple[int, ...]) -> Tensor:
    """Bias and mask, of the scores' shape `[windows, heads, N, N]`."""
    added = torch.zeros(shape, device=run.tokens.device)
    if found.bias is not None:
        added = added + found.bias
    if run.mask is not None:
        added = (added.unflatten(0, (-1, _MASKS)) + run.mask[:, None]).flatten(0, 1)
    return added


def _spread(added: Tensor, shape: tuple[int, ...]) -> Tensor:
    try:
        return added.broadcast_to(shape)
    except RuntimeError as error:
        raise Misfit(f"what is added to its scores {shape} has the shape {tuple(added.shape)}") from error


def _agree(actual: Any, expected: Tensor, size: Tensor | None = None) -> bool:
    """Whether two tensors are equal up to the rounding of float32 values of that size."""
    if not isinstance(actual, Tensor) or actual.shape != expected.shape:
        return False
    size = 1 + expected.abs() if size is None else size
    return bool(((actual - expected).abs() <= _TOLERANCE * size).all())

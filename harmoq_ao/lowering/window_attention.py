"""Islands that are a whole window attention, from qkv to projection, and the fused kernel that runs them on GPUs."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from harmoq_ao.errors import KernelError
from harmoq_ao.lowering.fusing import Misfit, is_recognising, runs_triton
from harmoq_ao.lowering.probing import Call, constants, probe, random_results, zero_results
from harmoq_ao.modules.quantized import QuantizedLinear, QuantizedMatmul
from harmoq_ao.tracing.proxies import GuardFailed
from harmoq_ao.tracing.tracer import Variant

_MASKS = 2  # windows of an image that a trial has


@dataclass(frozen=True)
class WindowAttention:
    """What an island was found to compute.

    Attributes:
        qkv: Name of the linear before: rows ordered `[q, k, v]`, each `[heads, head_dim]`.
        proj: Name of the linear after.
        products: Names of the score and value products where they are sites, else None.
        heads: Number of heads.
        head_dim: Channels of a head.
        scale: Factor of the queries.
        bias: `[heads, N, N]` added to the scores, or None.
        image: Place of the tokens `[windows, N, C]` among the leaves.
        mask: Place of the mask `[nW, N, N]`, or None.
    """

    qkv: str
    proj: str
    products: tuple[str, str] | None
    heads: int
    head_dim: int
    scale: float
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
        Misfit: It is none, or not one that the kernels compute; says why.
    """
    image, mask = _roles(leaves)
    trial = _Trial(module, variant, leaves, image, mask)
    calls = trial.calls
    linears = [c for c in calls if c.kind == "linear"]
    products = [c for c in calls if c.kind in ("matmul", "attention")]
    if len(linears) != 2 or calls[0] is not linears[0] or calls[-1] is not linears[1]:
        raise Misfit(f"{len(linears)} linears where an attention of its own qkv and projection has 2")
    if [c.kind for c in products] not in (["attention"], ["matmul", "matmul"]):
        raise Misfit("its products are not one attention: " + ", ".join(c.kind for c in products))
    found = WindowAttention(
        linears[0].name,
        linears[1].name,
        _sites(module, products),
        *_heads(linears[0], products),
        _scale(trial, linears[0], products[0]),
        _bias(trial, products[0].kind),
        image,
        mask,
    )
    _confirm(found, trial)
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


class _Trial:
    """A graph run with random contractions, on few windows."""

    def __init__(self, module: nn.Module, variant: Variant, leaves: list[Any], image: int, mask: int | None) -> None:
        self.module, self.variant, self.image = module, variant, image
        tokens, channels = leaves[image].shape[1:]
        generator = torch.Generator().manual_seed(1)
        self.leaves = [leaf.cpu() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.leaves[image] = torch.randn(2 * _MASKS, tokens, channels, generator=generator)
        self.mask: Tensor | None = None
        if mask is not None:
            self.mask = torch.randn(_MASKS, tokens, tokens, generator=generator)
            self.leaves[mask] = self.mask
        self._mask_at = mask
        self.calls, self.output = self._run(random_results(2))

    def without_scores(self) -> list[Call]:
        """The calls where all contractions and the mask are zero."""
        leaves = list(self.leaves)
        if self._mask_at is not None:
            leaves[self._mask_at] = torch.zeros_like(leaves[self._mask_at])
        return self._run(zero_results, leaves)[0]

    def _run(self, stand: Any, leaves: list[Any] | None = None) -> tuple[list[Call], Any]:
        try:
            return probe(self.module, self.variant.graph, leaves or self.leaves, stand)
        except GuardFailed as error:
            raise Misfit(f"its graph is for one number of windows: {error}") from error
        except RuntimeError as error:  # such as a graph whose constants lie on another device
            raise Misfit(f"its graph cannot be tried: {error}") from error


def _sites(module: nn.Module, products: list[Call]) -> tuple[str, str] | None:
    quantized = [isinstance(module.get_submodule(c.name), QuantizedMatmul) for c in products if c.name]
    if any(quantized) and not all(quantized):
        raise Misfit("one of its products is quantized, the other is not")
    return (products[0].name, products[1].name) if any(quantized) else None


def _heads(qkv: Call, products: list[Call]) -> tuple[int, int]:
    value = products[0].inputs[2] if products[0].kind == "attention" else products[1].inputs[1]
    if value.dim() != 4 or 3 * value.shape[1] * value.shape[3] != qkv.output.shape[-1]:
        raise Misfit(f"values {tuple(value.shape)} are no heads of qkv's {qkv.output.shape[-1]} channels")
    return value.shape[1], value.shape[3]


def _parts(qkv: Call, heads: int, head_dim: int) -> Tensor:
    """q, k and v `[3, windows, heads, N, head_dim]`."""
    return qkv.output.unflatten(-1, (3, heads, head_dim)).permute(2, 0, 3, 1, 4)


def _scale(trial: _Trial, qkv: Call, scores: Call) -> float:
    query = scores.inputs[0]
    raw = _parts(qkv, query.shape[1], query.shape[3])[0] if query.dim() == 4 else query
    for factor in constants(trial.variant.graph):
        if raw.shape == query.shape and torch.equal(raw * factor, query):
            return factor
    raise Misfit("its queries are not qkv's first third times a constant")


def _bias(trial: _Trial, kind: str) -> Tensor | None:
    """What is added to the scores of every window: read where scores and mask are zero."""
    calls = trial.without_scores()
    if kind == "attention":
        added = next(c.inputs[3] for c in calls if c.kind == "attention")
    else:
        maps = [c.inputs[0] for c in calls if c.kind == "softmax"]
        if len(maps) != 1:
            raise Misfit(f"{len(maps)} softmaxes")
        added = maps[0]
    if added is None or not bool((added != 0).any()):
        return None
    table = added if added.dim() == 3 else added[0]
    if not torch.equal(table.expand_as(added), added):
        raise Misfit("its position bias differs between windows")
    return table.contiguous()


def _confirm(found: WindowAttention, trial: _Trial) -> None:
    """Compare every operand with what the kernel computes.

    Raises:
        Misfit: One differs.
    """
    calls, tokens = trial.calls, trial.leaves[trial.image]
    qkv, proj = calls[0], calls[-1]
    q, k, v = _parts(qkv, found.heads, found.head_dim)
    attention = next(c for c in calls if c.kind in ("attention", "matmul"))
    checks = {
        "qkv's input": (qkv.inputs[0], tokens),
        "the queries": (attention.inputs[0], q * found.scale),
        "the keys": (attention.inputs[1], k.transpose(-2, -1)),
        "the output": (trial.output, proj.output),
    }
    added = _added(found, trial)
    if attention.kind == "attention":
        mixed, values = attention, attention.inputs[2]
        present = attention.inputs[3]
        checks["the bias"] = (added if present is None else present.expand_as(added), added)
    else:
        mixed = [c for c in calls if c.kind == "matmul"][1]
        values = mixed.inputs[1]
        checks["the attention map"] = (mixed.inputs[0], torch.softmax(attention.output + added, -1))
    checks["the values"] = (values, v)
    checks["the projection's input"] = (proj.inputs[0], mixed.output.transpose(1, 2).flatten(2))
    for name, (actual, expected) in checks.items():
        close = isinstance(actual, Tensor) and actual.shape == expected.shape
        if not close or not torch.allclose(actual, expected, rtol=1e-6, atol=1e-6):
            raise Misfit(f"{name} are computed in another way")


def _added(found: WindowAttention, trial: _Trial) -> Tensor:
    """Bias and mask `[windows, heads, N, N]`."""
    windows, tokens = trial.leaves[trial.image].shape[:2]
    added = torch.zeros(windows, found.heads, tokens, tokens)
    if found.bias is not None:
        added = added + found.bias
    if trial.mask is not None:
        added = (added.unflatten(0, (-1, _MASKS)) + trial.mask[:, None]).flatten(0, 1)
    return added


# --- running it -------------------------------------------------------------------------------------------------------


def lower_attention(module: nn.Module, variant: Variant) -> Variant:
    """The same variant, which runs the fused kernel where its sites choose Triton and it is a window attention.

    Args:
        module: The converted island.
        variant: One of its graphs, in its final form.
    """
    if isinstance(variant.run, LoweredAttention):
        return variant
    names = [n for n, m in module.named_modules() if isinstance(m, QuantizedLinear) and m.both_quantized]
    return replace(variant, run=LoweredAttention(variant, names[0])) if names else variant


_KEY = "_harmoq_attention"
_numbers = itertools.count()


@dataclass
class _State:
    """What one island knows of one of its graphs.

    Attributes:
        reason: Why the kernel does not take it.
        found: What it computes.
        packed: The kernels' operands.
        seen: Tensors that `packed` was made from, with their versions; held, so that no other takes their identity.
        shapes: Shapes that were tried.
    """

    reason: str | None = None
    found: WindowAttention | None = None
    packed: Any = None
    seen: tuple[tuple[Tensor, int], ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()


class LoweredAttention:
    """Runs a graph, or the fused kernel in its place. What it finds is kept with the island, and copied with it.

    Args:
        variant: The graph.
        first: Name of the linear whose backend decides.
    """

    def __init__(self, variant: Variant, first: str) -> None:
        self.variant = variant
        self.first = first
        self.number = next(_numbers)

    def __call__(self, module: nn.Module, *leaves: Any) -> Any:
        """The graph's result for these leaves."""
        trying = is_recognising()
        asked = trying or runs_triton(module.get_submodule(self.first), leaves)
        taken = asked and self.recognise(module, list(leaves))
        return _launch(self.state(module), leaves) if taken and not trying else self.variant.run(module, *leaves)

    def state(self, module: nn.Module) -> _State:
        """What an island knows of this graph."""
        known: dict[int, _State] = module.__dict__.setdefault(_KEY, {})
        return known.setdefault(self.number, _State())

    def sites(self, module: nn.Module) -> tuple[str, ...]:
        """Names of the sites that the kernel computes, within the island; none where it does not take it."""
        found = self.state(module).found
        return () if found is None else (found.qkv, found.proj, *(found.products or ()))

    def recognise(self, module: nn.Module, leaves: list[Any]) -> bool:
        """Whether the kernel takes a call; tried once for each window size and set of weights."""
        state, shapes = self.state(module), _shapes(leaves)
        if torch.compiler.is_compiling():  # no trial: what an eager call found
            return state.found is not None and state.shapes == shapes
        tensors = _tensors(module, leaves)
        if state.found is not None and state.shapes == shapes and _unchanged(state.seen, tensors):
            return True
        if state.reason is not None:
            return False
        try:
            state.found = find_window_attention(module, self.variant, leaves)
            device = next(leaf.device for leaf in leaves if isinstance(leaf, Tensor))
            state.packed = pack_attention(module, state.found, device)
        except (Misfit, KernelError) as error:
            state.reason, state.found = str(error), None
            return False
        state.shapes, state.seen = shapes, tuple((t, t._version) for t in tensors)
        return True


def _launch(state: _State, leaves: tuple[Any, ...]) -> Tensor:
    from harmoq_ao.triton_kernels import ops, window_attention

    assert state.found is not None
    tokens, place = leaves[state.found.image], state.found.mask
    mask = None if place is None else leaves[place].to(tokens.dtype).contiguous()
    compute = torch.bfloat16 if tokens.dtype == torch.bfloat16 else torch.float16
    if torch.compiler.is_compiling():
        return ops.window_attention(tokens, state.packed, mask=mask, compute=compute)
    return window_attention.launch_window_attention(tokens, state.packed, mask=mask, compute=compute)


def _tensors(module: nn.Module, leaves: list[Any]) -> list[Tensor]:
    """What the kernels' operands are made from: weight codes, and tables among the arguments."""
    linears = [m for m in module.modules() if isinstance(m, QuantizedLinear) and m.both_quantized]
    tables = [t for t in leaves if isinstance(t, Tensor) and not t.is_floating_point()]
    return [*(m.codes for m in linears), *tables]


def _unchanged(seen: tuple[tuple[Tensor, int], ...], tensors: list[Tensor]) -> bool:
    same_count = len(seen) == len(tensors)
    return same_count and all(k is t and v == t._version for (k, v), t in zip(seen, tensors, strict=True))


def _shapes(leaves: list[Any]) -> tuple[tuple[int, ...], ...]:
    """Shapes of tensors but for the number of windows."""
    return tuple(tuple(leaf.shape[1:]) for leaf in leaves if isinstance(leaf, Tensor))


def pack_attention(module: nn.Module, found: WindowAttention, device: torch.device) -> Any:
    """The kernels' operands of a recognised attention.

    Raises:
        KernelError: The kernels do not take its shapes or bounds.
    """
    from harmoq_ao.triton_kernels import attention_operands as kernels

    def linear(name: str) -> tuple[Any, Tensor, int]:
        site = module.get_submodule(name)
        assert isinstance(site, QuantizedLinear)
        if not site.both_quantized:
            raise KernelError(f"{name} has a float operand")
        return site.operands(), site.codes, site.settings.weight.bits

    matmuls = None
    if found.products is not None:
        scores, values = (module.get_submodule(name) for name in found.products)
        assert isinstance(scores, QuantizedMatmul)
        assert isinstance(values, QuantizedMatmul)
        matmuls = kernels.MatmulQuantizers(*scores.operands(), *values.operands())
    return kernels.pack_attention(
        linear(found.qkv),
        linear(found.proj),
        found.heads,
        found.head_dim,
        torch.full((found.heads,), found.scale, device=device),
        bias=None if found.bias is None else found.bias.to(device),
        matmuls=matmuls,
    )

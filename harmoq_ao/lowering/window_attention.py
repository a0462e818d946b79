"""Islands that are a whole window attention, and the fused kernel that runs them on GPUs."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from harmoq_ao.common.errors import KernelError
from harmoq_ao.graph.tracer import Variant
from harmoq_ao.lowering.attention_core import product_quantizers
from harmoq_ao.lowering.attention_matching import WindowAttention, find_window_attention
from harmoq_ao.lowering.fusing import Misfit, is_recognising, runs_triton
from harmoq_ao.lowering.probing import read_constants
from harmoq_ao.sites.quantized import QuantizedLinear, QuantizedMatmul, QuantizedSite


def lower_attention(module: nn.Module, variant: Variant) -> Variant:
    """The same variant, which runs the fused kernel where its sites choose Triton and it is a window attention.

    Args:
        module: The converted island.
        variant: One of its graphs, in its final form.
    """
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
        tensors = _tensors(module, self.variant.graph, leaves)
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


def _tensors(module: nn.Module, graph: fx.Graph, leaves: list[Any]) -> list[Tensor]:
    """What the kernels' operands are made from: tensors of sites, constants of the graph, tables given as arguments."""
    stored = [b for m in module.modules() if isinstance(m, QuantizedSite) for b in m.buffers(recurse=False)]
    tables = [t for t in leaves if isinstance(t, Tensor) and not t.is_floating_point()]
    return [*stored, *read_constants(module, graph), *tables]


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

    def linear(name: str, added: Tensor | None) -> tuple[Any, Tensor, int]:
        site = module.get_submodule(name)
        assert isinstance(site, QuantizedLinear)
        if not site.both_quantized:
            raise KernelError(f"{name} has a float operand")
        operands = site.operands()
        if added is not None:
            bias = added.float().to(device)
            operands = replace(operands, bias=bias if operands.bias is None else operands.bias + bias)
        return operands, site.codes, site.settings.weight.bits

    matmuls = None
    if found.products is not None:
        scores, values = (module.get_submodule(name) for name in found.products)
        assert isinstance(scores, QuantizedMatmul)
        assert isinstance(values, QuantizedMatmul)
        matmuls = product_quantizers(scores, values)
    return kernels.pack_attention(
        linear(found.qkv, found.qkv_bias),
        linear(found.proj, found.proj_bias),
        found.heads,
        found.head_dim,
        found.scale.float().to(device),
        bias=None if found.bias is None else found.bias.to(device),
        cosine=found.cosine,
        scale_after=found.scale_after,
        matmuls=matmuls,
    )

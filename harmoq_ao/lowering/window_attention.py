"""Islands that are a whole window attention, and the fused kernel that runs them on GPUs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from harmoq_ao.common.errors import KernelError
from harmoq_ao.graph import Variant
from harmoq_ao.graph.exchange import Finding
from harmoq_ao.graph.variant import DECLINED
from harmoq_ao.lowering.attention_core import product_quantizers
from harmoq_ao.lowering.fusing import Misfit, is_recognising, runs_triton
from harmoq_ao.lowering.probing import read_constants
from harmoq_ao.lowering.window_recognition import WindowAttention, find_window_attention
from harmoq_ao.sites.quantized import QuantizedLinear, QuantizedMatmul, QuantizedSite


def lower_window_attention(module: nn.Module, variant: Variant) -> Variant:
    """The same variant, which runs the fused kernel where its sites choose Triton and it is a window attention.

    Args:
        module: The converted island.
        variant: One of its graphs, in its final form.
    """
    names = [n for n, m in module.named_modules() if isinstance(m, QuantizedLinear) and m.both_quantized]
    # A whole attention is worth more than its core: it is tried before what other passes found.
    return replace(variant, lowered=(LoweredAttention(names[0]), *variant.lowered)) if names else variant


@dataclass
class LoweredAttention:
    """The fused kernel in place of a graph that is a whole window attention.

    Args:
        first: Name of the linear whose backend decides.

    Attributes:
        reason: Why the kernel does not take the graph.
        found: What the graph computes.
        packed: The kernel's operands.
        seen: Tensors that `packed` was made from, with their versions; held, so that no other takes their identity.
        shapes: Shapes that were tried.
    """

    first: str
    reason: str | None = None
    found: WindowAttention | None = None
    packed: Any = None
    seen: tuple[tuple[Tensor, int], ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()

    def attempt(self, variant: Variant, module: nn.Module, leaves: tuple[Any, ...]) -> Any:
        """The kernel's result, if the graph is an attention and the kernel takes it."""
        trying = is_recognising()
        if not (trying or runs_triton(module.get_submodule(self.first), leaves)):
            return DECLINED
        taken = self._recognise(variant, module, list(leaves))
        return self._launch(leaves) if taken and not trying else DECLINED

    def finding(self, module: nn.Module) -> Finding | None:
        """The sites that the kernel computes; every site of the island where it refused."""
        if self.found is not None:
            names = (self.found.qkv, self.found.proj, *(self.found.products or ()))
            return Finding("triton window_attention", [module.get_submodule(name) for name in names], None)
        if self.reason is None:
            return None
        sites: list[nn.Module] = [m for m in module.modules() if isinstance(m, QuantizedSite)]
        return Finding("triton window_attention", sites, self.reason)

    def _recognise(self, variant: Variant, module: nn.Module, leaves: list[Any]) -> bool:
        """Whether the kernel takes a call; tried once for each window size and set of weights."""
        shapes = _shapes(leaves)
        if torch.compiler.is_compiling():  # no trial: what an eager call found
            return self.found is not None and self.shapes == shapes
        tensors = _tensors(module, variant.graph, leaves)
        if self.found is not None and self.shapes == shapes and _unchanged(self.seen, tensors):
            return True
        if self.reason is not None:
            return False
        try:
            self.found = find_window_attention(module, variant, leaves)
            device = next(leaf.device for leaf in leaves if isinstance(leaf, Tensor))
            self.packed = pack_attention(module, self.found, device)
        except (Misfit, KernelError) as error:
            self.reason, self.found = str(error), None
            return False
        self.shapes, self.seen = shapes, tuple((t, t._version) for t in tensors)
        return True

    def _launch(self, leaves: tuple[Any, ...]) -> Tensor:
        from harmoq_ao.triton_kernels import ops, window_attention

        assert self.found is not None
        tokens, place = leaves[self.found.image], self.found.mask
        mask = None if place is None else leaves[place].to(tokens.dtype).contiguous()
        compute = torch.bfloat16 if tokens.dtype == torch.bfloat16 else torch.float16
        if torch.compiler.is_compiling():
            return ops.window_attention(tokens, self.packed, mask=mask, compute=compute)
        return window_attention.launch_window_attention(tokens, self.packed, mask=mask, compute=compute)


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
        KernelError: The kernels do not take its shapes or quantization ranges.
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

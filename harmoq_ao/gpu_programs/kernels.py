"""Steps that our Triton kernels compute: linears, MLPs, attention, whole window attention, attention among channels.

Every module takes matrices `[rows, columns]`, whose rows are the tokens of all images. Whatever one kernel computes
together is put into it by :mod:`fusing`: the norm in front, GELU and norm behind, the residual that is added last.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from harmoq_ao.gpu_programs.operands import AttentionSpec, LayerNorm, Operands, Packed, Site, Table
from harmoq_ao.triton_kernels import ops
from harmoq_ao.triton_kernels.channel_attention import channel_attention


class Producer(nn.Module):
    """A step that can add a residual to its result, and normalise it before.

    Attributes:
        sites: The quantized linears that it computes.
        after: The norm behind it, or None.
        adds: Whether its last operand is a residual.
        width: Columns of its result.
        takes_norm: Whether it can normalise its result.
    """

    takes_norm = True

    def __init__(self, width: int, sites: tuple[Site, ...] = ()) -> None:
        super().__init__()
        self.sites, self.width = sites, width
        self.after: Packed | None = None
        self.adds = False

    def normalise(self, norm: LayerNorm) -> None:
        """Let it normalise its result."""
        self.after = Packed(norm.behind(self.width))

    def epilogue(self, residual: list[Tensor]) -> dict[str, Any]:
        """Arguments of an operator."""
        after = {} if not self.takes_norm else {"after": None if self.after is None else self.after.value}
        return {"residual": residual[0].contiguous() if self.adds else None, **after}


class Linear(Producer):
    """A quantized linear of some columns.

    Args:
        site: The linear.
        operands: Of the model.
        first: First column.
        out_dtype: Of the result.

    Attributes:
        gate: First column of what multiplies its input, in its second operand; None where nothing does.
    """

    takes_norm = False

    def __init__(self, site: Site, operands: Operands, first: int, out_dtype: torch.dtype) -> None:
        super().__init__(len(site.operands.weight), (site,))
        self.packed = operands.linear(site)
        self.first, self.columns, self.out_dtype = first, site.operands.weight.shape[1], out_dtype
        self.norm: LayerNorm | None = None
        self.gelu = "none"
        self.gate: int | None = None

    @property
    def site(self) -> Site:
        """The linear."""
        return self.sites[0]

    def behind(self, norm: LayerNorm, operands: Operands) -> None:
        """Let it normalise its input.

        Raises:
            KernelError: Its range is that of each token.
        """
        self.packed, self.norm = operands.linear(self.site, norm), norm

    def shift(self, added: Tensor, operands: Operands) -> None:
        """Add a vector to its bias."""
        old = self.site.operands
        bias = added.float() if old.bias is None else old.bias + added.float()
        self.sites = (replace(self.site, operands=replace(old, bias=bias)),)
        self.packed = operands.linear(self.site)

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        """`[rows, N]`."""
        rest = list(others)
        gate = None if self.gate is None else self._part(rest.pop(0), self.gate)
        rows = self._part(x, self.first)
        eps = None if self.norm is None else self.norm.eps
        options = {"gate": gate, "eps": eps, "gelu": self.gelu, "out_dtype": self.out_dtype, **self.epilogue(rest)}
        return ops.linear(rows, self.packed.value, **options)

    def _part(self, matrix: Tensor, first: int) -> Tensor:
        """Its columns of a matrix: the kernel takes rows at any stride."""
        part = matrix[:, first : first + self.columns]
        return part if part.stride(1) == 1 else part.contiguous()


class Mlp(Producer):
    """Linear, GELU, linear.

    Args:
        fc1: The first one; its norm and GELU are the MLP's.
        fc2: The second one.
    """

    def __init__(self, fc1: Linear, fc2: Linear) -> None:
        super().__init__(fc2.width, (fc1.site, fc2.site))
        self.fc1, self.fc2 = fc1.packed, fc2.packed
        self.eps, self.gelu = None if fc1.norm is None else fc1.norm.eps, fc1.gelu

    def forward(self, x: Tensor, *residual: Tensor) -> Tensor:
        """`[rows, N]`."""
        options = {"gelu": self.gelu, "eps": self.eps, **self.epilogue(list(residual))}
        return ops.mlp(x.contiguous(), self.fc1.value, self.fc2.value, **options)


class Windows(nn.Module):
    """Where the tokens of windows are.

    Args:
        images: Of the batch.
        index: `[nW, N]` int32, rows within an image.
        key_index: `[nW, M]`, of keys and values, where they are others.
        regions: `[nW, N]` uint8, or None.
    """

    def __init__(self, images: int, index: Table, key_index: Table | None, regions: Table | None) -> None:
        super().__init__()
        self.images, self.index, self.key_index, self.regions = images, index, key_index, regions

    def options(self) -> dict[str, Any]:
        """Arguments of an operator."""
        return {"index": self.index.tensor, "regions": None if self.regions is None else self.regions.tensor}


class AttentionCore(nn.Module):
    """Attention of given queries, keys and values.

    Args:
        spec: What it computes.
        packed: Its operands.
        windows: Where tokens are.
        firsts: First columns of queries, keys and values in their matrices.
    """

    def __init__(self, spec: AttentionSpec, packed: Packed, windows: Windows, firsts: tuple[int, int, int]) -> None:
        super().__init__()
        self.spec, self.packed, self.windows, self.firsts = spec, packed, windows, firsts
        self.heads, self.head_dim = spec.heads, spec.head_dim

    def forward(self, *matrices: Tensor) -> Tensor:
        """`[rows, heads * head_dim]`."""
        images, width = self.windows.images, self.heads * self.head_dim
        parts = []
        for matrix, first in zip(matrices, self.firsts, strict=True):
            rows = matrix.reshape(images, -1, matrix.shape[1])[:, :, first : first + width]
            parts.append(rows.unflatten(2, (self.heads, self.head_dim)))
        if parts[1].stride() != parts[2].stride():
            parts = [part.contiguous() for part in parts]
        table = self.windows.key_index
        options = {**self.windows.options(), **({} if table is None else {"key_index": table.tensor})}
        return ops.attention(parts[0], parts[1], parts[2], self.packed.value, **options).flatten(0, 1)


class ChannelAttention(nn.Module):
    """Attention among channels, whose scores are sums over the tokens of an image.

    Args:
        packed: Its operands.
        images: Size of the batch.
        firsts: First columns of queries, keys and values in their matrices.
        dtype: Of operands and result.
        products: What tells the sites of both products from others: where their first ranges lie.
    """

    def __init__(
        self,
        packed: Packed,
        images: int,
        firsts: tuple[int, int, int],
        dtype: torch.dtype,
        products: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.packed, self.images, self.firsts, self.dtype, self.products = packed, images, firsts, dtype, products

    def forward(self, *matrices: Tensor) -> Tensor:
        """`[rows, heads * width]`."""
        operands = self.packed.value
        width = operands.heads * operands.width
        parts = []
        for matrix, first in zip(matrices, self.firsts, strict=True):
            part = matrix[:, first : first + width].to(self.dtype)
            parts.append(part if part.stride(1) == 1 else part.contiguous())
        return channel_attention(parts[0], parts[1], parts[2], operands, self.images)


class WindowAttention(Producer):
    """Attention within windows, from its input to its projection.

    Args:
        spec: What it computes.
        packed: Its operands.
        windows: Where tokens are.
        eps: Of the norm in front, or None.
        sites: Its linears.
        width: Columns of the result.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        packed: Packed,
        windows: Windows,
        eps: float | None,
        sites: tuple[Site, Site],
        width: int,
    ) -> None:
        super().__init__(width, sites)
        self.spec, self.packed, self.windows, self.eps = spec, packed, windows, eps

    def forward(self, x: Tensor, *residual: Tensor) -> Tensor:
        """`[rows, width]`."""
        images = self.windows.images
        added = [part.reshape(images, -1, self.width) for part in residual]
        rows = x.contiguous().reshape(images, -1, x.shape[1])
        options = {"eps": self.eps, **self.windows.options(), **self.epilogue(added)}
        return ops.window_attention(rows, self.packed.value, **options).flatten(0, 1)

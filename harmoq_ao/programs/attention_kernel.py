"""The attention kernel with its constants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from harmoq_ao.cpu_kernels import window_attention
from harmoq_ao.cpu_kernels.memory import token_rows
from harmoq_ao.cpu_kernels.window_attention import pack_bias, pack_quantizers, query_block
from harmoq_ao.kernels.ops import matmul_contraction

if TYPE_CHECKING:
    from harmoq_ao.programs.heads import Heads


@dataclass(frozen=True)
class Mask:
    """What is added to the scores of each window.

    Attributes:
        regions: `[windows, N]` int32: scores between tokens of different regions get `value`; or None.
        value: See there.
        tables: `[kinds, N, M]` float32 where it is no matter of regions; or None.
        kinds: `[windows]` int32, which table; -1 for none.
    """

    regions: Tensor | None
    value: float
    tables: Tensor | None
    kinds: Tensor | None

    @staticmethod
    def of(table: Tensor) -> Mask | None:
        """A mask `[windows, N, M]`; None where it is all zeros."""
        value = float(table.min())
        if value == 0 and float(table.max()) == 0:
            return None
        if table.shape[1] == table.shape[2]:
            regions = (table == 0).to(torch.uint8).argmax(2).to(torch.int32)
            apart = regions[:, :, None] != regions[:, None, :]
            if torch.equal(table, torch.where(apart, value, 0.0)):
                return Mask(regions.contiguous(), value, None, None)
        kinds: dict[bytes, int] = {}
        numbers: list[int] = []
        kept: list[Tensor] = []
        for own in table:
            key = own.contiguous().numpy().tobytes()
            if not own.any():
                numbers.append(-1)
                continue
            if key not in kinds:
                kinds[key] = len(kept)
                kept.append(own)
            numbers.append(kinds[key])
        return Mask(None, value, torch.stack(kept).contiguous(), torch.tensor(numbers, dtype=torch.int32))


class AttentionKernel(nn.Module):
    """Attention of windows; see `cpu_kernels/window_attention.py`.

    Args:
        query: Where queries are.
        key: Where keys are.
        value: Where values are.
        q_factor: Of the queries, before anything else happens to them.
        factor: `[heads]`, of the scores.
        bias: `[heads, N, M]` float32, or None.
        mask: Or None.
        scores: Quantizers of the score product; None in float.
        products: Quantizers of the product with the values; None in float.
        relative: Whether the map is quantized relative to its rows.
        half: Whether float products run on bfloat16 operands.
        length: Rows of the result.
    """

    def __init__(
        self,
        query: Heads,
        key: Heads,
        value: Heads,
        q_factor: float,
        factor: Tensor,
        bias: Tensor | None,
        mask: Mask | None,
        scores: tuple[Any, ...] | None,
        products: tuple[Any, ...] | None,
        relative: bool,
        half: bool,
        length: int,
    ) -> None:
        super().__init__()
        windows, queries = query.rows.shape
        self.block = query_block(queries, key.rows.shape[1])
        self.packed_bias = None if bias is None else pack_bias(bias, self.block)
        self.packed_tables = None if mask is None or mask.tables is None else pack_bias(mask.tables, self.block)
        self.regions = self.kinds = None
        if mask is not None:
            self.regions, self.kinds = (
                None if part is None else part.repeat(windows // len(part), *[1] * (part.dim() - 1)).contiguous()
                for part in (mask.regions, mask.kinds)
            )
        self.q_factors = torch.full((query.heads,), q_factor)
        self.quantizers = self.reciprocals = None
        if scores is not None and products is not None:
            left, right = matmul_contraction(*scores[:5]), matmul_contraction(*products[:5])
            self.quantizers, self.reciprocals = pack_quantizers(*left, *right, query.width)
        self.query, self.key, self.value = query, key, value
        self.factor, self.mask, self.relative, self.length = factor, mask, relative, length
        self.in_half = half and self.quantizers is None

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self._attend(window_attention.window_attention, query, key, value)

    def reference(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The same in plain torch, without the rounding of `half`."""
        return self._attend(window_attention.reference, query, key, value)

    def _attend(self, attention: Callable[..., None], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        width = self.query.heads * self.query.width
        out = token_rows(self.length, width, torch.bfloat16 if self.in_half else torch.float32)
        attention(
            out,
            self.query.rows,
            0,
            query,
            self.query.first,
            key,
            self.key.first,
            value,
            self.value.first,
            self.query.rows,
            self.key.rows,
            self.query.heads,
            self.query.width,
            self.q_factors,
            self.factor,
            self.packed_bias,
            self.regions,
            self.regions,
            0.0 if self.mask is None else self.mask.value,
            self.packed_tables,
            self.kinds,
            block=self.block,
            half=self.in_half,
            quantizers=self.quantizers,
            reciprocals=self.reciprocals,
            relative=self.relative,
        )
        return out

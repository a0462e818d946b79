"""The attention kernel with its constants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from harmoq_ao.cpu_kernels import window_attention
from harmoq_ao.cpu_kernels.memory import token_rows
from harmoq_ao.cpu_kernels.window_attention import pack_bias, pack_quantizers, query_block
from harmoq_ao.kernels.ops import matmul_contraction
from harmoq_ao.programs.found_attention import Attention
from harmoq_ao.programs.steps import Codes


class AttentionKernel(nn.Module):
    """Attention of windows; see `cpu_kernels/window_attention.py`.

    Args:
        attention: What it computes.
        half: Whether float products run on bfloat16 operands.
    """

    def __init__(self, attention: Attention, half: bool) -> None:
        super().__init__()
        query, key, mask = attention.q, attention.k, attention.mask
        windows, queries = query.rows.shape
        self.block = query_block(queries, key.rows.shape[1])
        self.packed_bias = None if attention.bias is None else pack_bias(attention.bias, self.block)
        self.packed_tables = None if mask is None or mask.tables is None else pack_bias(mask.tables, self.block)
        self.regions = self.kinds = None
        if mask is not None:
            self.regions, self.kinds = (
                None if part is None else part.repeat(windows // len(part), *[1] * (part.dim() - 1)).contiguous()
                for part in (mask.regions, mask.kinds)
            )
        self.q_factors = torch.full((query.heads,), attention.q_factor)
        self.quantizers = self.reciprocals = None
        scores, products = attention.scores, attention.products
        if scores is not None and products is not None:
            left, right = matmul_contraction(*scores[:5]), matmul_contraction(*products[:5])
            self.quantizers, self.reciprocals = pack_quantizers(*left, *right, query.width)
        self.query, self.key, self.value = query, key, attention.v
        self.factor, self.mask, self.relative = attention.factor, mask, attention.relative
        self.length = attention.query.matrix.rows
        self.in_half = half and self.quantizers is None
        self.out_quantizer: Tensor | None = None
        self.out_bits = 8

    def read_from_first(self) -> None:
        """Queries, keys and values begin with the first columns of what the kernel is given."""
        self.query, self.key, self.value = (replace(part, first=0) for part in (self.query, self.key, self.value))

    def write_codes(self, codes: Codes) -> None:
        """The result is to be codes of what it is otherwise."""
        self.out_quantizer, self.out_bits = torch.stack([codes.reciprocal, codes.offset]), codes.bits

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self._attend(window_attention.window_attention, query, key, value)

    def reference(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The same in plain torch, without the rounding of `half`."""
        return self._attend(window_attention.reference, query, key, value)

    def _attend(self, attention: Callable[..., None], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        width = self.query.heads * self.query.width
        dtype = torch.bfloat16 if self.in_half else torch.float32
        out = token_rows(self.length, width, dtype if self.out_quantizer is None else torch.uint8)
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
            out_quantizer=self.out_quantizer,
            out_bits=self.out_bits,
        )
        return out

"""Attention as one kernel of a CPU."""

from __future__ import annotations

from typing import Any

import torch

from harmoq_ao.common.errors import KernelError
from harmoq_ao.programs.attention_kernel import AttentionKernel
from harmoq_ao.programs.attention_matching import Match, scaled
from harmoq_ao.programs.channel_attention import lower_channel_attention
from harmoq_ao.programs.codes import coded
from harmoq_ao.programs.context import Context
from harmoq_ao.programs.found_attention import find_attention
from harmoq_ao.programs.steps import Value


def lower_attention(lowering: Context, match: Match) -> Value | None:
    """The kernel for an attention; None where it does not take it."""
    found = lower_channel_attention(lowering, match)
    if found is not None:
        return found
    query_node, q_factor = scaled(lowering.known, match.query)
    operands: list[Any] = [lowering.known.get(node) for node in (query_node, match.key, match.value)]
    attention = find_attention(lowering, match, operands, q_factor)
    if attention is None:
        return None
    try:
        kernel = AttentionKernel(attention, lowering.half)
    except KernelError:  # bounds from the data, a joint scale of the values
        return None
    exact = match.scores is not None or not lowering.half
    reads = attention.reads(exact)
    if kernel.quantizers is not None and kernel.reciprocals is not None:
        # made where the values are, codes are a quarter of what must be moved
        for place, operand in enumerate((0, 1, 3)):
            factor = kernel.reciprocals[operand].repeat(attention.q.heads)
            _, _, offset, top = kernel.quantizers[operand]
            number = attention.q_factor if operand == 0 else 1.0
            arguments = factor, offset.expand(factor.shape).contiguous(), int(top).bit_length(), number
            reads[place] = coded(lowering, reads[place], *arguments)
        kernel.read_from_first()
    dtype = torch.float32 if exact else torch.bfloat16
    return lowering.module_step(kernel, reads, [((attention.width,), attention.index)], dtype)[0]

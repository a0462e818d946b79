"""Bit packing: the documented layout byte for byte, round trips, refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harmoq_ao.common.errors import KernelError
from harmoq_ao.quant.packing import pack, packed_length, unpack

BITS = st.integers(2, 8)
LEADING = st.lists(st.integers(0, 3), max_size=2)


def random_codes(seed: int, shape: list[int], bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(
    ("bits", "codes", "octets"),
    [
        (2, [0, 1, 2, 3, 1], [0b11_10_01_00, 0b01]),
        (3, [1, 2, 3, 4, 5, 6, 7, 0], [0xD1, 0x58, 0x1F]),
        (3, [7, 0, 7], [0b11_000_111, 0b1]),
        (4, [1, 2, 3], [0x21, 0x03]),
        (5, [31, 0, 1], [0x1F, 0x04]),
        (6, [1, 2, 3, 4], [0x81, 0x30, 0x10]),
        (7, [127, 1], [0xFF, 0x00]),
        (8, [0, 200, 255], [0, 200, 255]),
    ],
)
def test_golden_bytes(bits: int, codes: list[int], octets: list[int]) -> None:
    packed = pack(torch.tensor(codes, dtype=torch.uint8), bits)
    assert packed.tolist() == octets
    assert unpack(packed, bits, len(codes)).tolist() == codes


@given(seed=st.integers(0, 2**31), leading=LEADING, n=st.integers(0, 67), bits=BITS)
def test_round_trip(seed: int, leading: list[int], n: int, bits: int) -> None:
    codes = random_codes(seed, [*leading, n], bits)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*leading, packed_length(n, bits))
    assert torch.equal(unpack(packed, bits, n), codes)


@given(seed=st.integers(0, 2**31), n=st.integers(1, 40), bits=BITS)
def test_layout_is_one_little_endian_stream(seed: int, n: int, bits: int) -> None:
    codes = random_codes(seed, [n], bits)
    stream = sum(code << (k * bits) for k, code in enumerate(codes.tolist()))
    assert pack(codes, bits).tolist() == list(stream.to_bytes(packed_length(n, bits), "little"))


@given(seed=st.integers(0, 2**31), bits=BITS, n=st.integers(1, 20))
def test_rows_are_independent_and_strides_do_not_matter(seed: int, bits: int, n: int) -> None:
    codes = random_codes(seed, [n, 5], bits).t()
    packed = pack(codes, bits)
    assert all(torch.equal(packed[i], pack(codes[i].contiguous(), bits)) for i in range(5))
    transposed = packed.t().contiguous().t()
    assert torch.equal(unpack(transposed, bits, n), codes)


@pytest.mark.parametrize(("n", "bits", "length"), [(0, 3, 0), (1, 2, 1), (60, 3, 23), (61, 4, 31), (180, 8, 180)])
def test_packed_length(n: int, bits: int, length: int) -> None:
    assert packed_length(n, bits) == length


@pytest.mark.parametrize("bits", [0, 1, 9, 16, True, 4.0])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(KernelError, match="width"):
        pack(torch.zeros(3, dtype=torch.uint8), bits)


@pytest.mark.parametrize("bits", range(2, 8))
def test_codes_out_of_range_are_refused(bits: int) -> None:
    codes = torch.zeros(2, 9, dtype=torch.uint8)
    codes[1, 4] = 1 << bits
    with pytest.raises(KernelError, match=f"largest code {1 << bits}"):
        pack(codes, bits)


@pytest.mark.parametrize("codes", [torch.zeros(3), torch.zeros(3, dtype=torch.int8), torch.tensor(1).byte()])
def test_wrong_types_are_refused(codes: torch.Tensor) -> None:
    with pytest.raises(KernelError, match="wrong type"):
        pack(codes, 4)
    with pytest.raises(KernelError, match="wrong type"):
        unpack(codes, 4, 6)


def test_wrong_lengths_are_refused() -> None:
    packed = pack(torch.ones(2, 7, dtype=torch.uint8), 3)
    for length in (5, 9, 100):
        with pytest.raises(KernelError, match="wrong length"):
            unpack(packed, 3, length)
    with pytest.raises(KernelError, match="negative"):
        unpack(packed, 3, -1)


def test_set_bits_after_the_last_code_are_refused() -> None:
    packed = pack(torch.ones(2, 7, dtype=torch.uint8), 3)  # 21 bits of 24
    packed[1, 2] |= 0x80
    with pytest.raises(KernelError, match="Unused bits"):
        unpack(packed, 3, 7)

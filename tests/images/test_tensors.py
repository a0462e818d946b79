"""What models may be given as an image."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from harmoq_ao.common.errors import InputError
from harmoq_ao.images import check_image_tensor


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((3, 4, 4)), "not a tensor. Found: ndarray"),
        (torch.zeros(4, 4), "wrong rank. Found: shape [4, 4]. Expected: [C, H, W] or [B, C, H, W]"),
        (torch.zeros(1, 1, 3, 4, 4), "wrong rank"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), "wrong type. Found: torch.uint8"),
        (torch.zeros(3, 0, 4), "is empty. Found: shape [3, 0, 4]"),
        (torch.zeros(0, 3, 4, 4), "is empty. Found: shape [0, 3, 4, 4]"),
        (torch.zeros(4, 4, 4), "wrong number of channels. Found: 4 (shape [4, 4, 4]). Expected: 1 or 3"),
        (torch.zeros(8, 8, 3), "move the channels before height and width"),
        (torch.full((3, 2, 2), math.inf), "12 NaN or infinite values of 12"),
        (torch.full((3, 2, 2), math.nan), "12 NaN or infinite values of 12"),
    ],
)
def test_bad_tensors_are_named(value: object, message: str) -> None:
    with pytest.raises(InputError) as caught:
        check_image_tensor(value)
    assert message in str(caught.value)


def test_good_tensors_pass_and_rank_can_be_required() -> None:
    for shape in ((3, 1, 1), (1, 5, 2), (2, 3, 4, 4)):
        check_image_tensor(torch.rand(*shape))
        check_image_tensor(torch.rand(*shape).to(torch.bfloat16))
    check_image_tensor(torch.rand(4, 2, 2), channels=(4,))
    with pytest.raises(InputError, match=r"Expected: \[B, C, H, W\]"):
        check_image_tensor(torch.rand(3, 2, 2), batched=True)
    with pytest.raises(InputError, match=r"Expected: \[C, H, W\]"):
        check_image_tensor(torch.rand(1, 3, 2, 2), batched=False)

"""Tensors within containers and objects."""

from __future__ import annotations

import torch

from harmoq_ao.common.structure import image_path, map_tensors, tensors_in
from tests.authors import Output, Pair


def test_every_tensor_has_a_path() -> None:
    one, two = torch.zeros(1), torch.zeros(2)
    value = {"a": [one, 3, None], "b": Output(two, one), "c": Pair(one, two), "d": "text"}
    paths = {"a.0": one, "b.features": two, "b.reconstruction": one, "c.first": one, "c.second": two}
    found = tensors_in(value)
    assert list(found) == list(paths)
    assert all(found[path] is tensor for path, tensor in paths.items())
    assert tensors_in(one) == {"": one}


def test_tensors_are_changed_and_the_structure_is_kept() -> None:
    value = {
        "a": [torch.zeros(1), 3],
        "b": Output(torch.zeros(2), torch.zeros(3)),
        "c": Pair(torch.zeros(1), torch.zeros(1)),
    }
    changed = map_tensors(value, lambda tensor: tensor + 1)
    assert all(bool((tensor == 1).all()) for tensor in tensors_in(changed).values())
    assert all(bool((tensor == 0).all()) for tensor in tensors_in(value).values())
    assert (type(changed["b"]), type(changed["c"]), changed["a"][1], changed["b"].loss) == (Output, Pair, 3, None)


def test_the_largest_image_is_taken_and_features_are_none() -> None:
    example = torch.zeros(2, 3, 8, 12)
    small, large = torch.zeros(2, 3, 8, 12), torch.zeros(2, 3, 16, 24)
    assert image_path(small, example) is None
    assert image_path((small, large, torch.zeros(2, 64, 32, 48), torch.zeros(2, 3, 16, 36)), example) == "1"
    assert image_path((large, [large + 1, large + 2]), example) == "0"
    assert image_path({"x": {"y": small}, "same": small}, example) == "same"
    assert image_path({"x": {"y": small}}, example) == "x.y"

"""Programs against the model that they are made of, for every architecture and for forwards written to be difficult."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, fx, nn

from harmoq_ao.config import HarmoqConfig
from harmoq_ao.programs.attention_kernel import AttentionKernel
from harmoq_ao.programs.channel_attention import ChannelMaps
from harmoq_ao.programs.convolution import ColumnMeans, Depthwise
from harmoq_ao.programs.emit import Rowwise
from harmoq_ao.programs.materialize import TorchOperator
from harmoq_ao.programs.program import make_program
from harmoq_ao.programs.record import Unrecordable
from tests import models
from tests.programs.helpers import AVAILABLE, BODIES, Body, heads_first, off_by, spelled_norms, written

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="the C++ kernels cannot be built here")

#: Why architectures have no program.
REFUSED = {
    "RestoreFormer": "writes into a tensor",
    "HVICIDNet": "asks for values",
    "AuraSR": "draws random numbers",
    "SeemoRe": "asks for values",
    "MMRealSR": "returns a tuple",
    "FBCNN": "returns a tuple",
    "GFPGAN": "draws random numbers",
}
#: Architectures that consist of kernels, and the operators of torch that the others must not exceed.
OPERATORS = {
    **dict.fromkeys(("SwinIR/light", "DAT", "DAT/light", "DRCT", "FDAT"), 0),
    "SwinIR/classical": 1,  # the position embedding, once in the network
    "SwinIR/real": 2,  # nearest neighbours
    "RetinexFormer": 4,
    "IPT": 6,
    "HAT": 10,
    "Uformer": 10,
    "RGT": 12,
}
EXACT, HALF = 1e-4, 2e-2

ALL = tuple(models.BY_NAME)
FOLLOWED = tuple(name for name in ALL if name not in REFUSED)


def image_for(name: str, size: tuple[int, int] | None = None, batch: int = 1) -> Tensor:
    return models.entry(name).example(size, batch, seed=7)


def output(model: nn.Module, image: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(image)
    return result


def count(program: fx.GraphModule) -> Counter[type[nn.Module]]:
    return Counter(type(module) for module in program.children())


@pytest.mark.parametrize("name", FOLLOWED)
def test_a_program_computes_what_the_architecture_computes(name: str) -> None:
    model, image = models.build(name), image_for(name)
    want = output(model, image)
    program = make_program(model, image, half=False)
    assert off_by(program(image), want) < EXACT
    assert off_by(make_program(model, image, half=True)(image), want) < HALF
    assert count(program)[TorchOperator] <= OPERATORS.get(name, 200)


@pytest.mark.parametrize("name", REFUSED)
def test_an_architecture_that_cannot_be_followed_is_refused(name: str) -> None:
    with pytest.raises(Unrecordable, match=REFUSED[name]):
        make_program(models.build(name), image_for(name), half=False)


@pytest.mark.parametrize("name", ["SwinIR/light", "SwinIR/real", "HAT", "DAT/light", "RGT", "CRAFT", "OmniSR", "DITN"])
def test_odd_sizes_and_batches(name: str) -> None:
    """The last size of each is no multiple of the window."""
    model, image = models.build(name), image_for(name, models.entry(name).sizes[-1], 2)
    assert off_by(make_program(model, image, half=False)(image), output(model, image)) < EXACT


@pytest.mark.parametrize("name", ["SwinIR/light", "DAT/light", "FDAT"])
def test_images_of_a_batch_do_not_see_each_other(name: str) -> None:
    model = models.build(name)
    image = image_for(name, (16, 24), 2)
    program = make_program(model, image, half=False)
    changed = torch.stack([image[0], 1 - image[1]])
    assert torch.equal(program(image)[0], program(changed)[0])
    assert not torch.equal(program(image)[1], program(changed)[1])


@pytest.mark.parametrize("body", BODIES, ids=lambda b: b.__name__)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_program_computes_what_a_forward_computes(body: Body, batch: int) -> None:
    model, image = written(body), torch.rand(batch, 3, 16, 12, generator=torch.Generator().manual_seed(3))
    want = output(model, image.clone())
    assert off_by(make_program(model, image, half=False)(image), want) < EXACT


def test_norms_that_authors_spell_out_are_token_wise() -> None:
    program = make_program(written(spelled_norms), models.images(1)[0], half=False)
    targets = [m.target for m in program.children() if isinstance(m, TorchOperator)]
    assert targets.count(torch.ops.aten.var.correction) == targets.count(torch.ops.aten.sqrt.default) == 1
    assert not {torch.ops.aten.pow.Tensor_Scalar, torch.ops.aten.rsqrt.default} & set(targets)


@pytest.mark.parametrize("half", [False, True])
def test_heads_may_come_before_windows(half: bool) -> None:
    model, image = written(heads_first), torch.rand(2, 3, 16, 12, generator=torch.Generator().manual_seed(3))
    program = make_program(model, image, half)
    assert off_by(program(image), output(model, image)) < (HALF if half else EXACT)
    assert count(program)[AttentionKernel] == 1


def test_what_networks_consist_of_becomes_kernels() -> None:
    program = make_program(models.build("DAT/light"), image_for("DAT/light"), half=False)
    found = count(program)
    assert found[AttentionKernel] == 4  # two halves of the heads in two blocks
    assert found[ChannelMaps] == 1
    assert found[Depthwise] == 6
    assert found[ColumnMeans] == 3
    # chains of token-wise operations: far fewer programs than instructions
    chains = [module for module in program.children() if isinstance(module, Rowwise)]
    assert sum(len(chain.program.constants) for chain in chains) > 3 * len(chains)


@pytest.mark.parametrize(
    ("name", "profile"), [("SwinIR/light", "paper"), ("DAT/light", "deploy"), ("forms", "deploy"), ("forms", "paper")]
)
def test_quantized_models(name: str, profile: str) -> None:
    """A sum in another order may move a value to the next code: few of them, and no further."""
    config = HarmoqConfig(4, 4, profile, observer="minmax")
    quantized = models.converted(name, config)
    quantized.use_reference()
    image = models.images(1, (24, 16), seed=5)[0]
    want = output(quantized, image)
    quantized.use_backend("auto")
    got = make_program(quantized.model, image, half=False)(image)
    spread = float(want.max() - want.min())
    assert float((got - want).abs().mean()) < 1e-4 * spread
    assert off_by(got, want) < 2e-2
    assert float(((got - want).abs() > 1e-4 * spread).float().mean()) < 0.05
    assert off_by(make_program(quantized.model, image, half=True)(image), want) < 5e-2


def test_a_site_with_bounds_of_each_token_is_computed_by_its_own_operator() -> None:
    quantized = models.converted("linears", HarmoqConfig(8, 8, rules=models.PER_TOKEN))
    image = models.images(1, (24, 16), seed=5)[0]
    quantized.use_reference()
    want = output(quantized, image)
    quantized.use_backend("auto")
    program = make_program(quantized.model, image, half=False)
    assert count(program)[TorchOperator] == 2
    assert off_by(program(image), want) < EXACT


def test_kernels_equal_their_references() -> None:
    """Attention kernels with their constants, on what they meet in a network."""
    model, image = models.build("SwinIR/light"), image_for("SwinIR/light", (19, 13))
    program = make_program(model, image, half=False)
    met: list[AttentionKernel] = []

    class Compared(fx.Interpreter):
        def call_module(self, target: str, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
            module = self.module.get_submodule(target)
            result: Tensor = module(*args)
            if isinstance(module, AttentionKernel):
                met.append(module)
                torch.testing.assert_close(result, module.reference(*args), rtol=1e-4, atol=1e-5)
            return result

    with torch.no_grad():
        Compared(program).run(image)
    assert len(met) == 4
    assert {kernel.mask is None for kernel in met} == {True, False}

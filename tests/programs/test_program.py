"""When programs are made, kept, dropped and not used."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import harmoq_ao as h
from harmoq_ao.common.errors import InputError
from harmoq_ao.config import HarmoqConfig
from harmoq_ao.cpu_kernels import library
from harmoq_ao.programs import program as programs
from harmoq_ao.programs.program import KEPT, Program, Programs, make_program
from tests import models
from tests.programs.helpers import AVAILABLE, Body, Written, off_by, written

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="the C++ kernels cannot be built here")

CONFIG = HarmoqConfig(8, 8, observer="minmax", joint_scale="none", joint_shift=False)
PAPER = replace(CONFIG, profile="paper")
LARGE = (64, 64)

Change = Callable[[h.QuantizedModel], Any]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Sizes for which programs were made."""
    sizes: list[torch.Size] = []
    make = programs.make_program

    def counting(model: nn.Module, example: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(example.shape)
        return make(model, example, *args, **kwargs)

    monkeypatch.setattr(programs, "make_program", counting)
    return sizes


def image(size: tuple[int, int] = LARGE, seed: int = 11) -> Tensor:
    return models.images(1, size, seed)[0]


def quantized(name: str = "linears", config: h.HarmoqConfig = CONFIG) -> h.QuantizedModel:
    return models.converted(name, config)


def by_modules(model: h.QuantizedModel, x: Tensor) -> Tensor:
    """Output without a program."""
    with torch.no_grad():
        result: Tensor = model.model(x)
    return result


def test_one_program_for_each_size(made: list[torch.Size]) -> None:
    model = quantized("SwinIR/light")
    for size in (LARGE, (64, 72), LARGE, (64, 72)):
        assert off_by(model(image(size)), by_modules(model, image(size))) < 2e-2
    assert made == [image(LARGE).shape, image((64, 72)).shape]
    two = torch.cat([image(), image(seed=12)])
    assert off_by(model(two), by_modules(model, two)) < 2e-2
    assert len(made) == 3


def test_what_making_a_large_program_took_is_returned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    returned: list[bool] = []
    monkeypatch.setattr(programs, "return_freed_memory", lambda: returned.append(True))
    model = quantized()
    model(image())
    assert not returned
    monkeypatch.setattr(programs, "HEAVY", 64 * 65)
    for _ in range(2):
        model(image((64, 72)))
        assert len(returned) == 1


def test_small_images_run_as_modules_and_do_not_disturb_programs(made: list[torch.Size]) -> None:
    model = quantized("SwinIR/light")
    small = image((16, 16))
    first = model(image())
    assert torch.equal(model(small), by_modules(model, small))
    assert torch.equal(model(image()), first)
    assert len(made) == 1


def test_the_last_few_sizes_are_kept(made: list[torch.Size]) -> None:
    model = quantized()
    sizes = [(64, 64 + n) for n in range(KEPT + 1)]
    for size in sizes:
        model(image(size))
    model(image(sizes[1]))
    assert len(made) == KEPT + 1
    model(image(sizes[0]))
    assert len(made) == KEPT + 2
    model(image(sizes[2]))  # the one that was used longest ago made room
    assert len(made) == KEPT + 3


def weight_changed(model: h.QuantizedModel) -> None:
    model.model.two.weight_scale.mul_(2)


def weight_exchanged(model: h.QuantizedModel) -> None:
    model.model.two.weight_scale = torch.ones_like(model.model.two.weight_scale)


def state_loaded(model: h.QuantizedModel) -> None:
    model.load_state_dict({k: v * 2 if k.endswith("weight_scale") else v for k, v in model.state_dict().items()})


def module_exchanged(model: h.QuantizedModel) -> None:
    model.model.two = nn.Linear(16, 3)


@pytest.mark.parametrize(
    ("name", "config"), [("SwinIR/light", CONFIG), ("DAT/light", CONFIG), ("HAT", CONFIG), ("DAT/light", PAPER)]
)
def test_later_images_are_replayed(name: str, config: h.HarmoqConfig) -> None:
    graph, calls = make_program(quantized(name, config).model, image(), half=False), list[int]()
    handle = graph.register_forward_hook(lambda *_: calls.append(1))
    program = Program(graph)
    with torch.no_grad():
        outputs = [program(image(seed=seed)) for seed in range(3)]
        assert len(calls) == 1
        handle.remove()
        for seed, output in enumerate(outputs):
            assert torch.equal(output, graph(image(seed=seed)))


def test_other_layouts_are_not_replayed() -> None:
    graph = make_program(quantized("SwinIR/light").model, image(), half=False)
    program = Program(graph)
    with torch.no_grad():
        want = program(image())
        assert torch.equal(program(image().to(memory_format=torch.channels_last)), want)
        assert torch.equal(program(image().double()), want)


def test_graphs_that_read_values_stay_in_python() -> None:
    class Reading(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * float(x.amax())

    program = Program(torch.fx.GraphModule(Reading(), torch.fx.Graph()))
    program.graph.forward = Reading().forward
    for seed in range(3):
        assert torch.equal(program(image(seed=seed)), Reading()(image(seed=seed)))


@pytest.mark.parametrize("change", [weight_changed, weight_exchanged, state_loaded, module_exchanged])
def test_a_changed_model_gets_a_new_program(change: Change, made: list[torch.Size]) -> None:
    model = quantized()
    before = model(image())
    with torch.no_grad():
        change(model)
    after = model(image())
    assert len(made) == 2
    assert not torch.equal(before, after)
    assert off_by(after, by_modules(model, image())) < 1e-3


def test_another_float_type_gets_a_new_program(made: list[torch.Size]) -> None:
    model = quantized("SwinIR/light")
    before = model(image())
    model.set_float_dtype(torch.bfloat16)
    after = model(image())
    assert len(made) == 2
    assert off_by(after, before) < 5e-2
    assert after.dtype == torch.float32
    assert model(image().bfloat16()).dtype == torch.bfloat16


def test_backends_have_no_programs(made: list[torch.Size]) -> None:
    model = quantized()
    first = model(image())
    model.use_reference()
    assert torch.equal(model(image()), by_modules(model, image()))
    assert len(made) == 1
    model.use_backend("auto")
    assert torch.equal(model(image()), first)
    assert len(made) == 1


def test_hooks_are_called(made: list[torch.Size]) -> None:
    model, seen = quantized(), []
    model(image())
    for register in (model.model.one.register_forward_hook, nn.modules.module.register_module_forward_hook):
        handle = register(lambda module, *_: seen.append(module))
        model(image())
        handle.remove()
        assert model.model.one in seen
        seen.clear()
    handle = model.model.one.register_forward_pre_hook(lambda module, args: (args[0] * 0,))
    hooked = model(image())
    handle.remove()
    assert not torch.equal(hooked, model(image()))
    assert len(made) == 1


def test_training_has_no_programs(made: list[torch.Size]) -> None:
    model = quantized()
    first = model(image())
    model.train()
    model(image())
    assert len(made) == 1
    assert torch.equal(model.eval()(image()), first)


def test_a_part_in_training_is_what_it_is(caplog: pytest.LogCaptureFixture) -> None:
    """A dropout that drops cannot be recorded; a module that no flag changes can."""
    model = quantized()
    model.model.dropout = nn.Dropout(0.5)
    model.model.forward = lambda x: model.model.dropout(type(model.model).forward(model.model, x))
    model.eval()
    first = model(image())
    model.model.one.train()
    assert torch.equal(model(image()), first)
    assert model.programs.refusal is None
    model.model.dropout.train()
    assert bool((model(image()) == 0).any())
    assert "random" in str(model.programs.refusal)


def test_nobody_looks_on(made: list[torch.Size]) -> None:
    model = quantized()
    fake = FakeTensorMode().from_tensor(image())
    assert model.programs.run(model.model, fake, torch.float32) is None
    with FlopCounterMode(display=False):  # it sees every operator of the modules
        model(image())
    exported = torch.export.export(model, (image(),)).module()
    assert not made
    assert off_by(exported(image()), model(image())) < 1e-3


def test_modes_of_the_caller_change_nothing() -> None:
    model = quantized("SwinIR/light")
    first = model(image())
    wanted = image().requires_grad_()
    assert not model(wanted).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(image()), first)
    with torch.inference_mode():
        assert torch.equal(model(image()), first)
        inside = copy.deepcopy(model)  # its tensors do not count their changes
        assert torch.equal(inside(image()), first)
    assert torch.equal(inside(image()), first)


def test_what_is_not_a_number_raises() -> None:
    model = quantized()
    with torch.no_grad():
        model.model.two.weight_scale[1] = float("nan")
    with pytest.raises(InputError):
        model(image())
    other = written(lambda m, x: m.tail(m.head(x)))
    with torch.no_grad():
        other.head.weight[0] = float("nan")
    with pytest.raises(InputError):
        Programs().run(other, image(), torch.float32)


def test_copies_have_programs_of_their_own(made: list[torch.Size]) -> None:
    model = quantized()
    first = model(image())
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.two.weight_scale.mul_(2)
    assert not torch.equal(other(image()), first)
    assert torch.equal(model(image()), first)
    assert len(made) == 2


def test_threads_share_programs(made: list[torch.Size]) -> None:
    model = quantized("SwinIR/light")
    inputs = [image(size, seed) for seed in range(4) for size in (LARGE, (64, 72))]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(model, inputs))
    assert sorted(made) == sorted({x.shape for x in inputs})
    assert all(torch.equal(result, model(x)) for result, x in zip(results, inputs, strict=True))


def asking(m: Written, x: Tensor) -> Tensor:
    return m.tail(m.head(x) * x.mean().item())


def failing(m: Written, x: Tensor) -> Tensor:
    """It takes rows that are not there, which no shape tells."""
    return m.tail(m.linear.weight[(m.head(x) > -9).long() + 8].sum(-1))


@pytest.mark.parametrize("body", [asking, failing])
def test_a_refusal_is_logged_once_and_told(body: Body, caplog: pytest.LogCaptureFixture) -> None:
    model, kept = written(body), Programs()
    with caplog.at_level(logging.WARNING):
        for size in (LARGE, LARGE, (64, 72)):
            assert kept.run(model, image(size), torch.float32) is None
    assert len(caplog.records) == 1
    assert kept.refusal is not None
    assert kept.refusal in kept.sentence()


def test_a_refused_model_runs_as_its_modules(caplog: pytest.LogCaptureFixture) -> None:
    model = quantized()
    model.model.forward = lambda x: type(model.model).forward(model.model, x) * x.mean().item()
    with caplog.at_level(logging.WARNING, "harmoq_ao.programs"):
        for _ in range(2):
            assert torch.equal(model(image()), by_modules(model, image()))
    assert len(caplog.records) == 1


def test_a_refusal_is_forgotten_with_the_model_it_was_for() -> None:
    model, kept = written(asking), Programs()
    assert kept.run(model, image(), torch.float32) is None
    model.body = lambda m, x: m.tail(m.head(x))
    assert kept.run(model, image(), torch.float32) is None  # a function is none of what is watched
    with torch.no_grad():
        model.head.weight.mul_(2)
    assert kept.run(model, image(), torch.float32) is not None


def test_switched_off(made: list[torch.Size], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARMOQ_CPU_KERNELS", "off")
    model = quantized()
    assert torch.equal(model(image()), by_modules(model, image()))
    assert not made
    assert library.status().sentence == model.programs.sentence()

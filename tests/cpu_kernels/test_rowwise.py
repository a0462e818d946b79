"""The C++ kernel against the plain torch reference, instruction by instruction and in chains."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from harmoq_ao.common.elementwise import Binary, Unary
from harmoq_ao.common.errors import InputError
from harmoq_ao.cpu_kernels import library, rowwise
from harmoq_ao.cpu_kernels.rowwise import Broadcast, Columns, Op, RowProgram
from harmoq_ao.quant import integer_reference
from harmoq_ao.quant.integer_reference import Affine, LinearOperands
from tests.strategies import SEEDS

# Slots of every random program.
WIDE, HALF, IMAGES, MATRICES, OUT, OUT_HALF, FIRST, SECOND = range(8)
FLOATS, PER_ROW, WRITABLE = (WIDE, OUT, FIRST, SECOND), (WIDE, HALF, OUT, OUT_HALF, FIRST, SECOND), (4, 5, 6, 7)
MANY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])


class Case:
    """A random program in the making: what it has as inputs, and what it may draw."""

    def __init__(self, draw: st.DrawFn, products: bool = False) -> None:
        self.draw = draw
        self.generator = torch.Generator().manual_seed(draw(SEEDS))
        self.images, self.rows_per_image = draw(st.integers(1, 3)), draw(st.integers(1, 75))
        self.columns = draw(st.integers(2, 70))
        self.k, self.n = draw(st.integers(1, self.columns)), draw(st.integers(1, self.columns))
        rows = self.images * self.rows_per_image
        padding = draw(st.integers(0, 3))
        self.inputs = [
            self.normal(rows, self.columns + padding)[:, padding:],
            self.normal(rows, self.columns).bfloat16(),
            self.normal(self.images, self.columns),
            self.normal(self.images * self.k if products else 1, self.n),
        ]
        outputs = [(self.columns, torch.float32), (self.columns, torch.bfloat16)]
        self.program = RowProgram(len(self.inputs), outputs, [self.columns, self.columns])
        for slot in WRITABLE:
            self.program.emit(Op.COPY, Columns(slot), Columns(draw(st.sampled_from((WIDE, HALF)))), self.columns)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def place(self, slots: tuple[int, ...], width: int) -> Columns:
        return Columns(self.draw(st.sampled_from(slots)), self.draw(st.integers(0, self.columns - width)))

    def width(self) -> int:
        return self.draw(st.integers(1, self.columns))

    def vector(self, length: int) -> int:
        return self.program.constant(self.normal(length) if self.draw(st.booleans()) else None)

    def emit(self, op: Op) -> None:
        getattr(self, op.name.lower())()

    def copy(self) -> None:
        width = self.width()
        self.program.emit(Op.COPY, self.place(WRITABLE, width), self.place(PER_ROW, width), width)

    def linear(self) -> None:
        k, n = self.width(), self.width()
        bits = self.draw(st.sampled_from((2, 3, 4, 8)))
        constants = rowwise.linear_constants(self.operands(k, n, bits))
        places = [self.program.constant(c) for c in constants]
        places += [-1] * (6 - len(places))
        self.program.emit(Op.LINEAR, self.place(WRITABLE, n), self.place(PER_ROW, k), k, n, bits, *places)

    def operands(self, k: int, n: int, bits: int) -> LinearOperands:
        half, draw = 1 << (bits - 1), self.draw
        codes = torch.randint(-half, half, (n, k), generator=self.generator, dtype=torch.int8)
        step = torch.tensor(6.0 / ((1 << bits) - 1))
        return LinearOperands(
            codes,
            self.normal(n).abs() * 0.1 / half,
            torch.full((n,), 0.5) if draw(st.booleans()) else torch.zeros(n),
            self.normal(n) if draw(st.booleans()) else None,
            bits,
            Affine(step, torch.tensor(-3.0), bits),
            self.normal(k).abs() + 0.2 if draw(st.booleans()) else None,
            self.normal(k) if draw(st.booleans()) else None,
        )

    def quantize(self) -> None:
        width, bits = self.width(), self.draw(st.sampled_from((2, 3, 4, 8)))
        factor = self.normal(width) * ((1 << bits) / 4)
        offset = torch.rand(width, generator=self.generator) * (1 << bits)
        places = [self.program.constant(c) for c in (factor, offset)]
        self.program.emit(Op.QUANTIZE, self.place(WRITABLE, width), self.place(PER_ROW, width), width, bits, *places)

    def layer_norm(self) -> None:
        width = self.width()
        to, source = self.place(WRITABLE, width), self.place(PER_ROW, width)
        vectors = self.vector(width), self.vector(width)
        self.program.emit(Op.LAYER_NORM, to, source, width, *vectors, self.program.number(1e-5))

    def unary(self, kinds: tuple[Unary, ...] = tuple(Unary)) -> None:
        width, kind = self.width(), self.draw(st.sampled_from(kinds))
        to, source = self.place(WRITABLE, width), self.place(PER_ROW, width)
        self.program.emit(Op.UNARY, kind, to, source, width, self.program.number(0.1))

    def binary(self) -> None:
        width, mode = self.width(), self.draw(st.sampled_from(Broadcast))
        to, left = self.place(WRITABLE, width), self.place(PER_ROW, width)
        slots = (IMAGES,) if mode == Broadcast.IMAGE else PER_ROW
        right = self.place(slots, 1 if mode == Broadcast.COLUMN else width)
        self.program.emit(Op.BINARY, self.draw(st.sampled_from(Binary)), to, left, right, width, mode)

    def scalar(self) -> None:
        width, kind = self.width(), self.draw(st.sampled_from(Binary))
        to, source = self.place(WRITABLE, width), self.place(PER_ROW, width)
        self.program.emit(Op.SCALAR, kind, to, source, width, self.program.number(self.draw(st.floats(-2, 2))))

    def affine(self) -> None:
        width = self.width()
        to, source = self.place(WRITABLE, width), self.place(PER_ROW, width)
        self.program.emit(Op.AFFINE, to, source, width, self.vector(width), self.vector(width))

    def float_linear(self) -> None:
        to, source = self.place(WRITABLE, self.n), self.place(PER_ROW, self.k)
        weight = self.program.constant(self.normal(self.k, self.n) * self.k**-0.5)
        self.program.emit(Op.FLOAT_LINEAR, to, source, self.k, self.n, weight, self.vector(self.n))

    def product(self) -> None:
        to, source = self.place(WRITABLE, self.n), self.place(PER_ROW, self.k)
        self.program.emit(Op.PRODUCT, to, source, self.k, self.n, MATRICES)

    def finish(self) -> None:
        """Temporaries are seen through the outputs."""
        for to, source in zip(
            (OUT, OUT_HALF), self.draw(st.permutations((FIRST, SECOND, OUT, OUT_HALF))), strict=False
        ):
            self.program.emit(Op.COPY, Columns(to), Columns(source), self.columns)


def expected(case: Case) -> list[Tensor]:
    try:
        return rowwise.rowwise_reference(case.inputs, case.program, case.rows_per_image)
    except InputError:  # a chain of products grew beyond float32
        assume(False)
        raise


@given(st.data())
@MANY
def test_chains_of_exact_instructions_equal_the_reference_bit_for_bit(data: st.DataObject) -> None:
    case = Case(data.draw)
    steps: tuple[Callable[[], None], ...] = (
        case.copy,
        case.linear,
        case.quantize,
        case.binary,
        case.scalar,
        case.affine,
        lambda: case.unary((Unary.RELU, Unary.LEAKY_RELU)),
    )
    for _ in range(data.draw(st.integers(1, 8))):
        data.draw(st.sampled_from(steps))()
    case.finish()
    want = expected(case)
    for got, value in zip(rowwise.rowwise(case.inputs, case.program, case.rows_per_image), want, strict=True):
        assert torch.equal(got, value)


@pytest.mark.parametrize("op", list(Op), ids=lambda op: op.name)
@given(st.data())
@settings(max_examples=25, deadline=None)
def test_every_instruction_on_any_slots(op: Op, data: st.DataObject) -> None:
    case = Case(data.draw, products=op == Op.PRODUCT)
    case.emit(op)
    case.finish()
    want = expected(case)
    for got, value in zip(rowwise.rowwise(case.inputs, case.program, case.rows_per_image), want, strict=True):
        tolerance = 2e-5 if value.dtype == torch.float32 else 2**-7
        torch.testing.assert_close(got, value, rtol=tolerance, atol=tolerance)


@given(
    SEEDS, st.sampled_from((2, 3, 4, 8)), st.booleans(), st.integers(1, 2100), st.integers(1, 460), st.integers(1, 70)
)
@settings(max_examples=25, deadline=None)
def test_long_and_wide_linears_are_exact(seed: int, bits: int, shifted: bool, k: int, n: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    # the largest sums int32 has to hold, beside random ones
    codes = torch.randint(-half, half, (n, k), generator=generator, dtype=torch.int8)
    codes[0] = -half
    operands = LinearOperands(
        codes,
        torch.rand(n, generator=generator) + 0.1,
        torch.full((n,), 0.5 if shifted else 0.0),
        None,
        bits,
        Affine(torch.tensor(0.02), torch.tensor(-1.5), bits),
    )
    program = RowProgram(1, [(n, torch.float32), (n, torch.bfloat16)])
    places = [program.constant(c) for c in rowwise.linear_constants(operands)]
    places += [-1] * (6 - len(places))
    for to in (1, 2):
        program.emit(Op.LINEAR, Columns(to), Columns(0), k, n, bits, *places)
    x = torch.randn(rows, k, generator=generator)
    x[0] = 1e30
    got, want = rowwise.rowwise([x], program, rows), rowwise.rowwise_reference([x], program, rows)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def apply(kind: Unary, x: Tensor) -> Tensor:
    program = RowProgram(1, [(x.shape[1], torch.float32)])
    program.emit(Op.UNARY, kind, Columns(1), Columns(0), x.shape[1], program.number(0.1))
    return rowwise.rowwise([x], program, len(x))[0]


def grid(bound: float) -> Tensor:
    """Arguments of both signs, evenly spaced and of every magnitude down to 1e-30, 0 and the infinitely large."""
    even = torch.linspace(-bound, bound, 1_000_001)
    small = torch.logspace(-30, 1, 100_000)
    return torch.cat([even, small, -small, torch.tensor([0.0, -0.0, 1e30, -1e30])])[None]


def test_gelu_keeps_the_error_it_states() -> None:
    x = grid(20)
    exact = torch.nn.functional.gelu(x.double())
    error = (apply(Unary.GELU, x).double() - exact).abs()
    assert error.max() <= 3e-7
    near = (x > -2) & (exact != 0)
    assert (error[near] / exact[near].abs()).max() <= 6e-6


@pytest.mark.parametrize("kind", [Unary.GELU_TANH, Unary.SIGMOID, Unary.SILU, Unary.TANH], ids=lambda k: k.name)
def test_functions_with_an_exponential_keep_the_error_they_state(kind: Unary) -> None:
    x = grid(30)
    exact = {
        Unary.GELU_TANH: lambda v: torch.nn.functional.gelu(v, approximate="tanh"),
        Unary.SIGMOID: torch.sigmoid,
        Unary.SILU: torch.nn.functional.silu,
        Unary.TANH: torch.tanh,
    }[kind](x.double())
    error = (apply(kind, x).double() - exact).abs()
    assert (error / exact.abs().clamp_min(1)).max() <= 2e-6


@pytest.mark.parametrize("kind", list(Unary), ids=lambda k: k.name)
def test_what_is_not_a_number_stays_so(kind: Unary) -> None:
    assert apply(kind, torch.full((3, 21), float("nan"))).isnan().all()


@given(SEEDS, st.integers(1, 600), st.floats(-3, 4))
@settings(max_examples=25, deadline=None)
def test_layer_norm_of_rows_far_from_zero(seed: int, width: int, magnitude: float) -> None:
    """The variance is taken about the mean: a mean a thousand times the deviation costs no digits."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, width, generator=generator) + 10.0**magnitude
    program = RowProgram(1, [(width, torch.float32)])
    program.emit(Op.LAYER_NORM, Columns(1), Columns(0), width, -1, -1, program.number(1e-5))
    (got,) = rowwise.rowwise([x], program, 5)
    exact = torch.nn.functional.layer_norm(x.double(), (width,))
    # what the rounding of the mean alone costs, in deviations
    tolerance = 1e-5 + 10.0**magnitude * 1e-6
    torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance)


def test_inputs_are_read_within_their_columns_only() -> None:
    """Neighbouring columns hold NaN, which any product or sum would carry on."""
    for columns in range(1, 40):
        whole = torch.full((35, columns + 20), float("nan"))
        x = whole[:, 7 : 7 + columns].normal_(generator=torch.Generator().manual_seed(columns))
        program = RowProgram(1, [(columns, torch.float32)])
        weight = program.constant(torch.eye(columns))
        program.emit(Op.FLOAT_LINEAR, Columns(1), Columns(0), columns, columns, weight, -1)
        program.emit(Op.LAYER_NORM, Columns(1), Columns(1), columns, -1, -1, program.number(1e-5))
        (got,) = rowwise.rowwise([x], program, 35)
        torch.testing.assert_close(got, torch.nn.functional.layer_norm(x, (columns,)), rtol=1e-4, atol=1e-4)


def test_no_rows_give_no_rows() -> None:
    program = RowProgram(1, [(4, torch.float32)])
    program.emit(Op.COPY, Columns(1), Columns(0), 4)
    (got,) = rowwise.rowwise([torch.empty(0, 4)], program, 1)
    assert got.shape == (0, 4)


def test_matrices_with_more_rows_than_tokens_do_not_count() -> None:
    program = RowProgram(2, [(6, torch.float32)])
    program.emit(Op.PRODUCT, Columns(2), Columns(0), 9, 6, 1)
    inputs = [torch.randn(4, 9), torch.randn(18, 6)]
    (got,) = rowwise.rowwise(inputs, program, 2)
    want = torch.cat([inputs[0][:2] @ inputs[1][:9], inputs[0][2:] @ inputs[1][9:]])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_any_number_of_threads_gives_the_same() -> None:
    x, threads = torch.randn(1000, 24), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = apply(Unary.GELU, x)
        torch.set_num_threads(2)
        assert torch.equal(one, apply(Unary.GELU, x))
    finally:
        torch.set_num_threads(threads)


def test_shapes_are_known_without_running() -> None:
    rowwise.register_fakes(library.kernels().name)
    program = RowProgram(2, [(6, torch.float32), (3, torch.bfloat16)])
    with FakeTensorMode():
        got = rowwise.rowwise([torch.empty(4, 9), torch.empty(18, 6)], _with_product(program), 2)
    assert [(tuple(x.shape), x.dtype) for x in got] == [((4, 6), torch.float32), ((4, 3), torch.bfloat16)]


def _with_product(program: RowProgram) -> RowProgram:
    program.emit(Op.PRODUCT, Columns(2), Columns(0), 9, 6, 1)
    return program


# --- programs that are none -------------------------------------------------------------------------------------------

VALID = [Op.COPY, 5, 1, 0, 0, 0, 8]
MALFORMED = {
    "unknown opcode": [99, 0],
    "negative opcode": [-1, 0],
    "ends early": VALID[:-2],
    "ends after its opcode": [Op.COPY],
    "too many operands": [Op.COPY, 6, 1, 0, 0, 0, 8, 0],
    "negative operand count": [Op.COPY, -5, 1, 0, 0, 0, 8],
    "no such slot": [Op.COPY, 5, 1, 0, 7, 0, 8],
    "negative slot": [Op.COPY, 5, -1, 0, 0, 0, 8],
    "writes an input": [Op.COPY, 5, 0, 0, 1, 0, 8],
    "too wide": [Op.COPY, 5, 1, 0, 0, 0, 9],
    "no width": [Op.COPY, 5, 1, 0, 0, 0, 0],
    "column past the end": [Op.COPY, 5, 1, 1, 0, 0, 8],
    "column that overflows": [Op.COPY, 5, 1, 2**63 - 2, 0, 0, 8],
    "negative column": [Op.COPY, 5, 1, 0, 0, -1, 8],
    "unknown function": [Op.UNARY, 7, 7, 1, 0, 0, 0, 8, 0],
    "no slope": [Op.UNARY, 7, Unary.LEAKY_RELU, 1, 0, 0, 0, 8, 5],
    "unknown combination": [Op.SCALAR, 7, 3, 1, 0, 0, 0, 8, 0],
    "no number": [Op.SCALAR, 7, 0, 1, 0, 0, 0, 8, -1],
    "unknown broadcast": [Op.BINARY, 9, 0, 1, 0, 0, 0, 0, 0, 8, 3],
    "one row per image of rows per token": [Op.BINARY, 9, 0, 1, 0, 0, 0, 0, 0, 8, Broadcast.IMAGE],
    "norm of the wrong length": [Op.LAYER_NORM, 8, 1, 0, 0, 0, 8, 1, -1, 0],
    "vector of the wrong type": [Op.AFFINE, 7, 1, 0, 0, 0, 8, 2, -1],
    "no constant": [Op.AFFINE, 7, 1, 0, 0, 0, 8, 9, -1],
    "constant below -1": [Op.AFFINE, 7, 1, 0, 0, 0, 8, -2, -1],
    "linear without a scale": [Op.LINEAR, 13, 1, 0, 0, 0, 8, 8, 8, 0, 0, 2, -1, 0, -1],
    "linear without a weight": [Op.LINEAR, 13, 1, 0, 0, 0, 8, 8, 8, 0, 0, -1, 0, 0, -1],
    "packed for another width": [Op.LINEAR, 13, 1, 0, 0, 0, 8, 8, 8, 0, 0, 3, 0, 0, -1],
    "sixteen bits": [Op.LINEAR, 13, 1, 0, 0, 0, 8, 8, 16, 0, 0, 2, 0, 0, -1],
    "contracts nothing": [Op.LINEAR, 13, 1, 0, 0, 0, 0, 8, 8, 0, 0, 2, 0, 0, -1],
    "float weight of another shape": [Op.FLOAT_LINEAR, 8, 1, 0, 0, 0, 8, 8, 0, -1],
    "product with an output": [Op.PRODUCT, 7, 1, 0, 0, 0, 8, 8, 1],
    "product with too few rows": [Op.PRODUCT, 7, 1, 0, 0, 0, 8, 8, 2],
    "product that ends early": [Op.PRODUCT, 7, 1, 0, 0, 0],
}


def run_code(code: list[int], rows_per_image: int = 5) -> list[Tensor]:
    vector, short = torch.ones(8), torch.ones(7)
    packed, other = torch.ones(16, 16, 4, dtype=torch.int8), torch.ones(16, 8, 4, dtype=torch.int8)
    program = RowProgram(3, [], [8], list(map(int, code)), [vector, short, packed, other], [0.5])
    program.inputs, program.outputs = 1, [(8, torch.float32)]
    inputs = [torch.randn(5, 8), torch.randn(3, 8)] if code[0] == Op.PRODUCT else [torch.randn(5, 8)]
    return rowwise.rowwise(inputs, program, rows_per_image)


def test_the_program_that_the_malformed_ones_vary_runs() -> None:
    assert run_code(VALID)[0].shape == (5, 8)
    assert run_code([Op.LINEAR, 13, 1, 0, 0, 0, 8, 8, 8, 0, 0, 2, 0, 0, -1])[0].shape == (5, 8)


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_programs_are_refused(name: str) -> None:
    with pytest.raises(RuntimeError):
        run_code(MALFORMED[name])


@given(st.lists(st.integers(-3, 15), max_size=40), st.integers(-1, 7))
@settings(max_examples=300, deadline=None)
def test_random_code_runs_or_is_refused(code: list[int], rows_per_image: int) -> None:
    try:
        (got,) = run_code(code or [0], rows_per_image)
    except RuntimeError as error:
        if "rowwise: " not in str(error):
            raise
    else:
        assert got.shape == (5, 8)


@pytest.mark.parametrize("flaw", ["type", "dimensions", "rows"])
def test_inputs_that_do_not_fit_are_refused(flaw: str) -> None:
    x = {"type": torch.ones(5, 8).double(), "dimensions": torch.ones(5, 8, 1), "rows": torch.ones(3, 8)}[flaw]
    program = RowProgram(2, [(8, torch.float32)])
    program.emit(Op.COPY, Columns(2), Columns(1), 8)
    with pytest.raises(RuntimeError, match="rowwise"):
        rowwise.rowwise([torch.ones(5, 8), x], program, 5)


@given(SEEDS, st.sampled_from((2, 3, 4, 8)), st.integers(1, 200), st.sampled_from((torch.float32, torch.bfloat16)))
@settings(max_examples=40, deadline=None)
def test_codes_equal_those_of_the_reference(seed: int, bits: int, width: int, dtype: torch.dtype) -> None:
    """Halves are rounded to even, and what is far out is clamped."""
    generator = torch.Generator().manual_seed(seed)
    program = RowProgram(1, [(width, torch.float32)])
    factor, offset = torch.rand(width, generator=generator) + 0.5, torch.rand(width, generator=generator)
    places = program.constant(factor), program.constant(offset)
    program.emit(Op.QUANTIZE, Columns(1), Columns(0), width, bits, *places)
    x = (torch.randn(33, width, generator=generator) * (1 << bits)).to(dtype)
    factor[0], offset[0] = 1.0, 0.0
    x[:, 0] = torch.arange(33).to(dtype) / 2 - 4
    x[0], x[1] = 1e30, -1e30
    (got,) = rowwise.rowwise([x], program, len(x))
    want = integer_reference.quantize_codes(x.float(), factor, offset, bits)
    assert torch.equal(got, want.float())
    assert int(got.min()) == 0
    assert int(got.max()) == (1 << bits) - 1

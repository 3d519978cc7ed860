"""Decoding kernels give their twins' bits, for the experts that have rows and for no others.

Products in parts equal whole ones.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ops.problems import CUDA, DEVICE, DTYPES, SHAPES, Problem, Shape, assert_within, outputs, wide
from peft_moe_lora.ops import Activation, Dropout, reference
from peft_moe_lora.ops.quantize import BLOCKSIZES, code_of, quantize
from peft_moe_lora.ops.quantized import Codes4bit, Codes8bit, QuantizedWeight

GOLDEN = Path(__file__).parents[1] / "golden" / "quantized.safetensors"
E = 5
EVEN, UNEVEN = (E, 16, 64), (E, 10, 22)


def stack(shape, dtype=torch.float32):
    return (torch.randn(shape) * 0.02).to(DEVICE, dtype)


def mxfp4(shape, dtype=torch.float32):
    """Any bytes, and scales from 2**-20 to 2**4."""
    n, R, C = shape
    packed = torch.randint(0, 256, (n * R * C // 2,), device=DEVICE)
    scales = torch.randint(107, 132, (n * R * C // 32,), device=DEVICE)
    return Codes4bit(
        format="mxfp4",
        stored_shape=shape,
        dtype=dtype,
        packed=packed.to(torch.uint8),
        code=code_of("mxfp4", torch.device(DEVICE)),
        blocksize=32,
        low_first=True,
        scales=scales.to(torch.uint8),
    )


def fp8(shape, tile=(8, 16), exponents=False, dtype=torch.float32):
    """Every bit pattern, and one scale per tile."""
    n, R, C = shape
    codes = torch.arange(n * R * C, device=DEVICE) % 256
    # NaN has a test of its own
    codes = (
        torch.where((codes & 0x7F) == 0x7F, 1, codes)
        .to(torch.uint8)
        .view(torch.float8_e4m3fn)
        .view(shape)
    )
    tiles = n, -(-R // tile[0]), -(-C // tile[1])
    scales = torch.rand(tiles, device=DEVICE) + 0.01
    if exponents:
        scales = torch.randint(100, 140, tiles, device=DEVICE).to(torch.uint8)
    return Codes8bit(
        format="fp8", stored_shape=shape, dtype=dtype, codes=codes, scales=scales, tile=tile
    )


def e4m3(byte):
    """The value of a bit pattern, from its definition."""
    sign, exponent, mantissa = byte >> 7, (byte >> 3) & 15, byte & 7
    value = mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -value if sign else value


WEIGHTS = {
    "nf4 nested": lambda: quantize(stack(EVEN), "nf4"),
    "nf4 plain": lambda: quantize(stack(EVEN), "nf4", double_quant=False),
    "fp4 blocks across rows": lambda: quantize(stack(UNEVEN), "fp4"),
    "nf4 blocks across experts, nested": lambda: quantize(stack(UNEVEN), "nf4", blocksize=256),
    "mxfp4": lambda: mxfp4(EVEN),
    "int8": lambda: quantize(stack(UNEVEN), "int8"),
    "fp8 tiles": lambda: fp8(EVEN),
    "fp8 short tiles, exponents": lambda: fp8(UNEVEN, exponents=True),
    "fp8 one scale an expert": lambda: fp8(UNEVEN, tile=UNEVEN[1:]),
}
weights = pytest.mark.parametrize("name", WEIGHTS)


def offsets_of(rows):
    return torch.tensor(
        [0, *torch.tensor(rows).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE
    )


def decoded(ops, weight, first, count, rows):
    out = torch.empty(count, *weight.stored_shape[1:], dtype=weight.dtype, device=DEVICE).fill_(
        float("nan")
    )
    assert ops.dequantize(weight, offsets_of(rows), first, out) is out
    return out


@weights
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_bits_are_the_twins(kernels, name, dtype):
    weight = replace(WEIGHTS[name](), dtype=dtype)
    rows = [3, 0, 1, 7, 0]
    for first, count in ((0, E), (1, 3)):
        actual, expected = (
            decoded(ops, weight, first, count, rows) for ops in (kernels, reference)
        )
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
        for j in range(count):
            assert actual[j].isnan().all() == (rows[first + j] == 0), (
                "experts without rows are left as they were"
            )
        assert torch.equal(actual[2], weight.dense()[first + 2])


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_every_blocksize_decodes_to_the_twins_bits(kernels, blocksize, nested):
    for shape in ((3, 64, 96), (3, 31, 34)):
        weight = quantize(
            stack(shape, torch.float16), "nf4", blocksize=blocksize, double_quant=nested
        )
        actual = decoded(kernels, weight, 0, 3, [1, 1, 1])
        assert torch.equal(actual, weight.dense())
        assert torch.equal(actual, decoded(reference, weight, 0, 3, [1, 1, 1]))


def test_eight_bit_floats_are_what_they_are_defined_as(kernels):
    weight = fp8((1, 2, 128), tile=(2, 128))
    weight = replace(weight, scales=torch.ones_like(weight.scales))
    expected = torch.tensor(
        [e4m3(b) for b in weight.codes.view(torch.uint8).flatten().tolist()], device=DEVICE
    )
    for ops in (kernels, reference):
        assert torch.equal(decoded(ops, weight, 0, 1, [1]).flatten(), expected)
    nan = replace(
        weight,
        codes=torch.full_like(weight.codes.view(torch.uint8), 0x7F).view(torch.float8_e4m3fn),
    )
    assert decoded(kernels, nan, 0, 1, [1]).isnan().all()


def test_the_least_exponent_is_no_zero(kernels):
    weight = replace(
        mxfp4(EVEN),
        scales=torch.zeros(EVEN[0] * EVEN[1] * EVEN[2] // 32, dtype=torch.uint8, device=DEVICE),
    )
    weight = replace(weight, packed=torch.full_like(weight.packed, 0x77))
    assert torch.equal(weight.dense(), torch.full(EVEN, 6 * 2.0**-127, device=DEVICE))
    assert torch.equal(decoded(kernels, weight, 0, E, [1] * E), weight.dense())


def test_experts_that_share_a_byte_are_refused(kernels):
    weight = quantize(stack((3, 5, 7)), "nf4")
    with pytest.raises(ValueError, match="share bytes in nf4"):
        decoded(kernels, weight, 0, 3, [1, 1, 1])
    assert torch.equal(decoded(reference, weight, 0, 3, [1, 1, 1]), weight.dense())


# ---- products in parts ---------------------------------------------------------------------------


def transposed(weight):
    return weight.transpose(1, 2)


def quantized_as(format, dense):
    """[E, N, K] stored in a format, in its own order of bytes."""
    if format != "fp8":
        return quantize(dense, format)
    scales = dense.float().abs().amax((1, 2), keepdim=True) / 448
    codes = (dense / scales).to(torch.float8_e4m3fn)
    return Codes8bit(
        format="fp8",
        stored_shape=tuple(dense.shape),
        dtype=dense.dtype,
        codes=codes,
        scales=scales,
        tile=tuple(dense.shape[1:]),
    )


def check(kernels, name, problem, weight, *args, at=1, **kwargs):
    """Kernel and twin on quantized weights, against fp64 on the decoded weights."""
    actual = outputs(kernels, name, *args[:at], weight, *args[at:], **kwargs)
    twin = outputs(reference, name, *args[:at], weight, *args[at:], **kwargs)
    exact_args = [wide(a) for a in (*args[:at], weight.dense(), *args[at:])]
    exact = outputs(reference, name, *exact_args, **{k: wide(v) for k, v in kwargs.items()})
    for a, t, e in zip(actual, twin, exact, strict=True):
        if a.shape[0] == problem.M:
            a, t, e = (v[: problem.valid] for v in (a, t, e))
        assert_within(a, t, e, problem.dtype)


PARTS = [(shape, "nf4", 2) for shape in (SHAPES[0], SHAPES[1], *SHAPES[3:6], *SHAPES[8:])]
# one expert at a time, and all at once; rows of 8 bits; NaN in the scratch of experts without rows
PARTS += [
    (SHAPES[1], "int8", 1),
    (SHAPES[7], "fp8", 3),
    (SHAPES[0], "nf4", 99),
    (SHAPES[3], "fp8", 99),
]


@pytest.mark.parametrize(
    ("shape", "format", "experts_of_a_part"), PARTS, ids=lambda v: v if type(v) is str else None
)
def test_products_in_parts_are_whole(kernels, monkeypatch, shape, format, experts_of_a_part):
    dtype = DTYPES[-1]
    problem = Problem(shape, dtype)
    routing = kernels.route(problem.index, shape.E)
    bytes_of_one = 2 * shape.I * shape.H * dtype.itemsize
    monkeypatch.setattr(
        "peft_moe_lora.ops.kernels.parts.SCRATCH_BYTES", experts_of_a_part * bytes_of_one
    )
    monkeypatch.setattr("peft_moe_lora.ops.kernels.codes.product_4bit.MAX_BLOCK_M", 0)
    up, down = quantized_as(format, problem.up), quantized_as(format, problem.down)
    lora = {"xa": problem.xa, "lora_B": problem.up_B, "bias": problem.up_bias, "gather": True}
    check(kernels, "expert_linear_act", problem, up, problem.x, routing, Activation(), **lora)
    lora = {"xa": problem.xa, "lora_B": problem.up_A.transpose(1, 2)}
    check(
        kernels,
        "expert_linear",
        problem,
        transposed(up),
        problem.rows(2 * shape.I),
        routing,
        **lora,
    )
    lora = {"xa": problem.xa, "lora_B": problem.down_A.transpose(1, 2), "gather": True}
    check(kernels, "expert_linear", problem, transposed(down), problem.x, routing, **lora)
    check(
        kernels,
        "expert_linear",
        problem,
        down,
        problem.rows(shape.I),
        routing,
        bias=problem.down_bias,
    )


def test_parts_number_their_experts_from_zero_and_cover_every_row_once(kernels):
    from peft_moe_lora.ops.kernels.routing import part_tables

    for shape in SHAPES:
        problem = Problem(shape, torch.float32, skew=True)
        routing = kernels.route(problem.index, shape.E)
        whole = [tuple(line) for line in routing.tiles.tolist() if line[0] >= 0]
        for count in (1, 2, 3, shape.E):
            found = []
            for i, part in enumerate(part_tables(routing, count)):
                lines = part.tiles.tolist()
                number = lines[-2][1]
                end = routing.expert_offsets[min((i + 1) * count, shape.E)].item()
                assert lines[-2:] == [[-1, number], [-1, 0]]
                assert all(e == -1 and row == end for e, row in lines[number:-2]), (
                    "a tile ends where the next begins"
                )
                found += [(e + i * count, row) for e, row in lines[:number]]
            assert found == whole


# ---- codes decoded by their product --------------------------------------------------------------


def transposed_storage(weight):
    """[E, N, K] whose bytes are in the order of [E, K, N]."""
    return transposed(quantize(weight.dense().transpose(1, 2).contiguous(), "nf4"))


def as_mxfp4(dense):
    weight = mxfp4(tuple(dense.shape), dense.dtype)
    return replace(weight, scales=weight.scales - 10)


def nf4(dense, **settings):
    return quantize(dense, "nf4", **settings)


FEW_ROWS = {
    "even": (Shape(12, 3, 2, 64, 64, 16, ""), nf4),
    "one token, empty experts": (Shape(1, 8, 2, 128, 64, 1, ""), nf4),
    "rank past the width": (Shape(5, 2, 1, 64, 64, 80, ""), lambda dense: quantize(dense, "fp4")),
    "K and N no multiples of a block": (
        Shape(4, 2, 2, 192, 64, 6, ""),
        lambda dense: quantize(dense, "fp4", blocksize=32, double_quant=False),
    ),
    "blocks of many rows, tiles of 32": (
        Shape(70, 2, 1, 64, 64, 4, ""),
        lambda dense: nf4(dense, blocksize=4096),
    ),
    "a block and a half in a row": (
        Shape(4, 2, 1, 64, 192, 4, ""),
        lambda dense: nf4(dense, blocksize=128),
    ),
    "stored the other way": (
        Shape(12, 3, 2, 128, 64, 16, ""),
        lambda dense: transposed_storage(nf4(dense)),
    ),
    "mxfp4": (Shape(12, 3, 2, 64, 64, 16, ""), as_mxfp4),
    "more experts than rows": (Shape(3, 12, 2, 64, 64, 3, ""), nf4),
}


@pytest.fixture
def no_scratch(monkeypatch):
    """Only products may decode; a scratch is an error."""

    def refuse(*args):
        raise AssertionError("experts were decoded into a scratch")

    monkeypatch.setattr("peft_moe_lora.ops.kernels.parts.dequantize", refuse)
    # every tile size that has a row in the table
    monkeypatch.setattr("peft_moe_lora.ops.kernels.codes.product_4bit.MAX_BLOCK_M", 32)


DECODING_DTYPES = [dtype for dtype in DTYPES if dtype.itemsize == 2]


# one dtype in the interpreter, which is slow; the dtypes differ only in a cast
@pytest.mark.parametrize(
    "dtype", DECODING_DTYPES if CUDA else [torch.float16], ids=lambda d: str(d)[6:]
)
@pytest.mark.parametrize("case", FEW_ROWS)
def test_products_of_few_rows_decode_their_codes(kernels, no_scratch, monkeypatch, case, dtype):
    if "tiles of 32" in case:
        # compute capability 9.0 has none by itself
        monkeypatch.setattr("peft_moe_lora.ops.kernels.routing.block_m_for", lambda *numbers: 32)
    check_products_of_few_rows(kernels, case, dtype)


def test_products_of_few_rows_in_fp32(kernels, request):
    """Decoded in the interpreter; on a GPU, whose table has no such row, into the scratch."""
    if not CUDA:
        request.getfixturevalue("no_scratch")
    check_products_of_few_rows(kernels, "K and N no multiples of a block", torch.float32)


def check_products_of_few_rows(kernels, case, dtype):
    shape, quantized = FEW_ROWS[case]
    problem = Problem(shape, dtype)
    routing = kernels.route(problem.index, shape.E)
    up, down = quantized(problem.up), quantized(problem.down)
    lora = {"xa": problem.xa, "lora_B": problem.up_B, "bias": problem.up_bias, "gather": True}
    for activation in (
        Activation(),
        Activation(interleaved=True, limit=0.8),
        Activation("relu2", gated=False),
    ):
        check(kernels, "expert_linear_act", problem, up, problem.x, routing, activation, **lora)
    check(kernels, "expert_linear", problem, up, problem.x, routing, **lora)
    lora = {"xa": problem.xa, "lora_B": problem.down_B, "bias": problem.down_bias}
    check(kernels, "expert_linear", problem, down, problem.rows(shape.I), routing, **lora)
    dropout = Dropout(0.4, torch.tensor([2**31 + 77], device=DEVICE))
    for options in ({}, {"dropout": dropout}):
        lora = {"xa": problem.xa, "lora_B": problem.up_A.transpose(1, 2)} | options
        check(
            kernels,
            "expert_linear",
            problem,
            transposed(up),
            problem.rows(2 * shape.I),
            routing,
            **lora,
        )
        lora = {
            "xa": problem.xa,
            "lora_B": problem.down_A.transpose(1, 2),
            "gather": True,
        } | options
        check(kernels, "expert_linear", problem, transposed(down), problem.x, routing, **lora)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_products_decode_the_bits_of_the_twin(kernels, no_scratch, blocksize, nested):
    """Rows of a unit matrix, one per expert, read the weight itself."""
    dtype, shape = torch.float16, (6, 64, 192)
    weight = quantize(stack(shape, dtype), "nf4", blocksize=blocksize, double_quant=nested)
    for w in (weight, transposed(weight)):
        at = torch.randint(0, w.shape[2], (6,), device=DEVICE)
        x = torch.zeros(6, w.shape[2], dtype=dtype, device=DEVICE)
        x[range(6), at] = 1
        y = kernels.expert_linear(x, w, kernels.route(torch.arange(6, device=DEVICE)[:, None], 6))
        assert torch.equal(y, w.dense()[range(6), :, at])


def test_which_weights_their_products_decode(kernels):
    from peft_moe_lora.ops.kernels.codes.product_4bit import MAX_BLOCK_M, decodes_in_kernel

    half = torch.float16
    weight = quantize(stack((2, 16, 64), half), "nf4")
    assert decodes_in_kernel(weight, 16)
    assert decodes_in_kernel(weight, MAX_BLOCK_M)
    assert not decodes_in_kernel(weight, 2 * MAX_BLOCK_M), (
        "many rows would decode a tile many times"
    )
    assert not decodes_in_kernel(quantize(stack((2, 16, 96), half), "nf4"), 16), (
        "spans would cross rows"
    )
    assert not decodes_in_kernel(quantize(stack((2, 16, 64), half), "int8"), 16)
    assert not decodes_in_kernel(weight.dense(), 16)


def test_the_scratch_is_bounded_and_one_for_all_parts(kernels, monkeypatch):
    from peft_moe_lora.ops.kernels import parts

    weight = quantize(stack((7, 16, 32)), "nf4")
    monkeypatch.setattr(parts, "SCRATCH_BYTES", 3 * 16 * 32 * 4 + 1)
    routing = kernels.route(torch.randint(0, 7, (40, 2), device=DEVICE), 7)
    found = [
        (part, dense.shape[0], dense.data_ptr()) for part, dense, _ in parts.parts(weight, routing)
    ]
    assert [count for _, count, _ in found] == [3, 3, 1]
    assert len({pointer for *_, pointer in found}) == 1
    monkeypatch.setattr(parts, "SCRATCH_BYTES", 1)
    assert {dense.shape[0] for _, dense, _ in parts.parts(weight, routing)} == {1}


def test_a_quantized_weight_is_known_by_its_shape():
    weight = WEIGHTS["nf4 nested"]()
    assert isinstance(weight, QuantizedWeight)
    assert weight.transpose(1, 2).shape == (E, 64, 16)
    assert weight.transpose(1, 2).transpose(2, 1).shape == weight.shape
    assert torch.equal(weight.transpose(1, 2)[3], weight.dense()[3].T)


def test_bits_that_bitsandbytes_wrote(kernels):
    """A file keeps what it stored and decoded, so it need not be installed beside a GPU."""
    from safetensors import safe_open

    with safe_open(GOLDEN, framework="pt", device=DEVICE) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        cases = json.loads(file.metadata()["cases"])
    for name, case in cases.items():
        found = {k.partition(".")[2]: t for k, t in tensors.items() if k.startswith(f"{name}.")}
        expected = found.pop("dense")
        facts = {"stored_shape": tuple(expected.shape), "dtype": expected.dtype, **case}
        if "tile" in facts:
            weight = Codes8bit(**found, **(facts | {"tile": tuple(facts["tile"])}))
        else:
            weight = Codes4bit(**found, **facts)
        out = torch.empty_like(expected)
        assert torch.equal(
            reference.dequantize(weight, offsets_of([1] * len(out)), 0, out), expected
        ), name
        if expected.dtype in DTYPES:
            out = torch.empty_like(expected)
            assert torch.equal(
                kernels.dequantize(weight, offsets_of([1] * len(out)), 0, out), expected
            ), name


LAYERS = [("nf4", SHAPES[1]), ("int8", SHAPES[1]), ("nf4", FEW_ROWS["one token, empty experts"][0])]


@pytest.mark.parametrize(("format", "shape"), LAYERS, ids=["nf4", "int8", "one token"])
def test_a_layer_and_its_gradients(kernels, monkeypatch, format, shape):
    """Whole layers on quantized experts, by both backends."""
    from peft_moe_lora.functional import Projection, experts

    monkeypatch.setattr("peft_moe_lora.ops.kernels.parts.SCRATCH_BYTES", 2 * 40 * 48 * 4)
    problem, found = Problem(shape, torch.float32), {}
    for backend in ("triton", "torch"):
        leaves = [problem.x, problem.weights]
        for A, B in ((problem.up_A, problem.up_B), (problem.down_A, problem.down_B)):
            leaves += [A.flatten(0, 1), B.transpose(0, 1).flatten(1)]
        leaves = [t.clone().requires_grad_() for t in leaves]
        x, weights, up_A, up_B, down_A, down_B = leaves
        up = Projection(quantize(problem.up, format), problem.up_bias, up_A, up_B, 0.5)
        down = Projection(quantize(problem.down, format), problem.down_bias, down_A, down_B, 0.5)
        out = experts(
            x, problem.index, weights, up, down, Activation(), backend=backend, recompute=True
        )
        assert out.shape == (shape.T, shape.H)
        direction = torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out)
        found[backend] = [out.detach(), *torch.autograd.grad(out, leaves, direction)]
    for actual, expected in zip(found["triton"], found["torch"], strict=True):
        torch.testing.assert_close(
            actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item()
        )

"""Every row of the table compiles for its architecture without spills and fits in shared memory.

No GPU is needed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# bytes of shared memory one block may have
SHARED = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
# T of a layer with E=8, top_k=2, chosen so that every class of tiles occurs
# 9.0 has larger tiles for as many rows
LARGE, MIDDLE, MIDDLE_90, SMALL = 2048, 256, 128, 32


def case(T, dtype, r=16, p=0.0):
    return {"T": T, "E": 8, "top_k": 2, "H": 1024, "I": 512, "r": r, "dtype": dtype, "p": p}


CASES = {
    (80, "half"): [case(LARGE, "bfloat16"), case(SMALL, "bfloat16")],
    (80, "single"): [case(LARGE, "float32")],
    (90, "large"): [case(LARGE, "bfloat16")],
    (90, "rank 64"): [case(LARGE, "bfloat16", r=64)],
    (90, "rank 256"): [case(LARGE, "bfloat16", r=256)],
    (90, "small"): [case(MIDDLE_90, "bfloat16"), case(SMALL, "bfloat16")],
    (90, "small, rank 64"): [case(SMALL, "bfloat16", r=64)],
    (100, "half"): [case(LARGE, "bfloat16"), case(MIDDLE, "bfloat16"), case(SMALL, "bfloat16")],
    (100, "rank 64"): [case(LARGE, "bfloat16", r=64)],
    (86, "half"): [case(LARGE, "bfloat16")],
    (120, "half"): [case(LARGE, "bfloat16"), case(SMALL, "bfloat16")],
}

# the kernels of the products that a case runs
ANYWHERE, ROLES = {"_linear_kernel"}, {"_linear_roles_kernel"}
PRODUCTS = {
    (90, "large"): ROLES,
    (90, "rank 64"): ROLES,
    (90, "rank 256"): ROLES,
    (100, "half"): ANYWHERE | {"_linear_ordered_kernel"},
    (100, "rank 64"): ANYWHERE | {"_linear_ordered_kernel"},
}

LINEAR = [
    (80, "float16"),
    (90, "bfloat16"),
    *(pytest.param(arch, "bfloat16", marks=pytest.mark.long) for arch in (100, 120)),
    pytest.param(90, "float32", marks=pytest.mark.long),
]


def compiled_for(arch, cases):
    """What each kernel uses, as `compiling` prints it."""
    # in another process: in this one the kernels may be bound to the interpreter
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parent.parent), env.get("PYTHONPATH", "")])
    command = [sys.executable, str(HERE / "compiling.py"), str(arch), json.dumps(cases)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    # Triton 3.9 warns where a kernel does not say whether multiply-adds are fused
    assert "FP_FUSION" not in done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize(("arch", "which"), CASES, ids=lambda v: str(v))
def test_rows_compile_without_spills_and_fit(arch, which):
    kernels = compiled_for(arch, CASES[arch, which])
    found = {k["kernel"] for k in kernels}
    assert {name for name in found if "_linear_" in name} == PRODUCTS.get((arch, which), ANYWHERE)
    # many ranks are multiplied as weights are
    assert ("_shrink_kernel" in found) == (which != "rank 256")
    assert "_outer_kernel" in found
    for kernel in kernels:
        assert kernel["local"] == 0, f"spills: {kernel}"
        assert kernel["shared"] <= SHARED[arch], f"too much shared memory: {kernel}"


@pytest.mark.parametrize(("arch", "dtype"), LINEAR)
def test_the_update_of_a_linear_layer_compiles_without_spills_and_fits(arch, dtype):
    cases = [
        {"launch": "linear", "dtype": dtype, "T": T, "r": r}
        for T, r in [(1, 128), (2048, 16), (8192, 24), (8192, 128)]
    ]
    kernels = compiled_for(arch, cases)
    names = {k["kernel"] for k in kernels}
    known = {"_one_expert_kernel", "_add_low_rank_kernel", "_outer_kernel", "_sum_chunks_kernel"}
    assert names == known | {"_cast_kernel"}
    for kernel in kernels:
        assert kernel["local"] == 0, f"spills: {kernel}"
        assert kernel["shared"] <= SHARED[arch], f"too much shared memory: {kernel}"


@pytest.mark.parametrize(
    "arch", [80, 90, *(pytest.param(arch, marks=pytest.mark.long) for arch in (100, 120))]
)
def test_masks_of_dropout_compile_with_few_spills(arch):
    for kernel in compiled_for(arch, [case(LARGE, "bfloat16", p=0.05)]):
        # a mask needs more registers than products by roles have left
        spilled = 24 if "roles" in kernel["kernel"] else 0
        assert kernel["local"] <= spilled, f"spills: {kernel}"
        assert kernel["shared"] <= SHARED[arch], f"too much shared memory: {kernel}"


def test_rows_are_loaded_ahead_of_their_mask():
    layer = case(LARGE, "bfloat16", p=0.05)
    found = [k for k in compiled_for(90, [layer]) if k["kernel"] == "_outer_kernel"]
    assert found
    for kernel in found:
        # two blocks of 8192 elements are in flight
        assert kernel["shared"] >= 2 * 8192 * 2, f"nothing is loaded ahead: {kernel}"


def assert_by_roles(kernels, number, spilled=0):
    products = [k for k in kernels if "_linear_" in k["kernel"]]
    assert [k["kernel"] for k in products] == ["_linear_roles_kernel"] * number
    for kernel in products:
        assert kernel["local"] <= spilled, f"spills: {kernel}"
        assert kernel["shared"] <= SHARED[90], f"too much shared memory: {kernel}"
        assert not kernel["serialized"], f"products that do not overlap: {kernel}"


@pytest.mark.parametrize(
    ("dtype", "r", "K"),
    [("bfloat16", 16, 1000), ("bfloat16", 64, 1000), ("float16", 256, 1024)],
)
def test_products_by_roles_compile_without_spills_and_overlap(dtype, r, K):
    assert_by_roles(compiled_for(90, [{"launch": "ordered", "dtype": dtype, "r": r, "K": K}]), 4)


@pytest.mark.parametrize(
    ("dtype", "r", "kind", "limit"),
    [
        ("bfloat16", 16, "silu", 7.0),
        ("float16", 64, "gelu", None),
        ("bfloat16", 256, "relu2", None),
    ],
)
def test_gathered_products_by_roles_compile_without_spills_and_overlap(dtype, r, kind, limit):
    case = {"launch": "gathered", "dtype": dtype, "r": r, "kinds": [kind], "limit": limit}
    # exact gelu of interleaved pairs, which no family has, spills ten registers
    assert_by_roles(compiled_for(90, [case]), 14, spilled=40 if kind == "gelu" else 0)


@pytest.mark.parametrize(
    ("launch", "K", "name"),
    [("ordered", 8200, "_linear_ordered_kernel"), ("gathered", 8256, "_linear_kernel")],
)
def test_a_long_k_is_not_for_roles(launch, K, name):
    case = {"launch": launch, "dtype": "bfloat16", "r": 16, "K": K}
    # gathered rows in halves only: with an activation the kernel still spills at such a K if
    # interleaved, and if ungated with a bias
    kernels = compiled_for(
        90, [case | ({"forms": [(True, False)]} if launch == "gathered" else {"N": 1536})]
    )
    products = [k for k in kernels if "_linear_" in k["kernel"]]
    assert {k["kernel"] for k in products} == {name}
    for kernel in products:
        assert kernel["local"] == 0, f"spills: {kernel}"
        assert kernel["shared"] <= SHARED[90], f"too much shared memory: {kernel}"


def assert_fits_twice(kernel):
    assert kernel["local"] == 0, f"spills: {kernel}"
    assert 2 * (kernel["shared"] + 1024) <= SHARED[90] + 1024, f"too much shared memory: {kernel}"
    assert 2 * kernel["num_warps"] * 32 * kernel["registers"] <= 65536, (
        f"too many registers: {kernel}"
    )


@pytest.mark.parametrize("T", [8192, pytest.param(2048, marks=pytest.mark.long)])
@pytest.mark.parametrize(("dtype", "r"), [("bfloat16", 16), ("float16", 5), ("bfloat16", 24)])
def test_the_one_pass_of_two_operations_compiles_without_spills_twice_a_multiprocessor(T, dtype, r):
    layer = {"T": T, "E": 128, "top_k": 8, "H": 1024, "I": 512, "r": r, "dtype": dtype}
    kernels = [k for k in compiled_for(90, [layer]) if k["kernel"] == "_shrink_outer_kernel"]
    # over dpre, and over gathered rows of dout
    assert len(kernels) == 2
    for kernel in kernels:
        assert_fits_twice(kernel)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize(
    ("dtype", "r", "width", "p"),
    [("bfloat16", 16, 512, 0.0), ("float16", 6, 2880, 0.0), ("bfloat16", 16, 768, 0.05)],
)
def test_the_one_pass_around_an_activation_compiles_without_spills_twice_a_multiprocessor(
    dtype, r, width, p, interleaved
):
    layer = {"T": 8192, "E": 128, "top_k": 8, "H": 1024, "I": width, "r": r, "dtype": dtype}
    layer |= {"interleaved": interleaved, "p": p}
    (kernel,) = [
        k for k in compiled_for(90, [layer]) if k["kernel"] == "_act_backward_outer_kernel"
    ]
    assert_fits_twice(kernel)


@pytest.mark.parametrize("p", [0.0, 0.05])
@pytest.mark.parametrize("kind", ["relu2", "gelu"])
def test_the_one_pass_around_an_activation_without_a_gate_fits_twice_too(kind, p):
    case = {"launch": "ungated", "kind": kind, "dtype": "bfloat16", "p": p}
    kernels = compiled_for(90, [case])
    products = [k for k in kernels if "_linear_" in k["kernel"]]
    assert_by_roles(products, 4, spilled=24 if p else 0)
    (kernel,) = [k for k in kernels if k["kernel"] == "_act_backward_outer_kernel"]
    assert_fits_twice(kernel)


def test_the_one_pass_around_an_activation_spills_two_registers_from_rank_17_on():
    layer = {"T": 8192, "E": 128, "top_k": 8, "H": 1024, "I": 512, "r": 24, "dtype": "bfloat16"}
    (kernel,) = [
        k for k in compiled_for(90, [layer]) if k["kernel"] == "_act_backward_outer_kernel"
    ]
    assert kernel["local"] <= 8, f"more spills than were timed: {kernel}"
    assert_fits_twice(kernel | {"local": 0})


def test_compute_capability_12_takes_no_row_of_9_or_10():
    from peft_moe_lora.ops.kernels.launching import table

    table.lookup.cache_clear()
    for op in {row.op for row in table.TABLE}:
        for block_m in (16, 32, 64, 128):
            blocks = table.lookup(op, 120, 2, block_m)
            sources = [row.arch for row in table.TABLE if row.blocks is blocks]
            assert blocks is None or sources[0] in (80, 120)
    assert table.lookup("linear_ordered", 120, 2, 128) is None


@pytest.mark.parametrize("r", [0, 64])
def test_ordered_products_fit_on_blackwell(r):
    kernels = compiled_for(100, [{"launch": "ordered", "dtype": "bfloat16", "r": r}])
    products = [k for k in kernels if "_linear_" in k["kernel"]]
    assert [k["kernel"] for k in products] == ["_linear_ordered_kernel"] * 4
    for kernel in products:
        assert kernel["local"] == 0, f"spills: {kernel}"
        assert kernel["shared"] <= SHARED[100], f"too much shared memory: {kernel}"


DECODING = {
    80: {"dtype": "float32"},
    90: {"dtype": "bfloat16", "uneven": True},
    100: {"dtype": "bfloat16"},
}


@pytest.mark.parametrize("arch", DECODING)
def test_decoding_compiles_without_spills_and_rounds_every_step(arch):
    kernels = compiled_for(arch, [{"launch": "decoding", **DECODING[arch]}])
    decoding = [k for k in kernels if "dequantize" in k["kernel"]]
    assert len(decoding) == (10 if "uneven" in DECODING[arch] else 5)
    assert len({k["kernel"] for k in decoding}) == 2
    for kernel in kernels:
        assert kernel["local"] == 0, f"spills: {kernel}"
        assert kernel["shared"] <= SHARED[arch], f"too much shared memory: {kernel}"
        # bitsandbytes rounds a nested scale twice
        assert kernel["fused_multiply_adds"] == 0, f"fused: {kernel}"


@pytest.mark.parametrize(("arch", "T"), [(80, 32), (80, 160), (90, 32), (100, 32)])
def test_products_that_decode_compile_without_spills_and_without_a_scratch(arch, T):
    kernels = compiled_for(arch, [{"launch": "products", "dtype": "bfloat16", "T": T}])
    found = [k["kernel"] for k in kernels]
    assert found.count("_linear_kernel") == 11
    assert not any("dequantize" in name for name in found)
    for kernel in kernels:
        assert kernel["local"] == 0, f"spills: {kernel}"
        # the table asks for four programs per multiprocessor
        assert 4 * kernel["shared"] <= SHARED[arch], f"too much shared memory: {kernel}"

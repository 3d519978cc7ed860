"""Warp-specialized products: when they are chosen, and their numbers on an H100 or H200."""

from functools import partial

import pytest
import torch

from ops.problems import ACTIVATIONS, check, hopper, random, rank_rows
from peft_moe_lora.ops import Activation, Dropout

# ---- the choice ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "itemsize", "block_m", "K", "size", "ordered", "gathered"),
    [
        (90, 2, 128, 768, 0, True, True),
        (90, 2, 128, 768, 1, True, True),
        (90, 2, 128, 8192, 1, True, True),
        (90, 2, 128, 8192, 2, True, False),
        (90, 2, 128, 14336, 0, False, False),
        (90, 2, 64, 768, 0, False, False),
        (90, 4, 128, 768, 0, False, False),
        (80, 2, 128, 768, 0, False, False),
        (100, 2, 128, 768, 0, False, False),
        (120, 2, 128, 768, 0, False, False),
        (0, 2, 128, 768, 0, False, False),
    ],
)
def test_the_table_knows_where_roles_pay(
    kernels,
    arch,
    itemsize,
    block_m,
    K,
    size,
    ordered,
    gathered,
):
    from peft_moe_lora.ops.kernels.tiles import tile

    for op, chosen in (("linear_roles", ordered), ("linear_roles_gathered", gathered)):
        assert (tile._blocks(op, arch, itemsize, block_m, K, True, size) is not None) == chosen


@pytest.mark.parametrize(
    ("N", "activation", "p", "narrow"),
    [
        (1856, None, 0.0, True),
        (2688, Activation("relu2", gated=False), 0.0, True),
        (72, None, 0.0, True),
        (704, None, 0.0, False),
        (512, None, 0.0, False),
        (2880, Activation("silu", interleaved=True), 0.0, False),
        (1856, Activation("gelu_tanh", gated=False), 0.0, False),
        (2880, None, 0.1, False),
    ],
    ids=str,
)
def test_a_last_column_tile_that_is_half_empty_is_narrow(kernels, N, activation, p, narrow):
    roles = pytest.importorskip("peft_moe_lora.ops.kernels.sm90.linear_roles")
    assert roles._ends_narrow(N, activation, p) == narrow


# ---- the numbers ---------------------------------------------------------------------------------

# rows of each expert
ROWS = {
    # 35 tiles of rows, with halves that are full, cut or absent; after full tiles 1 and 32 rows,
    # which go with them, and 33
    "tails": [0, 1, 63, 64, 65, 161, 128, 129, 191, 192, 193, 0, 1919, 544],
    # more output tiles than programs, whatever N
    "skewed": [20000, 1, 0, 70, 129, 0, 0, 300],
    "few": [200, 193],
    "nobody": [0, 0, 0, 0],
}
# N, K, r, bias
SIZES = {
    "even": (512, 512, 16, False),
    "a tile of eight columns, ranks short of a step": (520, 264, 24, True),
    "columns that end in a second chunk": (584, 200, 64, True),
    "columns that end with a third chunk, no ranks": (704, 1000, 0, False),
    "one tile of columns, one step of K, ranks past a step": (72, 64, 80, False),
    "the largest rank, K short of a step": (776, 40, 256, True),
    "many tiles of columns, the smallest rank": (2048, 320, 8, True),
}


def sizes_and_dtypes(sizes):
    """Parametrizes with every size in bfloat16 and the first one in float16.

    The other sizes in float16 are slow duplicates: each compiles a kernel for 5 to 10 seconds.
    """
    names = list(sizes)
    half = [
        pytest.param(name, torch.float16, marks=[pytest.mark.long] if name != names[0] else [])
        for name in names
    ]
    return pytest.mark.parametrize(
        ("size", "dtype"), [*((name, torch.bfloat16) for name in names), *half], ids=str
    )


class Product:
    """The operands of one product over experts with these rows, then sentinels' rows, all NaN."""

    def __init__(self, kernels, rows, N, K, r, bias, transposed, dtype):
        E = len(rows)
        # enough sentinels for tiles of 128 rows, even if no row is routed
        ids = torch.cat(
            [torch.full((n,), e) for e, n in enumerate([*rows, 37 + 200 * E * (not sum(rows))])]
        )
        self.routing = kernels.route(ids[torch.randperm(len(ids))][:, None].cuda(), E)
        assert self.routing.block_m == 128
        self.valid, self.M, self.N, self.dtype = sum(rows), len(ids), N, dtype
        weight = random(E, N, K, dtype=dtype, scale=K**-0.5)
        self.weight = weight.transpose(1, 2).contiguous().transpose(1, 2) if transposed else weight
        self.x, self.bias = self.rows(K), random(E, N, dtype=dtype) if bias else None
        # one token per row
        self.tokens = random(self.M, K, dtype=dtype)
        self.tokens[self.routing.row_token[self.valid :].long()] = float("nan")
        self.xa, self.lora_B = None, None
        if r:
            self.xa = rank_rows(self.M, r, dtype)
            self.xa[self.valid :] = float("nan")
            self.lora_B = random(N, r * E, scale=r**-0.5).view(N, E, r).permute(1, 0, 2)

    def rows(self, width):
        rows = random(self.M, width, dtype=self.dtype)
        rows[self.valid :] = float("nan")
        return rows

    @property
    def operands(self):
        return self.x, self.weight, self.routing

    @property
    def rest(self):
        return {"bias": self.bias, "xa": self.xa, "lora_B": self.lora_B}

    def by(self, launcher):
        """y; NaN where the kernel wrote nothing."""
        y = torch.full((self.M, self.N), float("nan"), device="cuda", dtype=self.dtype)
        assert launcher(self.writing(y))
        return y

    def writing(self, y):
        """What the launchers take."""
        from peft_moe_lora.ops.kernels.tiles.product import Product

        return Product(*self.operands, **self.rest, y=y)


@pytest.fixture
def product(kernels):
    def make(rows, size, transposed=False, dtype=torch.bfloat16, sizes=SIZES):
        return Product(kernels, ROWS[rows], *sizes[size], transposed, dtype)

    return make


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("transposed", [False, True])
@sizes_and_dtypes(SIZES)
def test_the_bits_of_linear_ordered(product, size, transposed, dtype):
    from peft_moe_lora.ops.kernels.linear_ordered import linear_ordered
    from peft_moe_lora.ops.kernels.sm90.by_roles import by_roles

    # in one test, because all of them run the kernel that the first one compiles
    for rows in ROWS:
        p = product(rows, size, transposed, dtype)
        y, expected = p.by(by_roles), p.by(linear_ordered)
        assert torch.equal(y[: p.valid], expected[: p.valid]), rows
        assert y[p.valid :].isnan().all(), rows


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("transposed", [False, True])
@sizes_and_dtypes(SIZES)
def test_what_the_twin_says(kernels, product, size, transposed, dtype):
    from peft_moe_lora.ops.kernels.launching import launch

    p = product("tails", size, transposed, dtype)
    launch.forget()
    check(kernels, "expert_linear", p, *p.operands, **p.rest)
    assert "linear_roles" in {key[0] for key, _ in launch._plans}


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("rows", ROWS)
def test_every_product_finds_the_queue_at_its_beginning(kernels, product, rows):
    p = product(rows, "even")
    narrow = random(len(ROWS[rows]), 72, 512, dtype=p.dtype)
    first = kernels.expert_linear(*p.operands, **p.rest)
    for _ in range(5):
        # another number of output tiles from the same table
        kernels.expert_linear(p.x, narrow, p.routing)
        assert torch.equal(
            kernels.expert_linear(*p.operands, **p.rest)[: p.valid], first[: p.valid]
        )
    assert p.routing.tiles[-1].tolist() == [-1, 0]


@pytest.mark.gpu
@hopper
def test_a_captured_product_follows_its_rows(kernels, product):
    p = product("skewed", "a tile of eight columns, ranks short of a step")
    kernels.expert_linear(*p.operands, **p.rest)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernels.expert_linear(*p.operands, **p.rest)
    for _ in range(5):
        p.x[: p.valid].normal_()
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(
            captured[: p.valid], kernels.expert_linear(*p.operands, **p.rest)[: p.valid]
        )
    assert p.routing.tiles[-1].tolist() == [-1, 0]


@pytest.mark.gpu
@hopper
def test_a_replayed_product_has_the_same_bits(kernels, product, monkeypatch):
    from peft_moe_lora.ops.kernels.launching import launch, replay

    # filling buffers with NaN is work that a recording could not replay
    monkeypatch.undo()
    replay.forget()
    launch.forget()
    p = product("tails", "even")
    index, E = torch.randint(0, 14, (4000, 1), device="cuda"), 14

    def compose(x, index, weight, xa, lora_B):
        return (kernels.expert_linear(x, weight, kernels.route(index, E), xa=xa, lora_B=lora_B),)

    for _ in range(5):
        x, xa = random(4000, 512, dtype=p.dtype), random(4000, 16, dtype=p.dtype)
        (y,) = kernels.replayed(compose, x, index, p.weight, xa, p.lora_B)
        assert torch.equal(y, compose(x, index, p.weight, xa, p.lora_B)[0])
    assert [kind.__class__ for kind in replay._kinds.values()] == [replay._Replay]
    assert "linear_roles" in {key[0] for key, _ in launch._plans}


@pytest.mark.gpu
@hopper
def test_tables_of_some_experts_have_queues_of_their_own(kernels, product):
    from peft_moe_lora.ops.kernels.routing import part_tables
    from peft_moe_lora.ops.kernels.sm90.by_roles import by_roles

    p = product("tails", "the largest rank, K short of a step")
    whole, y = p.by(by_roles), torch.full((p.M, p.N), float("nan"), device="cuda", dtype=p.dtype)
    for first, part in zip(range(0, 14, 4), part_tables(p.routing, 4), strict=True):
        of = slice(first, first + 4)
        some = {"weight": p.weight[of], "bias": p.bias[of], "lora_B": p.lora_B[of]}
        assert by_roles(p.writing(y)._replace(routing=part, **some))
        assert part.tiles[-1].tolist() == [-1, 0]
    assert torch.equal(y[: p.valid], whole[: p.valid])


# ---- rows gathered -------------------------------------------------------------------------------

# N, K, r, bias
GATHERED = {
    "even": (512, 512, 16, False),
    "a tile of eight columns, ranks short of a step": (528, 256, 24, True),
    "columns that end in a second chunk": (592, 192, 64, True),
    "columns that end with a third chunk, no ranks": (704, 1024, 0, False),
    "one tile of columns, one step of K, ranks past a step": (80, 64, 80, False),
    "the largest rank": (784, 128, 256, True),
    "many tiles of columns, the smallest rank": (2048, 320, 8, True),
}


def activations_sizes_and_dtypes():
    """Yields every activation with every size in bfloat16, and with the first one in float16.

    How columns are arranged does not depend on the formula. So every size is tested with gate and
    up in halves, alternating and without gate; with another formula some sizes are slow duplicates,
    and so are the other sizes in float16.
    """
    activations = [*ACTIVATIONS, Activation("relu2", interleaved=True)]
    arranged = [Activation(), Activation("relu2", gated=False), activations[-1]]
    assert all(activation in activations for activation in arranged)
    first, second, *_, widest, _ = GATHERED
    for activation in activations:
        for size in GATHERED:
            is_slow = activation not in arranged and size not in (first, second, widest)
            marks = [pytest.mark.long] if is_slow else []
            yield pytest.param(activation, size, torch.bfloat16, marks=marks)
            marks = [pytest.mark.long] if size != first else []
            yield pytest.param(activation, size, torch.float16, marks=marks)


@pytest.fixture
def gathered(product):
    return partial(product, sizes=GATHERED)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("transposed", [False, True])
@sizes_and_dtypes(GATHERED)
def test_products_of_gathered_rows_are_the_twins(kernels, gathered, ran, size, dtype, transposed):
    from peft_moe_lora.ops.kernels.launching import launch

    # in one test, because all of them run the kernel that the first one compiles
    for rows in ROWS:
        launch.forget()
        p = gathered(rows, size, transposed, dtype)
        check(kernels, "expert_linear", p, p.tokens, p.weight, p.routing, gather=True, **p.rest)
        assert ran("linear_roles"), rows
        assert p.routing.tiles[-1].tolist() == [-1, 0], rows


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize(("activation", "size", "dtype"), activations_sizes_and_dtypes(), ids=str)
def test_an_activation_of_gathered_rows(kernels, gathered, ran, activation, size, dtype):
    # the gate and up halves of a transposed weight do not form one box
    for transposed in (False, True) if activation.interleaved or not activation.gated else (False,):
        p = gathered("tails", size, transposed, dtype)
        check(
            kernels,
            "expert_linear_act",
            p,
            p.tokens,
            p.weight,
            p.routing,
            activation,
            gather=True,
            **p.rest,
        )
        assert ran("linear_roles")


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    "activation", [None, Activation(), Activation("silu", interleaved=True)], ids=str
)
def test_the_bits_of_the_kernels_without_roles(kernels, gathered, monkeypatch, rows, activation):
    from peft_moe_lora.ops.kernels import linear

    p = gathered(rows, "even")

    def product():
        if activation is None:
            y = kernels.expert_linear(p.tokens, p.weight, p.routing, gather=True, **p.rest)
            return (y[: p.valid],)
        out = kernels.expert_linear_act(
            p.tokens, p.weight, p.routing, activation, gather=True, **p.rest
        )
        return [t[: p.valid] for t in out]

    ours = product()
    monkeypatch.setattr(linear, "by_roles", lambda product: False)
    assert all(torch.equal(a, b) for a, b in zip(ours, product(), strict=True))


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("gather", [False, True], ids=["in order", "gathered"])
@pytest.mark.parametrize(("rows", "r"), [("tails", 16), ("skewed", 24), ("tails", 80)])
def test_a_masked_low_rank_term(kernels, ran, rows, r, gather):
    p = Product(kernels, ROWS[rows], 520, 256, r, True, False, torch.bfloat16)
    x = p.tokens if gather else p.x
    dropout = Dropout(0.3, torch.tensor([77], device="cuda"))
    rest = {**p.rest, "gather": gather, "dropout": dropout}
    (y,) = check(kernels, "expert_linear", p, x, p.weight, p.routing, **rest)
    assert ran("linear_roles")
    again = kernels.expert_linear(x, p.weight, p.routing, **rest)
    assert torch.equal(y[: p.valid], again[: p.valid])


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("keep_pre", [True, False])
@pytest.mark.parametrize("K", [264, 1000])
def test_a_step_of_gathered_rows_that_is_cut(kernels, ran, K, keep_pre):
    p = Product(kernels, ROWS["tails"], 512, K, 16, True, False, torch.bfloat16)
    rest = {**p.rest, "gather": True}
    operands = p.tokens, p.weight, p.routing, Activation()
    pre, act = kernels.expert_linear_act(*operands, keep_pre=keep_pre, **rest)
    assert ran("linear_roles")
    assert (pre is not None) == keep_pre
    checked = check(kernels, "expert_linear_act", p, *operands, **rest)
    assert torch.equal(act[: p.valid], checked[1][: p.valid])


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize(
    "why", ["K is cut", "rows begin off sixteen bytes", "halves end off sixteen bytes"]
)
def test_gathered_rows_that_roles_do_not_take(kernels, ran, why):
    N, K = (552 if why.startswith("halves") else 512), (260 if why.startswith("K") else 256)
    p = Product(kernels, ROWS["tails"], N, K, 16, True, False, torch.bfloat16)
    tokens = p.tokens
    if why.startswith("rows"):
        tokens = torch.cat([tokens.flatten()[:1], tokens.flatten()])[1:].view_as(tokens)
    check(
        kernels,
        "expert_linear_act",
        p,
        tokens,
        p.weight,
        p.routing,
        Activation(),
        gather=True,
        **p.rest,
    )
    assert not ran("linear_roles")

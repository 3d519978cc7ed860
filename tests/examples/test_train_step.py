"""benchmarks/train_step.py on a CPU: every field, and no number where routes disagree."""

import json

import pytest
import torch
from torch import nn

import agreement
import train_step
from models import MODEL_ROUTES, ModelRoute, build_dense, moe_lora_route
from peft_moe_lora.layers import own

ROUTES = ["base", "frozen", "peft", "moe_lora", "moe_lora-recompute", "moe_lora-peft-linear"]
RANK = 16
CPU = torch.device("cpu")


@pytest.fixture
def args() -> train_step.Arguments:
    return train_step.parse_arguments(["--tiny"])


@pytest.fixture
def base(args) -> nn.Module:
    return build_dense(args.sizes, args.dtype, CPU)


@pytest.fixture
def routes(base) -> dict[str, ModelRoute]:
    return {name: MODEL_ROUTES[name](base, RANK) for name in ROUTES}


def test_report_has_every_field(tmp_path, capsys):
    path = tmp_path / "steps.json"
    words = "--tiny --batches 2x12 1x12 --rounds 1".split()
    assert train_step.main([*words, "--routes", *ROUTES, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert report.keys() == {"machine", "date", "what", "command", "losses", "rows"}
    assert report["losses"].keys() == set(ROUTES) - {"base", "frozen"}
    assert "cut to 2 layers" in report["what"]
    expected = [(b, c, r) for b in ("2x12", "1x12") for c in (False, True) for r in ROUTES]
    found = {(row["batch"], row["ckpt"], row["route"]): row for row in report["rows"]}
    assert list(found) == expected
    for (batch, ckpt, name), row in found.items():
        assert row["failed"] is None
        assert min(row[key] for key in ("ms", "tok_s", "peak", "first")) > 0
        assert row["tok_s"] == pytest.approx(1e3 * int(batch[0]) * 12 / row["ms"])
        peft = found[batch, ckpt, "peft"]
        if name != "peft":
            assert row["x_peft"] == pytest.approx(peft["ms"] / row["ms"])
            assert row["peak_of_peft"] == pytest.approx(row["peak"] / peft["peak"])
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + len(expected)
    assert all(row["route"] in line for row, line in zip(report["rows"], table[2:], strict=True))


def test_every_route_runs_on_the_same_weights(base, routes):
    weights = {p.data_ptr() for p in base.parameters()}
    for route in routes.values():
        own = {p.data_ptr() for p in route.trained.values()}
        assert {p.data_ptr() for p in route.model.parameters()} - own == weights


def test_every_route_goes_backward_through_every_layer(args, routes):
    ids = train_step.batch_of(args, train_step.Batch(1, 8))
    for name, route in routes.items():
        reached = []

        def watch(module, inputs, output, reached=reached):
            output.register_hook(lambda gradient: reached.append(gradient.norm()))

        route.model.get_input_embeddings().register_forward_hook(watch)
        route.step(ids)
        assert len(reached) == 1, name
        assert reached[0] > 0, name


def test_adapters_have_the_same_tensors_under_the_same_names(routes):
    shapes = {
        name: {key: p.shape for key, p in route.trained.items()} for name, route in routes.items()
    }
    assert shapes["base"] == shapes["frozen"] == {}
    # layers, A and B of two projections and of four linear layers
    assert len(shapes["peft"]) == 2 * (4 + 8)
    assert shapes["peft"] == shapes["moe_lora"] == shapes["moe_lora-recompute"]


def test_the_peak_holds_adapter_and_optimizer_state(args, routes):
    route = routes["moe_lora"]
    ids = train_step.batch_of(args, train_step.Batch(1, 8))
    route.step(ids)
    adapter = sum(p.numel() * 4 for p in route.trained.values())
    # AdamW's two moments, and one counter per tensor
    assert route.static_bytes() == 3 * adapter + 4 * len(route.trained)
    assert routes["base"].static_bytes() == 0
    # and the gradients
    assert train_step.peak_of_step(route, ids) >= route.static_bytes() + adapter


def leave_pefts_order_out(monkeypatch):
    monkeypatch.setattr(agreement, "to_rank_major", lambda B, r: B)


def leave_the_adapter_out(monkeypatch):
    def zero(route: ModelRoute, *_) -> None:
        for parameter in route.trained.values():
            parameter.data.zero_()

    monkeypatch.setattr(agreement, "fill_adapter", zero)


def double_one_gradient(monkeypatch):
    def doubled(base: nn.Module, rank: int) -> ModelRoute:
        route = moe_lora_route(base, rank)
        A = next(p for name, p in route.trained.items() if "experts.lora_A" in name)
        A.register_hook(lambda gradient: 2 * gradient)
        return route

    monkeypatch.setitem(MODEL_ROUTES, "moe_lora", doubled)


def swap_two_experts(monkeypatch):
    def swapped(base: nn.Module, rank: int) -> ModelRoute:
        route = moe_lora_route(base, rank)
        layer = route.model.base_model.model.model.layers[1].mlp.experts

        def swap(module, inputs):
            x, index, weights = inputs
            # 0 <-> 1
            return x, torch.where(index < 2, 1 - index, index), weights

        layer.register_forward_pre_hook(swap)
        return route

    monkeypatch.setitem(MODEL_ROUTES, "moe_lora", swapped)


DAMAGES = [leave_pefts_order_out, leave_the_adapter_out, double_one_gradient, swap_two_experts]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_routes_that_disagree_get_no_number(monkeypatch, tmp_path, capsys, damage):
    damage(monkeypatch)
    assert train_step.main(["--tiny", "--json", str(tmp_path / "steps.json")]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "No numbers: the " in said.err
    assert not (tmp_path / "steps.json").exists()


@pytest.mark.parametrize(
    "arguments",
    [["--batches", "2048"], ["--rounds", "0"], ["--batches", "1x1"], ["--batches", "axb"]],
    ids=" ".join,
)
def test_bad_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        train_step.parse_arguments(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_the_frozen_route_runs_our_kernels_and_gives_the_same(args, routes, monkeypatch):
    calls = []
    compute = own.compute

    def counted(module, *rest, **options):
        calls.append(module)
        return compute(module, *rest, **options)

    monkeypatch.setattr(own, "compute", counted)
    ids = train_step.batch_of(args, train_step.Batch(1, 8))
    logits = {name: routes[name].model(input_ids=ids).logits for name in ("base", "frozen")}
    assert len(calls) == 2
    assert torch.allclose(logits["frozen"], logits["base"], atol=1e-4)

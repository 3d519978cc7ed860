"""benchmarks/train_step.py on a CPU: every field, shared base weights, no number where routes disagree."""

import importlib
import json
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples" / "benchmarks"
ROUTES = ["base", "peft", "moe_lora", "moe_lora-recompute"]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("train_step")


@pytest.fixture
def routes(script):
    """(arguments, the base model, every route) of the tiny model."""
    args = script.parse_arguments(["--tiny"])
    base = script.build_base(args)
    return args, base, {name: script.ROUTES[name](base, args) for name in ROUTES}


def test_report_has_every_field(script, tmp_path, capsys):
    path = tmp_path / "steps.json"
    arguments = [
        "--tiny",
        "--batches",
        "2x12",
        "1x12",
        "--rounds",
        "1",
        "--routes",
        *ROUTES,
        "--json",
        str(path),
    ]
    assert script.main(arguments) == 0
    report = json.loads(path.read_text())
    assert report.keys() == {"machine", "date", "what", "command", "losses", "rows"}
    assert report["losses"].keys() == set(ROUTES) - {"base"}
    assert "cut to 2 layers" in report["what"]
    expected = [(b, c, r) for b in ("2x12", "1x12") for c in (False, True) for r in ROUTES]
    assert [(row["batch"], row["ckpt"], row["route"]) for row in report["rows"]] == expected
    found = {(row["batch"], row["ckpt"], row["route"]): row for row in report["rows"]}
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


def test_every_route_runs_on_the_same_weights(routes):
    _, base, found = routes
    weights = {p.data_ptr(): p for p in base.parameters()}
    for route in found.values():
        own = {p.data_ptr() for p in route.trained.values()}
        assert {p.data_ptr() for p in route.model.parameters()} - own == weights.keys()


def test_every_route_goes_backward_through_every_layer(script, routes):
    args, _, found = routes
    for name, route in found.items():
        reached = []

        def watch(module, inputs, output, reached=reached):
            output.register_hook(lambda gradient: reached.append(gradient.norm()))

        route.model.get_input_embeddings().register_forward_hook(watch)
        script.step(route, script.batch_of(args, 1, 8))
        assert len(reached) == 1, name
        assert reached[0] > 0, name


def test_adapters_have_the_same_tensors_under_the_same_names(routes):
    _, _, found = routes
    shapes = {
        name: {key: p.shape for key, p in route.trained.items()} for name, route in found.items()
    }
    assert shapes["base"] == {}
    # layers, A and B of two projections and of four linear layers
    assert len(shapes["peft"]) == 2 * (4 + 8)
    assert shapes["peft"] == shapes["moe_lora"] == shapes["moe_lora-recompute"]


def test_the_peak_holds_adapter_and_optimizer_state(script, routes):
    args, _, found = routes
    route = found["moe_lora"]
    script.step(route, script.batch_of(args, 1, 8))
    adapter = sum(p.numel() * 4 for p in route.trained.values())
    # AdamW's two moments, and a counter a tensor
    assert route.static_bytes() == 3 * adapter + 4 * len(route.trained)
    assert found["base"].static_bytes() == 0
    # and the gradients
    assert (
        script.peak_bytes(route, script.batch_of(args, 1, 8), args.device)
        >= route.static_bytes() + adapter
    )


def leave_pefts_order_out(script, monkeypatch):
    monkeypatch.setattr(script, "in_pefts_order", lambda name, tensor, rank: tensor)


def leave_the_adapter_out(script, monkeypatch):
    monkeypatch.setattr(
        script, "fill_adapter", lambda route, *_: [p.data.zero_() for p in route.trained.values()]
    )


def double_one_gradient(script, monkeypatch):
    def doubled(base, args):
        route = script.moe_lora_route(base, args)
        next(p for n, p in route.trained.items() if "experts.lora_A" in n).register_hook(
            lambda g: 2 * g
        )
        return route

    monkeypatch.setitem(script.ROUTES, "moe_lora", doubled)


def swap_two_experts(script, monkeypatch):
    def swapped(base, args):
        route = script.moe_lora_route(base, args)
        layer = route.model.base_model.model.model.layers[1].mlp.experts
        # 0 <-> 1
        layer.register_forward_pre_hook(
            lambda m, a: (a[0], torch.where(a[1] < 2, 1 - a[1], a[1]), a[2])
        )
        return route

    monkeypatch.setitem(script.ROUTES, "moe_lora", swapped)


@pytest.mark.parametrize(
    "damage",
    [leave_pefts_order_out, leave_the_adapter_out, double_one_gradient, swap_two_experts],
    ids=lambda damage: damage.__name__,
)
def test_routes_that_disagree_get_no_number(script, monkeypatch, tmp_path, capsys, damage):
    damage(script, monkeypatch)
    assert script.main(["--tiny", "--json", str(tmp_path / "steps.json")]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "No numbers: the " in said.err
    assert not (tmp_path / "steps.json").exists()


@pytest.mark.parametrize(
    "arguments", [["--batches", "2048"], ["--rounds", "0"], ["--batches", "1x1"]], ids=" ".join
)
def test_bad_arguments_are_refused(script, arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        script.parse_arguments(arguments)
    assert arguments[0] in capsys.readouterr().err

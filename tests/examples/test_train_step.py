"""benchmarks/train_step.py on a CPU: every field, and no number where routes disagree."""

import json
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

import agreement
import train_step
from models import MODEL_ROUTES, ModelRoute, build_dense, moe_lora_route
from peft_moe_lora.layers import own
from step_cases import DEFAULT, Batch, StepCase, in_groups, read_case
from step_parts import PARTS, by_part, ranges

ROUTES = ["base", "frozen", "peft", "peft-applied"]
ROUTES += ["moe_lora", "moe_lora-recompute", "moe_lora-peft-linear"]
RANK = 16
CPU = torch.device("cpu")


@pytest.fixture
def args() -> train_step.Arguments:
    return train_step.parse_arguments(["--tiny"])


@pytest.fixture
def base(args) -> nn.Module:
    return build_dense(args.sizes(256), args.dtype, CPU)


@pytest.fixture
def routes(base) -> dict[str, ModelRoute]:
    return {name: MODEL_ROUTES[name](base, RANK) for name in ROUTES}


KEYS = {"machine", "date", "what", "command", "losses", "rows"}


def test_report_has_every_field(tmp_path, capsys):
    path, table, picture = (tmp_path / name for name in ("steps.json", "steps.md", "steps.svg"))
    cases = ["2x12", "1x12+experts"]
    routes = ["base", "peft", "peft-applied", "moe_lora"]
    words = ["--tiny", "--cases", *cases, "--rounds", "1", "--routes", *routes]
    files = ["--json", path, "--markdown", table, "--picture", picture]
    assert train_step.main([*words, *map(str, files)]) == 0
    report = json.loads(path.read_text())
    assert report.keys() == KEYS
    assert report["losses"]["256"].keys() == set(routes) - {"base"}
    assert "cut to 2 layers" in report["what"]
    kinds = [("2x12", "no"), ("1x12", "experts")]
    expected = [(*kind, route) for kind in kinds for route in routes]
    found = {(r["batch"], r["checkpointing"], r["route"]): r for r in report["rows"]}
    assert list(found) == expected
    for (batch, checkpointing, name), row in found.items():
        assert row["failed"] is None
        assert (row["variant"], row["vocabulary"]) == ("eager", 256)
        assert min(row[key] for key in ("ms", "tok_s", "peak", "first", "host_us")) > 0
        assert row["tok_s"] == pytest.approx(1e3 * int(batch[0]) * 12 / row["ms"])
        assert list(row["parts"]) == list(PARTS)
        assert all(ms > 0 for part, ms in row["parts"].items() if part != "optimizer")
        assert (row["parts"]["optimizer"] > 0) == (name != "base")
        peft = found[batch, checkpointing, "peft"]
        if name != "peft":
            assert row["x_peft"] == pytest.approx(peft["ms"] / row["ms"])
            assert row["peak_of_peft"] == pytest.approx(row["peak"] / peft["peak"])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 + len(expected)
    assert all(row["route"] in line for row, line in zip(report["rows"], printed[2:], strict=True))
    assert len(table.read_text().splitlines()) == 2 + len(expected)
    if find_spec("matplotlib") is None:
        return
    drawn = picture.read_text()
    assert all(part in drawn for part in PARTS)
    assert "moe_lora, 1x12, checkpointing: experts" in drawn
    again = tmp_path / "again.svg"
    assert train_step.main(["--draw", str(path), "--picture", str(again)]) == 0
    assert again.read_text() == drawn


def test_a_row_that_fails_leaves_the_others_alone(tmp_path, monkeypatch, capsys):
    def failing(base: nn.Module, rank: int) -> ModelRoute:
        route = moe_lora_route(base, rank)
        step = route.step

        def fails(ids: torch.Tensor) -> None:
            if ids.shape[0] == 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate")
            step(ids)

        route.step = fails
        return route

    monkeypatch.setitem(MODEL_ROUTES, "moe_lora", failing)
    path = tmp_path / "steps.json"
    words = "--tiny --layers 1 --cases 2x12 1x12 --rounds 1 --routes base moe_lora".split()
    assert train_step.main([*words, "--json", str(path)]) == 1
    rows = json.loads(path.read_text())["rows"]
    why = ["raised OutOfMemoryError" if i == 1 else None for i in range(4)]
    assert [row["failed"] for row in rows] == why
    assert [row["ms"] is None for row in rows] == [i == 1 for i in range(4)]
    assert "CUDA out of memory. Tried" in capsys.readouterr().err


def test_a_run_is_not_lost_for_a_picture(tmp_path, monkeypatch, capsys):
    # as if matplotlib were not installed
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    train_step.try_to_draw({"rows": []}, tmp_path / "steps.svg")
    assert "No picture: " in capsys.readouterr().err


def test_what_time_does_not_suffice_for_is_named(capsys):
    words = "--tiny --layers 1 --cases 1x12 1x12+vocabulary=300 --rounds 1 --routes base".split()
    assert train_step.main([*words, "--seconds", "0"]) == 1
    said = capsys.readouterr()
    assert not said.out
    assert "Left out after 0 s: 1x12, checkpointing: no, eager, vocabulary 300" in said.err
    assert train_step.main(words) == 0
    assert [line.split()[3] for line in capsys.readouterr().out.splitlines()[2:]] == ["256", "300"]


# ---- the cases ----------------------------------------------------------------------------------


def test_cases_are_read_and_grouped():
    words = ("4x8+liger", "2x4+experts", "4x8+compile+vocabulary=9", "1x8+layers+one-thread")
    *cases, by_layers = [read_case(text, 7) for text in words]
    assert by_layers == StepCase(Batch(1, 8), layers=True, one_thread=True, vocabulary=7)
    assert by_layers.variant == "layers+one-thread"
    assert [case.compiles for case in (*cases, by_layers)] == [False, False, True, True]
    assert cases[0] == StepCase(Batch(4, 8), liger=True, vocabulary=7)
    assert cases[1] == StepCase(Batch(2, 4), "experts", vocabulary=7)
    assert cases[2] == StepCase(Batch(4, 8), compiled=True, vocabulary=9)
    assert [case.variant for case in cases] == ["liger", "eager", "compile"]
    # Liger changes every model of the process, and is not taken off
    assert in_groups(cases) == [[cases[1]], [cases[2]], [cases[0]]]
    assert len([read_case(text, 7) for text in DEFAULT]) == len(DEFAULT)


def test_liger_is_given_once_and_compiled_models_are_given_back(monkeypatch):
    """The names of a GPU's run, without their libraries."""
    given = []
    compiled = []
    monkeypatch.setattr(train_step, "apply_liger_kernel", lambda *words: given.append(words))
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled.append(module))
    cases = ["--cases", "1x12+liger", "1x12+compile", "1x12+compile+liger"]
    words = "--tiny --layers 1 --rounds 1 --routes base --compiled-routes base".split()
    run = train_step.Run(train_step.parse_arguments([*words, *cases]), [])
    for group in run.args.case_groups():
        run.measure(group)
    assert [options for _, options in given] == [{"swiglu": False}]
    assert len(compiled) == 2
    assert [row.variant for row in run.rows] == ["compile", "liger", "compile+liger"]
    assert [bool(row.parts) for row in run.rows] == [False, True, False]


def test_each_layer_is_compiled_by_itself_and_given_back(monkeypatch):
    compiled = []

    def compile_one(module: nn.Module) -> None:
        compiled.append(module)
        module._compiled_call_impl = module._call_impl

    monkeypatch.setattr(nn.Module, "compile", compile_one)
    words = "--tiny --layers 2 --rounds 1 --routes base moe_lora --cases 1x12+layers".split()
    run = train_step.Run(train_step.parse_arguments(words), [])
    for group in run.args.case_groups():
        run.measure(group)
    assert [type(module).__name__ for module in compiled] == ["Qwen3MoeDecoderLayer"] * 4
    assert all(module._compiled_call_impl is None for module in compiled)
    assert [row.failed for row in run.rows] == [None, None]


def test_backward_runs_in_the_callers_thread_where_the_case_says_so(monkeypatch):
    threads = []
    step = ModelRoute.step

    def noting(route: ModelRoute, ids: torch.Tensor) -> None:
        threads.append(torch._C._is_multithreading_enabled())
        step(route, ids)

    monkeypatch.setattr(ModelRoute, "step", noting)
    words = "--tiny --layers 1 --rounds 1 --routes base --cases 1x12".split()
    for word, many in (("1x12", True), ("1x12+one-thread", False)):
        threads.clear()
        run = train_step.Run(train_step.parse_arguments([*words[:-1], word]), [])
        for group in run.args.case_groups():
            run.measure(group)
        # the check of the routes comes before
        assert threads[-3:] == [many] * 3
    assert torch._C._is_multithreading_enabled()


# ---- the parts of a step ------------------------------------------------------------------------


class Event:
    """What the profiler records of an operation."""

    def __init__(self, name, parent=None, sequence_nr=-1, thread=1, kernels=(), device="CPU"):
        self.name = name
        self.cpu_parent = parent
        self.sequence_nr = sequence_nr
        self.thread = thread
        self.kernels = [SimpleNamespace(duration=us) for us in kernels]
        self.device_type = getattr(torch.autograd.DeviceType, device)
        self.self_cpu_time_total = 0


def test_kernels_count_for_the_innermost_part_also_in_backward():
    loss = Event("part: loss")
    experts = Event("part: experts", loss)
    forward = Event("experts", experts, sequence_nr=3, kernels=[1000, 500])
    head = Event("aten::mm", loss, sequence_nr=4, kernels=[2000])
    node = Event("autograd::engine::evaluate_function: expertsBackward", sequence_nr=3, thread=2)
    backward = Event("expertsBackward", node, sequence_nr=3, thread=2, kernels=[3000])
    # a second forward within backward
    norm = Event("part: norms", node, thread=2)
    again = Event("aten::mul", norm, sequence_nr=4, thread=2, kernels=[250])
    lost = Event("aten::add_", Event("a node of no operation", thread=2), kernels=[125])
    of_device = Event("part: loss", thread=9, kernels=[10**6], device="CUDA")
    events = [loss, experts, forward, head, node, backward, norm, again, lost, of_device]
    found = by_part(events, on_gpu=True)
    assert {part: ms for part, ms in found.items() if ms} == {
        "experts": 4.5,
        "loss": 2.0,
        "norms": 0.25,
        "rest": 0.125,
    }


def test_forwards_are_given_back_after_a_step(routes):
    for route in routes.values():
        # as Liger binds one to an instance
        norm = next(m for m in route.model.modules() if type(m).__name__ == "Qwen3MoeRMSNorm")
        norm.forward = norm.forward
        before = {name: vars(m).get("forward") for name, m in route.model.named_modules()}
        with pytest.raises(KeyError), ranges(route.model):
            raise KeyError
        after = {name: vars(m).get("forward") for name, m in route.model.named_modules()}
        assert after == before


def test_every_route_runs_on_the_same_weights(base, routes):
    weights = {p.data_ptr() for p in base.parameters()}
    for route in routes.values():
        own = {p.data_ptr() for p in route.trained.values()}
        assert {p.data_ptr() for p in route.model.parameters()} - own == weights


def test_every_route_goes_backward_through_every_layer(args, routes):
    ids = train_step.batch_of(args, Batch(1, 8), 256)
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
    assert shapes["peft"] == shapes["peft-applied"]


def test_our_kernels_run_for_one_model_of_peft_alone(args, routes, monkeypatch):
    own_calls = []
    activate = ParamWrapper._activate_lora

    def counted(self, *arguments):
        own_calls.append(self)
        return activate(self, *arguments)

    # PEFT's own forward adds the update to the weight
    monkeypatch.setattr(ParamWrapper, "_activate_lora", counted)
    ids = train_step.batch_of(args, Batch(1, 8), 256)
    routes["peft-applied"].step(ids)
    assert not own_calls
    routes["peft"].step(ids)
    assert len(own_calls) == 2 * args.layers


def test_the_peak_holds_adapter_and_optimizer_state(args, routes):
    route = routes["moe_lora"]
    ids = train_step.batch_of(args, Batch(1, 8), 256)
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
    [
        ["--cases", "2048"],
        ["--rounds", "0"],
        ["--cases", "1x1"],
        ["--draw", "steps.json"],
        ["--cases", "axb"],
        ["--cases", "1x8+fast"],
        ["--cases", "1x8+plain+experts"],
        ["--cases", "1x8+liger+liger"],
        ["--cases", "1x8+compile+layers"],
    ],
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
    ids = train_step.batch_of(args, Batch(1, 8), 256)
    logits = {name: routes[name].model(input_ids=ids).logits for name in ("base", "frozen")}
    assert len(calls) == 2
    assert torch.allclose(logits["frozen"], logits["base"], atol=1e-4)

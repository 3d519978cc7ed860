"""benchmarks/layer.py --models: the layers of a model's config.json, its own class measured."""

import json

import pytest
import torch

import layer
from cases import Case, Problem
from checking import CheckFailed, check_route, reference
from helpers import tiny_model
from model_layers import layers_of
from peft_moe_lora.experts.layout import is_experts
from roofline import Ceilings, compulsory_work
from routes import ROUTES

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _ceilings_that_take_no_time_to_measure(monkeypatch):
    monkeypatch.setattr(layer, "measure_ceilings", lambda timer, probe: Ceilings(1e11, 1e10))


def saved_config(family: str, folder) -> str:
    tiny_model(family).config.save_pretrained(folder)
    return str(folder)


def layer_case(found, dtype=torch.float32) -> Case:
    return Case(found.name, *found.shape, 40, 4, dtype, 0.0, CPU, experts=found.experts)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral", "nemotron_h", "deepseek_v3"])
def test_the_layers_of_a_config_are_those_of_its_model(family, tmp_path):
    model = tiny_model(family)
    (found,) = layers_of(saved_config(family, tmp_path))
    experts = next(module for module in model.modules() if is_experts(module))
    assert type(experts) is type(found.experts(*found.shape))
    assert found.shape.E == experts.down_proj.shape[0]
    assert {found.shape.H, found.shape.I} == set(experts.down_proj.shape[1:])
    assert found.shape.top_k == model.config.num_experts_per_tok
    problem = Problem(layer_case(found))
    expected = reference(problem, problem.scaling)
    for name in ("moe_lora", "torch"):
        check_route(problem, ROUTES[name](problem), expected)


@pytest.mark.parametrize("family", ["gpt_oss", "nemotron_h"])
def test_the_module_of_the_model_decides_what_is_computed(family, tmp_path):
    (found,) = layers_of(saved_config(family, tmp_path))
    problem = Problem(layer_case(found))
    route = ROUTES["moe_lora"](problem)
    problem.activation = lambda pre: torch.nn.functional.silu(pre)[:, : problem.case.I]
    with pytest.raises(CheckFailed, match="wrong out"):
        check_route(problem, route, reference(problem, problem.scaling))


def test_without_a_gate_there_are_two_matrices_instead_of_three(tmp_path):
    (found,) = layers_of(saved_config("nemotron_h", tmp_path))
    case = layer_case(found)
    forward, backward = compulsory_work(case)
    M = case.T * case.top_k
    base = 2 * M * 2 * case.H * case.I
    assert forward.flops == base + 2 * M * case.r * 2 * (case.H + case.I)
    assert backward.flops == base + 4 * M * case.r * 2 * (case.H + case.I)


def test_a_model_is_measured_by_its_folder(tmp_path):
    folder = saved_config("gpt_oss", tmp_path / "model")
    path = tmp_path / "layer.json"
    words = f"--device cpu --models {folder} --tokens 40 --rank 4 --repeat 2 --json {path}"
    routes = ["moe_lora", "peft", "base", "torch"]
    assert layer.main([*words.split(), "--routes", *routes]) == 0
    rows = {row["peer"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == routes
    for row in rows.values():
        assert row["failed"] is None
        assert row["config"] == folder
        assert row["step"] > 0


def test_models_stand_beside_shapes(tmp_path):
    folder = saved_config("qwen3_moe", tmp_path)
    words = f"--device cpu --shapes 6,64,32,2 --models {folder} --tokens 8 16 --rank 1"
    cases = layer.list_cases(layer.parse_arguments(words.split()))
    assert [(case.name, case.T) for case in cases] == [
        ("6,64,32,2", 8),
        ("6,64,32,2", 16),
        (folder, 8),
        (folder, 16),
    ]


def test_what_has_no_layers_or_no_reference_is_refused(tmp_path, capsys):
    def said(model: str) -> str:
        with pytest.raises(SystemExit, match="2"):
            layer.parse_arguments(["--device", "cpu", "--models", model])
        return capsys.readouterr().err

    assert "has no config that transformers reads" in said(str(tmp_path))
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "config.json").write_text(
        '{"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 1}'
    )
    assert "has no routed experts" in said(str(tmp_path / "dense"))
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.json").write_text(
        '{"model_type": "jetmoe", "architectures": ["JetMoeForCausalLM"], "num_hidden_layers": 1}'
    )
    message = said(str(tmp_path / "own"))
    assert "JetMoe" in message
    assert "in a way of its own" in message

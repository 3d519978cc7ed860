"""docs/already-using-peft.md: its Python runs, its commands parse, its table follows from pins."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from peft import LoraConfig
from peft.tuners.lora.layer import ParamWrapper
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser

import peft_moe_lora
from helpers import outputs, tiny_model
from peft_moe_lora.interop.apply import is_applied
from peft_moe_lora.layers.layer import MoELoraLayer
from test_docs import tables
from test_trl import arguments, base_model, losses, tokenizer  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "already-using-peft.md"
# releases between which the pins of the table decide
RELEASES = {
    "peft": ["0.18.0", "0.18.1", "0.19.1", "0.20.0", "0.21.0", "0.22.0"],
    "transformers": ["4.55.0", "4.57.1", "5.6.0", "5.16.1", "5.17.0", "5.19.0", "5.23.0"],
    "accelerate": ["1.3.0", "1.10.1", "1.11.0", "1.13.0", "1.15.0"],
}


def blocks(language, heading):
    """The blocks of a language below a heading."""
    text = PAGE.read_text(encoding="utf-8")
    section = re.split(rf"^## {re.escape(heading)}$", text, flags=re.MULTILINE)[1]
    section = re.split(r"^## ", section, flags=re.MULTILINE)[0]
    return re.findall(rf"```{language}\n(.*?)```", section, flags=re.DOTALL)


def run(code, **names):
    exec(compile(code, str(PAGE), "exec"), names)
    return names


@pytest.fixture
def _peft_as_it_was():
    yield
    peft_moe_lora.apply_to_peft().remove()


@pytest.mark.usefixtures("_peft_as_it_was")
def test_pefts_own_configuration_runs_here():
    first, _ = blocks("python", "PEFT")
    model = run(first, model=tiny_model())["model"]
    assert is_applied()
    assert sum(isinstance(m, ParamWrapper) for m in model.modules()) == 4
    assert outputs(model).isfinite().all()


def test_a_lora_config_becomes_ours():
    _, second = blocks("python", "PEFT")
    config = LoraConfig(r=4, target_parameters=["mlp.experts.down_proj"])
    model = run(second, model=tiny_model(), config=config)["model"]
    layers = [m for m in model.modules() if isinstance(m, MoELoraLayer)]
    assert [layer.adapted_projections("default") for layer in layers] == [["down"]] * 2


def test_trl_takes_the_configuration(tokenizer, tmp_path):  # noqa: F811
    (block,) = blocks("python", "TRL")
    rows = Dataset.from_list([{"text": f"abc {i % 3} abc {i % 3}"} for i in range(16)])
    trainer = run(
        block,
        model=base_model("cpu"),
        args=arguments(SFTConfig, "cpu", tmp_path, max_steps=4),
        rows=rows,
        tokenizer=tokenizer,
    )["trainer"]
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_trls_command_line_knows_the_options():
    (block,) = blocks("sh", "TRL")
    words = shlex.split(block.replace("\\\n", " "))
    assert words[:5] == ["peft-moe-lora", "run", "--", "trl", "sft"]
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig))
    parsed = parser.parse_args_and_config([*words[5:], "--use_cpu", "--bf16", "False"])
    assert parsed[2].lora_target_parameters == [
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
    ]
    assert parsed[2].lora_dropout == 0


def test_the_implementation_is_named():
    (block,) = blocks("python", "The kernels without an adapter on the experts")
    base = tiny_model()
    with torch.no_grad():
        expected = outputs(base)
        model = run(block, model=base)["model"]
        assert model.config._experts_implementation == "moe_lora"
        assert torch.allclose(outputs(model), expected, atol=1e-4)


def pins_of_this_package():
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    required = [Requirement(line) for line in content["project"]["dependencies"]]
    return {r.name: r.specifier for r in required}


def test_the_table_of_programs_follows_from_the_pins():
    (rows,) = tables(PAGE)["Axolotl, ms-swift, LLaMA-Factory"]
    ours = pins_of_this_package()
    assert len(rows) == 4
    for row in rows:
        fits = []
        for package, releases in RELEASES.items():
            theirs = SpecifierSet(row[package].replace("any", ""))
            both = theirs & ours[package]
            fits.append(any(release in both for release in releases))
            # the releases listed here can tell: each side has one of them
            assert any(release in theirs for release in releases), (row, package)
        verdict = "no"
        if all(fits):
            verdict = "yes"
        assert row["beside this package"] == verdict, row["program"]

"""docs/guides/: every block of Python runs, every command too, and every number has a source."""

import functools
import json
import re
import tomllib

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

import measured
from docs.blocks import (
    FENCE,
    GUIDES,
    PAGES,
    README,
    ROOT,
    blocks,
    commands,
    languages,
    quantities,
    run,
    sentences,
)
from helpers import VOCAB, fill_adapter, moe_lora, rank_major, tiny_model
from peft_moe_lora.layers.layer import MoELoraLayer
from peft_moe_lora.ops.kernels.parts import SCRATCH_BYTES

pytest.importorskip("typer")

from typer.testing import CliRunner

from peft_moe_lora.cli import BAD, app

every_guide = pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.stem)
every_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
WITH_CODE = [path for path in GUIDES if blocks(path, "python")]
# the names on the pages, and what stands for them here
HERE = {'"Qwen/Qwen3-30B-A3B"': '"BASE"', '"bfloat16"': '"float32"', '"cuda:0"': '"cpu"'}
SIZES = {"hidden_size": 64, "moe_intermediate_size": 64, "num_experts": 6}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a base model BASE and an adapter ADAPTER of it, as the pages name them."""
    monkeypatch.chdir(tmp_path)
    tiny_model(**SIZES).save_pretrained("BASE")
    base = AutoModelForCausalLM.from_pretrained("BASE")
    moe_lora(base, r=4, target_modules=["experts", "q_proj", "v_proj"]).save_pretrained("ADAPTER")
    return tmp_path


def test_blocks_are_of_languages_that_are_tested():
    for path in PAGES:
        assert languages(path) <= {"python", "sh"}, path.name
    for path in GUIDES:
        text = FENCE.sub("", path.read_text("utf-8"))
        assert not re.search(r"^    \S", text, re.MULTILINE), path.name


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("path", WITH_CODE, ids=lambda path: path.stem)
def test_python_runs(path, folder):
    """From top to bottom; a page that needs a model or batches finds them."""
    codes = [
        functools.reduce(lambda text, pair: text.replace(*pair), HERE.items(), code)
        for code in blocks(path, "python")
    ]
    if any("BitsAndBytesConfig" in code for code in codes):
        pytest.importorskip("bitsandbytes")
    names = start()
    for code in codes:
        if "base" in code:
            names["base"] = AutoModelForCausalLM.from_pretrained("BASE")
        run(code, path, names)
    CHECKS[path.stem](names)


def start():
    """What the pages take for given."""
    base = AutoModelForCausalLM.from_pretrained("BASE")
    ids = torch.randint(3, VOCAB, (2, 8), generator=torch.Generator().manual_seed(0))
    model = moe_lora(base, r=4, target_modules=["experts", "q_proj"])
    fill_adapter(model)
    B = torch.randn(10, 3 * 2, generator=torch.Generator().manual_seed(1))
    return {"model": model, "batches": [{"input_ids": ids}], "lora_B": B, "N": 10, "E": 3, "r": 2}


def adapted(model):
    return [module for module in model.modules() if isinstance(module, MoELoraLayer)]


def check_experts(names):
    assert len(adapted(names["model"])) == 2
    linear = [m for m in names["model"].modules() if isinstance(m, LoraLayer)]
    assert len(linear) == 2 + 2 * 4


def check_chosen(names):
    assert adapted(names["model"])
    assert names["chosen"].keys() == {f"model.layers.{i}.mlp.experts" for i in range(2)}


def check_quantized(names):
    """A block made the experts dense again, up to what 4 bits keep; another steps in backward."""
    weight = names["base"].model.layers[0].mlp.experts.gate_up_proj
    fresh = AutoModelForCausalLM.from_pretrained("BASE").model.layers[0].mlp.experts.gate_up_proj
    assert weight.dtype == fresh.dtype
    error = (weight - fresh).norm() / fresh.norm()
    assert 0.01 < error < 0.2
    trained = [p for p in names["model"].parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    sum((p - 1).square().sum() for p in trained).backward()
    assert all(p.grad is None for p in trained)
    assert not any(torch.equal(p, b) for p, b in zip(trained, before, strict=True))


def check_conversions(names):
    assert adapted(names["model"])
    expected = rank_major(start()["lora_B"], 3)
    assert torch.equal(names["lora_B"], expected)


def check_speed(names):
    """Each decoder layer is compiled by itself, and backward has no thread of its own."""
    try:
        assert not torch._C._is_multithreading_enabled()
    finally:
        torch.autograd.set_multithreading_enabled(True)
    model = names["model"]
    compiled = [m for m in model.modules() if m._compiled_call_impl is not None]
    assert compiled == list(model.get_base_model().model.layers)


def check_saved(names):
    assert not adapted(names["merged"])


CHECKS = {
    "experts-routers-attention": check_experts,
    "choosing-experts": check_chosen,
    "quantized-bases": check_quantized,
    "conversions": check_conversions,
    "speed": check_speed,
    "saving-loading-merging": check_saved,
}


# ---- commands ------------------------------------------------------------------------------------

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"][
    "optional-dependencies"
]


def check_pip(words):
    assert words[:2] == ["pip", "install"]
    extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", words[2])
    for extra in filter(None, (extras[1] or "").split(",")):
        assert extra in EXTRAS, extra


def check_make(words):
    (target,) = words[1:]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)


def check_ours(words):
    done = CliRunner().invoke(app, words[1:])
    expected = 0
    # no checkpoint is there
    if words[1] == "consolidate":
        expected = BAD
    assert done.exit_code == expected, done.output


def check_recipe(words):
    """The recipes' own test runs their README's commands."""
    recipes = (ROOT / "examples" / "distributed" / "README.md").read_text("utf-8")
    assert f"`{' '.join(words)}`" in recipes


KINDS = {"pip": check_pip, "make": check_make, "peft-moe-lora": check_ours}
KINDS |= {"accelerate": check_recipe}


@every_guide
def test_commands_run(path, folder):
    for words in commands(path):
        KINDS[words[0]](words)


def test_the_readmes_other_commands_exist():
    """test_readme.py runs those of this package, with the folders that its code has written."""
    for words in commands(README):
        if words[0] in ("make", "pip"):
            KINDS[words[0]](words)


def test_the_commands_of_continuous_integration_are_in_the_readme():
    assert ["make", "test"] in commands(README)
    assert ["make", "demo"] in commands(README)
    assert "make test" in (ROOT / ".ci" / "run").read_text("utf-8")


@every_page
def test_scripts_and_extras_in_sentences_exist(path):
    text = path.read_text("utf-8")
    for script, options in re.findall(r"`python (examples/[\w/]+\.py)([^`]*)`", text):
        source = (ROOT / script).read_text("utf-8")
        shared = (ROOT / script).with_name("options.py").read_text("utf-8")
        for option in re.findall(r"--([\w-]+)", options):
            assert re.search(rf"\b{option.replace('-', '_')}\b", source + shared), (script, option)
    for command in re.findall(r"`(pip install [^`]*)`", text):
        check_pip(command.replace("'", "").split())
    for module in re.findall(r"`peft-moe-lora (\w+)", text):
        assert module in {found.callback.__name__ for found in app.registered_commands}, module


# ---- numbers -------------------------------------------------------------------------------------

RESULTS = measured.read_results()
QWEN_EXPERTS = 48 * 128 * 3 * 2048 * 768
# numbers with a unit that were not measured: each is true for a reason that can be computed
COMPUTED = {
    "128 MiB": SCRATCH_BYTES == 128 * 2**20,
    "58.0 GB": round(2 * QWEN_EXPERTS / 1e9, 1) == 58.0,
    "15.0 GB": round(QWEN_EXPERTS * 4.13 / 8 / 1e9, 1) == 15.0,
}


@every_guide
def test_numbers_in_sentences_are_results_of_a_day_that_is_named(path):
    for line in sentences(path):
        days = re.findall(r"2026-\d\d-\d\d", line)
        known = {v for said in RESULTS["said"] if said["date"] in days for v in said["values"]}
        for quantity in quantities(line):
            if quantity not in COMPUTED:
                assert quantity in known, f"{path.name}: {quantity} in: {line}"


def test_every_result_is_said_and_every_reason_holds():
    lines = [line for path in PAGES for line in sentences(path)]
    said = {quantity for line in lines for quantity in quantities(line)}
    values = {value for entry in RESULTS["said"] for value in entry["values"]}
    assert values | COMPUTED.keys() <= said
    assert all(COMPUTED.values())


@pytest.mark.parametrize("path", measured.PAGES, ids=lambda path: path.stem)
def test_tables_are_the_results(path):
    text = path.read_text("utf-8")
    assert measured.with_tables(text, RESULTS) == text, "python examples/benchmarks/measured.py"


def test_every_table_of_results_stands_somewhere_with_its_day():
    found = {}
    for path in measured.PAGES:
        for _, name, *_ in measured.TABLE.findall(path.read_text("utf-8")):
            found[name] = path.read_text("utf-8")
    assert found.keys() == RESULTS["tables"].keys()
    for name, text in found.items():
        assert RESULTS["tables"][name]["date"] in text


# ---- learning rates ------------------------------------------------------------------------------

RATE = re.compile(r"(?:learning_rate[\"\\]*|\blr)\s*[=:]\s*(\d[\de.-]*)")
# a tiny model's own training, without an adapter
PRETRAINING = 4e-3


def test_learning_rates_are_the_same_everywhere():
    """2e-4 for real models, 1e-2 for tiny ones; the pages of advice have other people's too."""
    advised, tiny = 2e-4, 1e-2
    paths = [*PAGES, *ROOT.glob("examples/*.py"), *ROOT.glob("examples/distributed/*.py")]
    paths += ROOT.glob("notebooks/*.ipynb")
    for path in paths:
        text = path.read_text("utf-8")
        if path.suffix == ".ipynb":
            text = "".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
        rates = {float(rate) for rate in RATE.findall(text)}
        assert rates <= {advised, tiny, PRETRAINING}, path.name
        if tiny in rates:
            assert "small" in text, f"{path.name} says why its rate is another one"

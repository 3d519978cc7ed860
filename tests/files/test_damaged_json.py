"""Damaged JSON gets one clear error before a model is touched, and what it says is printable."""

import json
import os
import shutil
import time

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from helpers import assert_unchanged, moe_lora, snapshot, tiny_model
from peft_moe_lora import MoELoraConfig, convert_adapter, inspect_adapter
from peft_moe_lora.cli import app
from peft_moe_lora.files.card import OUR_CARD, card_section, write_card
from peft_moe_lora.files.tensor_file import AdapterError
from peft_moe_lora.files.text import quoted, shown

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
ESCAPE = "\x1b[2J\x1b[31m"

# changes of adapter_config.json: the field that the error names, its value
BAD_FIELDS = [
    ("r", 0),
    ("r", -1),
    ("r", 1.0),
    ("r", True),
    ("r", 10**400),
    ("r", [4]),
    ("lora_alpha", 10**400),
    ("lora_alpha", float("nan")),
    ("lora_alpha", 1e300),
    ("lora_alpha", -1e12),
    ("lora_alpha", 1e-300),
    ("lora_alpha", True),
    ("lora_alpha", {}),
    ("rank_pattern", []),
    ("rank_pattern", [1]),
    ("rank_pattern", {"experts": None}),
    ("rank_pattern", {"[": 4}),
    ("rank_pattern", {"(?i)experts": 4}),
    ("rank_pattern", {"a{99999999999999999999}": 4}),
    ("rank_pattern", {"(" * 5000 + ")" * 5000: 4}),
    ("rank_pattern", {"(.*.*)*x": 4}),
    ("alpha_pattern", "experts"),
    ("alpha_pattern", {"(": 8}),
    ("alpha_pattern", {"experts": 10**400}),
    ("alpha_pattern", {"experts": 3e-11}),
    ("expert_indices", 5),
    ("expert_indices", [None]),
    ("expert_indices", {"[": [0]}),
    ("expert_indices", {"experts": None}),
    ("modules_to_save", 5),
    ("modules_to_save", "lm_head"),
    ("modules_to_save", [None]),
    ("target_modules", 5),
    ("target_modules", [["experts"]]),
    ("target_modules", "("),
    ("target_modules", "(a+)+b"),
    ("exclude_modules", {"a": 1}),
    ("target_parameters", 5),
    ("target_projections", 5),
    ("target_projections", [["down"]]),
    ("layers_to_transform", "all"),
    ("layers_pattern", 5),
    ("trainable_token_indices", {"embed_tokens": 5}),
    ("trainable_token_indices", []),
    ("eva_config", []),
    ("use_bdlora", []),
    ("loftq_config", 5),
    ("use_rslora", "false"),
    ("use_rslora", 0),
    ("use_dora", "false"),
    ("bias", "some"),
    ("bias", []),
    ("lora_dropout", "0.1"),
    ("base_model_name_or_path", ["Qwen"]),
    ("auto_mapping", "Qwen"),
    ("task_type", 5),
]

# replacements of the metadata's description, or of one of its entries
BAD_DESCRIPTIONS = [
    ("experts must be", {"experts": []}),
    ("experts must be", {"experts": None}),
    ("experts must be", {"experts": 5}),
    ("layers.0 must be", {"experts": {"layers.0": None}}),
    ("layers.0 must be", {"experts": {"layers.0": [1]}}),
    ("num_experts of layers.0", {"experts": {"layers.0": {"num_experts": "4"}}}),
    ("num_experts of layers.0", {"experts": {"layers.0": {"num_experts": 0}}}),
    ("experts of layers.0", {"experts": {"layers.0": {"num_experts": 4, "experts": 5}}}),
    ("experts of layers.0", {"experts": {"layers.0": {"num_experts": 4, "experts": [1, 0]}}}),
    ("experts of layers.0", {"experts": {"layers.0": {"num_experts": 4, "experts": [None]}}}),
    ("down of layers.0", {"experts": {"layers.0": {"num_experts": 4, "down": 5}}}),
    ("down of layers.0", {"experts": {"layers.0": {"num_experts": 4, "down": {"r": None}}}}),
    ("names must be", {"experts": {ESCAPE: {"num_experts": 4}}}),
    ("routers must be", {"routers": None}),
    ("routers must be", {"routers": [5]}),
    ("layout", {"layout": None}),
    ("layout", {"layout": []}),
    ("format_version", {"format_version": None}),
    ("format_version", {"format_version": True}),
    ("format_version", {"format_version": 10**400}),
]
BAD_METADATA = ["null", "5", "[]", '"text"', "{", "[" * 100_000, "9" * 5000]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    base = tiny_model()
    base.config.save_pretrained(folder / "base")
    moe_lora(tiny_model()).save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def adapter(saved, tmp_path):
    shutil.copytree(saved / "adapter", tmp_path / "adapter")
    return tmp_path / "adapter"


def change_config(adapter, **changes):
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | changes))


def change_description(adapter, changes):
    with safe_open(adapter / WEIGHTS, "pt") as file:
        description = json.loads(file.metadata()["peft_moe_lora"])
    write_metadata(adapter, json.dumps(description | changes))


def write_metadata(adapter, text):
    save_file(load_file(adapter / WEIGHTS), adapter / WEIGHTS, {"peft_moe_lora": text})


def assert_printable(text):
    assert text.isprintable(), text
    assert len(text) < 3000


def refused_by_conversion(saved, adapter, named):
    """Refused with exit code 3 and one line, without a base model and with one."""
    for base in ((), ("--base-config", str(saved / "base"))):
        done = CliRunner().invoke(app, ["inspect", str(adapter), *base])
        assert done.exit_code == 3, (done.output, done.exception)
        assert not done.stdout
        (line,) = done.stderr.splitlines()
        assert named in line
        assert_printable(line)
    with pytest.raises(ValueError, match=named):
        convert_adapter(adapter, adapter.parent / "out", to="peft", base_config=saved / "base")
    assert not (adapter.parent / "out").exists()


def refused_by_loading(adapter, named):
    """Refused by PEFT's route, and the model is as it was."""
    model = tiny_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=named) as caught:
        PeftModel.from_pretrained(model, adapter)
    assert_printable(str(caught.value))
    assert_unchanged(model, before)


def name_of(value):
    return str(value)[:30]


@pytest.mark.parametrize(("field", "value"), BAD_FIELDS, ids=name_of)
def test_a_field_of_a_wrong_type_is_refused(saved, adapter, field, value):
    change_config(adapter, **{field: value})
    refused_by_conversion(saved, adapter, "ranks" if field == "r" else field.split("_")[-1])
    refused_by_loading(adapter, field)


@pytest.mark.parametrize(("named", "changes"), BAD_DESCRIPTIONS, ids=name_of)
def test_metadata_of_a_wrong_type_are_refused(saved, adapter, named, changes):
    change_description(adapter, changes)
    refused_by_conversion(saved, adapter, named)
    refused_by_loading(adapter, named)


@pytest.mark.parametrize("text", BAD_METADATA, ids=name_of)
def test_metadata_that_are_no_object_are_refused(saved, adapter, text):
    write_metadata(adapter, text)
    refused_by_conversion(saved, adapter, "metadata")
    refused_by_loading(adapter, "metadata")


@pytest.mark.parametrize("value", ["null", "5", "[1]"])
def test_a_header_whose_metadata_are_no_strings_is_refused(saved, adapter, value):
    content = (adapter / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = {"peft_moe_lora": json.loads(value)}
    changed = json.dumps(header).encode()
    start = len(changed).to_bytes(8, "little") + changed
    (adapter / WEIGHTS).write_bytes(start + content[8 + length :])
    refused_by_conversion(saved, adapter, "not a whole safetensors file")
    refused_by_loading(adapter, "not a whole safetensors file")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "9" * 5000, "[]", "5", "{", '{"r": 4'], ids=name_of
)
def test_a_configuration_that_is_no_object_is_refused(saved, adapter, text):
    (adapter / CONFIG).write_text(text)
    refused_by_conversion(saved, adapter, CONFIG)
    # PeftModel reads the file itself first; its configuration is ours
    with pytest.raises(AdapterError, match=CONFIG) as caught:
        MoELoraConfig.from_pretrained(adapter)
    assert_printable(str(caught.value))


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("use_new_thing", True, "use_new_thing"),
        ("format_version", 3, "format_version=3"),
        ("layout", "rank_major", "layout='rank_major'"),
    ],
)
def test_an_adapter_of_a_newer_release_is_refused(saved, adapter, field, value, match):
    change_config(adapter, **{field: value})
    refused_by_conversion(saved, adapter, match)
    refused_by_loading(adapter, match)
    # transformers reads it as a PeftConfig, which drops fields that it does not know
    with pytest.raises(ValueError, match=match):
        tiny_model().load_adapter(str(adapter))


def test_a_field_that_is_not_known_and_unset_changes_nothing(adapter):
    change_config(adapter, use_new_thing=None, new_names=[])
    PeftModel.from_pretrained(tiny_model(), adapter)


def test_a_name_said_twice_is_refused(saved, adapter):
    """Readers differ in which of the two they take."""
    text = (adapter / CONFIG).read_text()
    (adapter / CONFIG).write_text('{"r": 3, ' + text.lstrip()[1:])
    refused_by_conversion(saved, adapter, "says 'r' twice")
    refused_by_loading(adapter, "says 'r' twice")


def test_a_name_said_twice_in_the_metadata_is_refused(saved, adapter):
    with safe_open(adapter / WEIGHTS, "pt") as file:
        text = file.metadata()["peft_moe_lora"]
    write_metadata(adapter, '{"routers": ["x"], ' + text[1:])
    refused_by_conversion(saved, adapter, "says 'routers' twice")
    refused_by_loading(adapter, "says 'routers' twice")


def test_a_trained_layer_without_tensors_is_refused(saved, adapter):
    """Somebody took the tensors out, and the layer out of target_modules."""
    with safe_open(adapter / WEIGHTS, "pt") as file:
        trained = json.loads(file.metadata()["peft_moe_lora"])["trained"]
    lost = {"model.layers.0.self_attn.q_proj": {"r": 2, "scaling": 2.0}}
    change_description(adapter, {"trained": trained | lost})
    refused_by_conversion(saved, adapter, "q_proj, of which the file has no tensors")
    refused_by_loading(adapter, "q_proj, of which the file has no tensors")


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_8_bit_floats_are_refused(saved, adapter, dtype):
    with safe_open(adapter / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    state = load_file(adapter / WEIGHTS)
    held = {name: tensor.to(getattr(torch, dtype)) for name, tensor in state.items()}
    save_file(held, adapter / WEIGHTS, metadata)
    refused_by_conversion(saved, adapter, "F8_E")
    refused_by_loading(adapter, "float8.*at least 16 bits")


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_a_file_that_this_user_may_not_read_is_refused(saved, adapter, file, monkeypatch):
    # root may read every file
    monkeypatch.setattr(os, "access", lambda path, mode: file not in str(path))
    refused_by_conversion(saved, adapter, f"{file} may not be read by this user")
    refused_by_loading(adapter, f"{file} may not be read by this user")


def test_null_is_the_same_as_left_out(saved, adapter):
    change_config(adapter, rank_pattern=None, alpha_pattern=None, expert_indices=None, bias=None)
    assert inspect_adapter(adapter).modules == 2
    PeftModel.from_pretrained(tiny_model(), adapter)


# ---- damaged adapters of PEFT's format -----------------------------------------------------------


@pytest.mark.parametrize("rows", [1.5, 2.5, 3])
def test_sizes_that_no_experts_have_are_refused(saved, adapter, tmp_path, rows):
    """Without a base model the sizes say whether there is a gate; other ratios are damage."""
    tensors = load_file(adapter / WEIGHTS)
    for name, tensor in tensors.items():
        if name.endswith("lora_B.gate_up"):
            longer = tensor.repeat(2, 1)
            tensors[name] = longer[: int(rows * tensor.shape[0] / 2)].contiguous()
    save_file(tensors, adapter / WEIGHTS, {"format": "pt"})
    with pytest.raises(AdapterError, match=r"gate_up has \d+ out-features"):
        convert_adapter(adapter, tmp_path / "out", to="peft")
    assert not (tmp_path / "out").exists()


# ---- what reaches the terminal and the card ------------------------------------------------------


def test_text_is_shown_escaped_and_shortened():
    assert shown("model.layers.0.mlp.experts") == "model.layers.0.mlp.experts"
    assert shown("C:\\models\\größe") == "C:\\models\\größe"
    assert shown("a\nerror: b\x1b[0m\u202e") == "a\\nerror: b\\x1b[0m\\u202e"
    assert shown("\ud800") == "\\ud800"
    assert len(shown("x" * 700_000)) < 250
    assert shown("x" * 700_000).endswith("(700000 characters)")
    assert quoted("a\n") == r"'a\n'"
    assert quoted([1, "a"]) == "[1, 'a']"


TOKEN = "hf_" + "aB3" * 12
# a base's name -> what may be shown of it
CREDENTIALS = {
    f"https://user:{TOKEN}@huggingface.co/org/model": "https://huggingface.co/org/model",
    "https://user:pass/word@host/model": "https://host/model",
    f"https://{TOKEN}@host/model": "https://host/model",
    "user:password@host/model": "host/model",
    "https://host/model?token=abcd&part=1": "https://host/model?token=...&part=1",
    "s3://models/m?X-Amz-Signature=ab12cd": "s3://models/m?X-Amz-Signature=...",
    f"org/model#{TOKEN}": "org/model#...",
    "org/model-" + "ghp_" + "x1" * 18: "org/model-...",
}


@pytest.mark.parametrize("base", CREDENTIALS)
def test_passwords_and_tokens_are_not_shown(base, tmp_path):
    right = CREDENTIALS[base]
    assert shown(base) == right
    assert quoted(base) == repr(right)
    write_card(
        tmp_path,
        OUR_CARD,
        {"r": 4, "lora_alpha": 8, "base_model_name_or_path": base, "target_modules": [base]},
        notes=[f"the base is {base}"],
    )
    card = (tmp_path / "README.md").read_text()
    for secret in (TOKEN, "password", "pass/word", "abcd", "ab12cd", "ghp_"):
        assert secret not in card
    assert 'from_pretrained("BASE"' in card
    assert "base_model" not in card.split("---")[1]


@pytest.mark.parametrize(
    "name", ["org/model", "git@github.com:org/m", "/data/a@b/c", "C:/x/y", "org/hf_transformers"]
)
def test_names_without_credentials_stay(name):
    assert shown(name) == name


def test_a_long_text_with_credentials_is_shortened_in_no_time():
    start = time.process_time()
    for text in ("a:" * 500_000, "?token" * 100_000, "h://" * 250_000, "a" * 10**6):
        assert len(shown(text)) < 250
    address = f"https://user:{TOKEN}@host/"
    for place in range(0, 300, 7):
        assert TOKEN[5:] not in shown("x" * place + " " + address + "y" * 1000 + address)
    assert time.process_time() - start < 10


@pytest.mark.parametrize("name", [f"base_model.model.{ESCAPE}", "a\nerror: b", "x" * 689_000])
def test_a_name_that_no_module_has_is_refused(saved, adapter, name):
    tensors = load_file(adapter / WEIGHTS)
    tensors[f"{name}.lora_A.weight"] = next(iter(tensors.values())).clone()
    save_file(tensors, adapter / WEIGHTS, {"format": "pt"})
    refused_by_conversion(saved, adapter, "names must be printable")
    refused_by_loading(adapter, "names must be printable")


def test_what_the_command_line_prints_is_printable(adapter):
    change_config(adapter, base_model_name_or_path=f"a{ESCAPE}\nformat  forged{'x' * 689_000}")
    done = CliRunner().invoke(app, ["inspect", str(adapter)])
    assert done.exit_code == 0
    assert done.stdout.replace("\n", "").isprintable()
    assert not any(line.startswith("format  forged") for line in done.stdout.splitlines())
    assert len(done.stdout) < 10_000
    change_config(adapter, peft_type=f"{ESCAPE}\nerror: forged{'x' * 689_000}")
    done = CliRunner().invoke(app, ["inspect", str(adapter)])
    assert done.exit_code == 3
    assert_printable(done.stderr.removesuffix("\n"))


@pytest.mark.parametrize(
    ("base", "shell", "python"),
    [
        ("Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-30B-A3B", '"Qwen/Qwen3-30B-A3B"'),
        ("/my models/a", "'/my models/a'", '"/my models/a"'),
        ("a; rm -rf ~", "'a; rm -rf ~'", '"a; rm -rf ~"'),
        ("$(reboot)", "'$(reboot)'", '"$(reboot)"'),
        ('a"); evil("', "'a\"); evil(\"'", "'a\"); evil(\"'"),
        ("C:\\models", "'C:\\models'", "'C:\\\\models'"),
        ("a\n```\n# forged", "BASE", '"BASE"'),
        ("--force", "BASE", '"BASE"'),
    ],
)
def test_a_card_quotes_the_name_of_the_base(base, shell, python):
    config = {"r": 4, "lora_alpha": 8, "base_model_name_or_path": base}
    lines = card_section(OUR_CARD, config).splitlines()
    assert any(line.startswith(f"vllm serve {shell} --enable-lora") for line in lines)
    assert f'model = AutoModelForCausalLM.from_pretrained({python}, dtype="auto")' in lines
    assert "# forged" not in lines


def test_a_configuration_of_8_gib_is_refused_unread(saved, adapter):
    os.truncate(adapter / CONFIG, 2**33)
    refused_by_conversion(saved, adapter, f"{2**33} bytes")

"""mlx-lm's adapters: what its own configuration means, and what it does not take."""

import json

import pytest

from convert.adapters import check_update, config_of, save_base, save_ours, update_of_ours
from peft_moe_lora import convert_adapter, inspect_adapter
from peft_moe_lora.files.tensor_file import AdapterError, RefusedError


@pytest.fixture
def of_mlx(qwen, tmp_path):
    """An adapter with the configuration that mlx-lm writes, which has no field of PEFT."""
    convert_adapter(qwen.ours, tmp_path / "theirs", to="mlx", base_config=qwen.config)
    own = ("fine_tune_type", "lora_parameters", "num_layers")
    config = config_of(tmp_path / "theirs")
    file = tmp_path / "theirs" / "adapter_config.json"
    file.write_text(json.dumps({name: config[name] for name in own}))
    return tmp_path / "theirs"


def test_an_adapter_of_mlx_lm(qwen, of_mlx):
    assert inspect_adapter(of_mlx, qwen.config).format == "mlx"
    check_update(qwen, of_mlx, update_of_ours(qwen.ours, qwen.base))


@pytest.mark.parametrize(
    ("config", "error", "match"),
    [
        ({"fine_tune_type": "dora"}, RefusedError, "only lora can be converted"),
        ({"fine_tune_type": "full"}, RefusedError, "mlx_lm.fuse"),
        ({"lora_parameters": None}, AdapterError, "rank and scale"),
        ({"lora_parameters": {"rank": 4, "scale": "2"}}, AdapterError, "rank and scale"),
        ({"lora_parameters": {"rank": True, "scale": 2.0}}, AdapterError, "rank and scale"),
        ({"lora_parameters": {"rank": 3, "scale": 2.0}}, AdapterError, "r=3"),
        ({"lora_parameters": {"rank": 4, "scale": 1e400}}, AdapterError, "finite|numbers"),
    ],
    ids=str,
)
def test_a_configuration_of_mlx_lm_that_does_not_fit(qwen, of_mlx, config, error, match, tmp_path):
    rewrite_config(of_mlx, **config)
    with pytest.raises(error, match=match):
        convert_adapter(of_mlx, tmp_path / "out", to="moe_lora", base_config=qwen.config)
    assert not (tmp_path / "out").exists()


def test_mlx_lm_is_told_of_families_that_were_not_tried(tmp_path):
    base = save_base("nemotron_h", tmp_path / "base")
    save_ours(base, tmp_path / "ours")
    with pytest.raises(RefusedError, match=r"nemotron_h was not tried.*peft-moe-lora merge"):
        convert_adapter(
            tmp_path / "ours", tmp_path / "out", to="mlx", base_config=tmp_path / "base"
        )


@pytest.mark.parametrize("names", [["kv_b_proj"], ["gate"], ["embed_tokens"]], ids=str)
def test_mlx_lm_is_told_of_layers_without_lora(made, names, tmp_path):
    case = made("deepseek_v3")
    save_ours(case.base, tmp_path / "ours", target_modules=["experts", *names])
    with pytest.raises(RefusedError, match=r"mlx-lm (has no LoRA|loads LoRA alone)"):
        convert_adapter(tmp_path / "ours", tmp_path / "out", to="mlx", base_config=case.config)


def rewrite_config(folder, **config):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


def test_an_output_of_ours_for_mlx_lm_is_replaced(qwen, tmp_path):
    for _ in range(2):
        convert_adapter(qwen.ours, tmp_path / "out", to="mlx", base_config=qwen.config, force=True)
    check_update(qwen, tmp_path / "out", update_of_ours(qwen.ours, qwen.base))

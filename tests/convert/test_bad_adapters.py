"""Bad input gets one clear error, and nothing is written.

An interrupted conversion leaves the destination as it was.
"""

import copy
import json
import os
import shutil
import tracemalloc

import pytest
import torch
from safetensors import safe_open

from convert.adapters import PREFIX, config_of, rewrite, save_base, save_ours, tensors
from peft_moe_lora import convert_adapter, inspect_adapter, verify_adapter
from peft_moe_lora.convert.reading import open_adapter
from peft_moe_lora.files.tensor_file import (
    AdapterError,
    Block,
    ExistsError,
    RefusedError,
    TensorFile,
    write_tensors,
)


@pytest.fixture(params=["moe_lora", "peft", "per_expert", "sglang_3d"])
def written(request, qwen, tmp_path):
    """An adapter in each format, to be spoilt."""
    if request.param == "moe_lora":
        shutil.copytree(qwen.ours, tmp_path / "in")
    else:
        convert_adapter(qwen.ours, tmp_path / "in", to=request.param, base_config=qwen.config)
    return request.param


def refused(qwen, tmp_path, match, to="peft", error=AdapterError):
    with pytest.raises(error, match=match) as caught:
        convert_adapter(tmp_path / "in", tmp_path / "out", to=to, base_config=qwen.config)
    assert [p.name for p in tmp_path.iterdir()] == ["in"], "something was written"
    return caught.value


def first_of(state, ending="lora_A"):
    return next(name for name in sorted(state) if ending in name and "experts" in name)


def test_a_truncated_file_is_refused(written, qwen, tmp_path):
    file = tmp_path / "in" / "adapter_model.safetensors"
    for length in (4, 200, file.stat().st_size - 3):
        content = file.read_bytes()
        file.write_bytes(content[:length])
        refused(qwen, tmp_path, "not a whole safetensors file")
        file.write_bytes(content)


def test_nan_is_refused(written, qwen, tmp_path):
    def spoil(state):
        state[first_of(state, "lora_B")].view(-1)[-1] = torch.nan
        return state

    rewrite(tmp_path / "in", spoil)
    refused(qwen, tmp_path, "NaN")
    with pytest.raises(AdapterError, match="NaN"):
        verify_adapter(tmp_path / "in", qwen.config)


def test_a_value_that_fp32_does_not_hold_is_refused(written, qwen, tmp_path):
    def spoil(state):
        state = {name: tensor.double() for name, tensor in state.items()}
        state[first_of(state, "lora_B")].view(-1)[-1] = 1e39
        return state

    rewrite(tmp_path / "in", spoil)
    refused(qwen, tmp_path, "too large for fp32")


def test_ints_are_refused(written, qwen, tmp_path):
    rewrite(
        tmp_path / "in",
        lambda s: {n: t.to(torch.int8) if n == first_of(s) else t for n, t in s.items()},
    )
    refused(qwen, tmp_path, "int8")


def test_two_dtypes_in_one_module_are_refused(written, qwen, tmp_path):
    rewrite(
        tmp_path / "in",
        lambda s: {n: t.bfloat16() if n == first_of(s) else t for n, t in s.items()},
    )
    refused(qwen, tmp_path, "mixes torch.bfloat16 and torch.float32")


def test_a_tensor_without_its_other_half_is_refused(written, qwen, tmp_path):
    rewrite(tmp_path / "in", lambda s: {n: t for n, t in s.items() if n != first_of(s, "lora_B")})
    refused(qwen, tmp_path, r"lora_B|misses|metadata describe")


def test_an_unknown_tensor_is_refused(written, qwen, tmp_path):
    rewrite(
        tmp_path / "in",
        lambda s: s | {f"{PREFIX}model.layers.0.self_attn.q_proj.lora_magnitude": torch.ones(3)},
    )
    refused(qwen, tmp_path, "lora_magnitude")


def test_a_rank_that_is_not_the_tensors_is_refused(written, qwen, tmp_path):
    for r in (3, 2, 64):
        rewrite(tmp_path / "in", r=r)
        refused(
            qwen,
            tmp_path,
            r"do not belong together|another model|adapter_config.json|metadata describe|is for 10",
        )


@pytest.mark.parametrize("r", [0, -1, 1.5, "4", True, None])
def test_a_rank_that_is_no_positive_integer_is_refused(written, qwen, tmp_path, r):
    rewrite(tmp_path / "in", r=r)
    refused(qwen, tmp_path, "ranks must be integers")


@pytest.mark.parametrize("alpha", [0, "8", float("nan"), None])
def test_an_alpha_that_is_no_positive_number_is_refused(qwen, tmp_path, alpha):
    shutil.copytree(qwen.ours, tmp_path / "in")
    rewrite(tmp_path / "in", lora_alpha=alpha)
    refused(qwen, tmp_path, "lora_alpha")


def test_an_adapter_for_another_model_is_refused(written, qwen, tmp_path):
    for change in (
        {"num_experts": 7},
        {"moe_intermediate_size": 48},
        {"num_hidden_layers": 1},
        {"hidden_size": 64},
    ):
        config = copy.deepcopy(qwen.base.config)
        for name, value in change.items():
            setattr(config, name, value)
        with pytest.raises(AdapterError, match=r"experts|expert \d|A and B|another model"):
            convert_adapter(tmp_path / "in", tmp_path / "out", to="peft", base_config=config)
        assert not (tmp_path / "out").exists()


def test_a_dense_base_has_no_experts(qwen, tmp_path):
    shutil.copytree(qwen.ours, tmp_path / "in")
    with pytest.raises(RefusedError, match="no routed experts"):
        convert_adapter(
            tmp_path / "in", tmp_path / "out", to="peft", base_config={"model_type": "llama"}
        )
    with pytest.raises(AdapterError, match="config"):
        convert_adapter(
            tmp_path / "in", tmp_path / "out", to="peft", base_config=tmp_path / "nowhere"
        )


def test_missing_and_further_experts_are_refused(qwen, tmp_path):
    convert_adapter(qwen.ours, tmp_path / "in", to="per_expert", base_config=qwen.config)
    whole = tensors(tmp_path / "in")
    rewrite(
        tmp_path / "in", lambda s: {n: t for n, t in s.items() if ".experts.3.up_proj" not in n}
    )
    refused(qwen, tmp_path, "misses up_proj of expert 3")
    rewrite(tmp_path / "in", lambda s: {n: t for n, t in whole.items() if "gate_proj" not in n})
    refused(qwen, tmp_path, "one of gate_proj and up_proj")
    rewrite(
        tmp_path / "in",
        lambda s: whole | {n.replace("experts.4", "experts.5"): t for n, t in whole.items()},
    )
    refused(qwen, tmp_path, r"has experts \[5\]")
    rewrite(
        tmp_path / "in",
        lambda s: {n: t[:1] if "experts.2.up_proj.lora_A" in n else t for n, t in whole.items()},
    )
    refused(qwen, tmp_path, "up_proj of expert 2")


def test_a_projection_missing_in_one_layer_is_filled_or_found(qwen, tmp_path):
    """Our metadata lists what the file holds, so a lost projection is noticed."""
    shutil.copytree(qwen.ours, tmp_path / "in")
    from safetensors import safe_open

    with safe_open(tmp_path / "in" / "adapter_model.safetensors", "pt") as f:
        metadata = f.metadata()
    rewrite(
        tmp_path / "in",
        lambda s: {n: t for n, t in s.items() if "layers.1" not in n or "down" not in n},
        metadata,
    )
    refused(qwen, tmp_path, "metadata describe")


def test_two_formats_in_one_file_are_refused(qwen, tmp_path):
    convert_adapter(qwen.ours, tmp_path / "in", to="peft", base_config=qwen.config)
    rewrite(tmp_path / "in", lambda s: s | tensors(qwen.ours))
    refused(qwen, tmp_path, "moe_lora and peft")


def test_the_same_tensor_under_two_names_is_refused(qwen, tmp_path):
    shutil.copytree(qwen.ours, tmp_path / "in")
    rewrite(tmp_path / "in", lambda s: s | {n.removeprefix(PREFIX): t for n, t in s.items()})
    refused(qwen, tmp_path, "under two names")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": [1]}, "rank_pattern"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
    ],
)
def test_configurations_that_are_no_lora_of_ours_are_refused(qwen, tmp_path, change, match):
    shutil.copytree(qwen.ours, tmp_path / "in")
    rewrite(tmp_path / "in", **change)
    refused(qwen, tmp_path, match)


def test_transposed_weights_are_of_layers_beside_experts(qwen, tmp_path):
    """PEFT resets fan_in_fan_out only where it adapts a linear layer."""
    for name, beside in (("in", []), ("beside", ["q_proj"])):
        save_ours(qwen.base, tmp_path / name, r=4, target_modules=["experts", *beside])
        rewrite(tmp_path / name, fan_in_fan_out=True)
    assert verify_adapter(tmp_path / "in", qwen.config).ok
    with pytest.raises(RefusedError, match=r"fan_in_fan_out=True.*q_proj"):
        verify_adapter(tmp_path / "beside", qwen.config)


def test_fields_that_are_not_known_are_refused_in_our_format(qwen, tmp_path):
    """A newer release may have written them, and A and B may mean something else with them."""
    shutil.copytree(qwen.ours, tmp_path / "in")
    rewrite(tmp_path / "in", lora_magic=3, lora_none=None, lora_B_layout="rank_major")
    refused(qwen, tmp_path, r"no fields \['lora_magic'\]. Upgrade peft_moe_lora and peft")


def test_fields_of_other_programs_that_are_not_known_are_named(qwen, tmp_path):
    convert_adapter(qwen.ours, tmp_path / "in", to="peft", base_config=qwen.config)
    rewrite(tmp_path / "in", lora_magic=3, lora_none=None, lora_B_layout="rank_major")
    note = "fields of adapter_config.json that are not known are left out: ['lora_magic']"
    assert note in inspect_adapter(tmp_path / "in", qwen.config).notes


def test_broken_json_no_weights_and_a_pickle_are_refused(qwen, tmp_path):
    shutil.copytree(qwen.ours, tmp_path / "in")
    (tmp_path / "in" / "adapter_config.json").write_text("{")
    refused(qwen, tmp_path, "not JSON")
    (tmp_path / "in" / "adapter_config.json").unlink()
    refused(qwen, tmp_path, "does not exist")
    (tmp_path / "in" / "adapter_model.safetensors").rename(tmp_path / "in" / "adapter_model.bin")
    refused(qwen, tmp_path, "pickle")


def test_a_format_that_is_only_read_is_not_written(qwen, tmp_path):
    shutil.copytree(qwen.ours, tmp_path / "in")
    refused(qwen, tmp_path, "read only", to="peft_legacy", error=RefusedError)


def test_nothing_is_overwritten_unless_told(qwen, tmp_path):
    shutil.copytree(qwen.ours, tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(ExistsError, match="--force"):
        convert_adapter(tmp_path / "in", tmp_path / "out", to="peft", base_config=qwen.config)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]
    with pytest.raises(ExistsError, match=r"thesis\.txt"):
        convert_adapter(
            tmp_path / "in", tmp_path / "out", to="peft", base_config=qwen.config, force=True
        )
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize("force", [False, True])
def test_an_interrupted_conversion_leaves_what_was_there(qwen, tmp_path, force):
    shutil.copytree(qwen.ours, tmp_path / "in")
    if force:
        convert_adapter(tmp_path / "in", tmp_path / "out", to="peft", base_config=qwen.config)
    before = tensors(tmp_path / "out") if force else None

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_adapter(
            tmp_path / "in",
            tmp_path / "out",
            to="sglang_3d",
            base_config=qwen.config,
            force=force,
            progress=interrupt,
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"][: 1 + force]
    if force:
        assert all(torch.equal(t, before[n]) for n, t in tensors(tmp_path / "out").items())


@pytest.mark.parametrize("claimed", [100_000, 2049])
@pytest.mark.parametrize("to", ["moe_lora", "peft"])
def test_a_number_of_experts_that_only_a_lie_explains_is_refused(qwen, tmp_path, claimed, to):
    """Without a base model, the metadata alone give the number of all experts."""
    save_ours(qwen.base, tmp_path / "in", expert_indices={"experts": [1, 3]})
    file = tmp_path / "in" / "adapter_model.safetensors"
    with safe_open(file, framework="pt") as opened:
        description = json.loads(opened.metadata()["peft_moe_lora"])
    for module in description["experts"].values():
        module["num_experts"] = claimed
    metadata = {"format": "pt", "peft_moe_lora": json.dumps(description)}
    rewrite(tmp_path / "in", lambda state: state, metadata, base_model_name_or_path="org/absent")
    with pytest.raises(AdapterError, match="--base-config"):
        convert_adapter(tmp_path / "in", tmp_path / "out", to=to)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_an_empty_lora_tensor_is_refused(written, qwen, tmp_path):
    """Its other dimension may be any number, whatever the size of the file."""
    rewrite(
        tmp_path / "in",
        lambda s: {**s, f"{PREFIX}lm_head.lora_A.weight": torch.empty(10**6, 0)},
    )
    refused(qwen, tmp_path, "must not be empty")


def test_verify_names_what_only_one_of_two_adapts(qwen, tmp_path):
    save_ours(qwen.base, tmp_path / "more", target_modules=["experts", "q_proj"])
    with pytest.raises(AdapterError, match="q_proj"):
        verify_adapter(qwen.ours, qwen.config, tmp_path / "more")
    save_ours(qwen.base, tmp_path / "less", layers_to_transform=[0])
    with pytest.raises(AdapterError, match=r"layers\.1"):
        verify_adapter(qwen.ours, qwen.config, tmp_path / "less")


# ---- memory --------------------------------------------------------------------------------------


def test_memory_is_that_of_one_projection(tmp_path):
    """The file has 24 layers: it is 30 times as large as what a conversion may hold of it.

    docs/guides/conversions.md has the numbers at full size.
    """
    layers, E, r, H, width = 24, 16, 8, 64, 32
    path = "model.layers.{}.mlp.experts"
    torch.manual_seed(0)

    def block(name, shape):
        return Block({f"{PREFIX}{name}": shape}, torch.float32, lambda: [torch.randn(shape)])

    blocks = [
        block(f"{path.format(i)}.lora_{side}.{projection}", shape)
        for i in range(layers)
        for projection, K, N in (("gate_up", H, 2 * width), ("down", width, H))
        for side, shape in (("A", (r * E, K)), ("B", (N, r * E)))
    ]
    (tmp_path / "in").mkdir()
    write_tensors(tmp_path / "in" / "adapter_model.safetensors", blocks, {"format": "pt"})
    (tmp_path / "in" / "adapter_config.json").write_text("{}")
    rewrite(tmp_path / "in", peft_type="MOE_LORA", r=r, lora_alpha=8, target_modules=["experts"])
    size = (tmp_path / "in" / "adapter_model.safetensors").stat().st_size
    peak = _peak_of_tensors(tmp_path, size)
    assert peak < size / 4, f"{peak} bytes of tensors at once for a file of {size}"


def _peak_of_tensors(tmp_path, size):
    """The largest number of bytes in live tensors seen while a conversion runs."""
    import gc

    peaks = []

    def watch(done, total):
        if done % 16:
            return  # looking at every object takes a while
        live = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in gc.get_objects() if type(t) is torch.Tensor and not t.is_meta}  # fmt: skip
        peaks.append(sum(live.values()))

    # what a first conversion imports is no memory of a conversion
    convert_adapter(tmp_path / "in", tmp_path / "first", to="peft")
    gc.collect()
    tracemalloc.start()
    convert_adapter(tmp_path / "in", tmp_path / "second", to="peft")
    _, python = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert python < size
    # in a run of its own: the list of every object is memory too
    convert_adapter(tmp_path / "in", tmp_path / "out", to="peft", progress=watch)
    return max(peaks)


def test_written_files_are_safetensors_that_others_read(tmp_path):
    """Several dtypes, odd sizes, an empty tensor: the library's own reader takes them."""
    wanted = {
        "a": torch.randn(3),
        "b": torch.randn(5, 1).bfloat16(),
        "c": torch.randn(2, 0),
        "d": torch.tensor([True]),
    }
    blocks = [Block({n: tuple(t.shape)}, t.dtype, lambda t=t: [t]) for n, t in wanted.items()]
    write_tensors(tmp_path / "x.safetensors", blocks, {"format": "pt"})
    from safetensors.torch import load_file

    found = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(found[n], t) for n, t in wanted.items())
    assert torch.equal(TensorFile(tmp_path / "x.safetensors").load("b", row=3), wanted["b"][3])


def test_reading_costs_no_memory(qwen):
    adapter = open_adapter(qwen.ours, qwen.config)
    assert all(callable(pair.load) for pair in adapter.pairs())
    assert config_of(qwen.ours)["peft_type"] == "MOE_LORA"


def test_a_base_of_another_family(made, qwen, tmp_path):
    save_base("mixtral", tmp_path / "base")
    with pytest.raises(AdapterError):
        convert_adapter(
            made("deepseek_v3").ours, tmp_path / "out", to="peft", base_config=tmp_path / "base"
        )


@pytest.mark.parametrize("name", ["README.md", "tokenizer.json"])
def test_a_file_beside_the_adapter_that_is_too_large_is_refused(qwen, name, tmp_path):
    shutil.copytree(qwen.ours, tmp_path / "in")
    (tmp_path / "in" / name).touch()
    # it takes no room on the disk
    os.truncate(tmp_path / "in" / name, 2**33)
    refused(qwen, tmp_path, f"{name} has {2**33} bytes")

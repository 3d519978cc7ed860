"""Random configurations over six families: right at every step of an adapter's life, or refused.

Forward, gradients, save, load, merge and every conversion are compared with the base on
W + scaling * B A, written out in `fuzz.written_out`. A and B are random and change every output by
about its own size.
"""

import copy
import json
import shutil
from dataclasses import fields

import pytest
import torch
from hypothesis import given, note
from peft import LoraModel, PeftModel, get_peft_model
from safetensors.torch import load_file

from fuzz import written_out
from fuzz.bases import DROPPED_BY_PEFT, IN_MLX, NO_EXPORT, NOT_IN_VLLM_3D
from fuzz.configurations import NOT_DRAWN, WRONG, configurations, right_values
from fuzz.filled import IDS, fill, logits_of, trained_biases
from helpers import assert_close, assert_unchanged, relative_error, snapshot
from peft_moe_lora import MoELoraConfig, convert_adapter, merge_adapter, verify_adapter
from peft_moe_lora.convert.formats import FORMATS
from peft_moe_lora.files.tensor_file import AdapterError, RefusedError

# everything is computed in fp64; some routers and norms compute in fp32
EXACT = 1e-5
# merged weights are computed and stored in fp32
STORED = 1e-5
# a scaling folded into B rounds B once more to the file's dtype
ROUNDED = {"float32": EXACT, "bfloat16": 2e-2, "float16": 4e-3}


def test_a_configuration_is_right_or_refused(bases, tmp_path, examples):
    @examples(fixed=240, random=500, many=1000)
    @given(configurations())
    def check(drawn):
        folder = tmp_path / "life"
        try:
            check_life(bases[drawn.family], drawn, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    check()


def test_every_field_is_drawn():
    """A field that is drawn neither right nor wrong has a reason; a new one has none yet."""
    known = {field.name for field in fields(MoELoraConfig)}
    right = {"r", "target_modules", "layers_pattern", *right_values("qwen3_moe")}
    assert known <= right | NOT_DRAWN.keys()
    assert not right & NOT_DRAWN.keys()
    assert known <= {name for name, _ in WRONG}


def check_life(base, drawn, folder):
    """One configuration, from MoELoraConfig to a merged checkpoint."""
    model = copy.deepcopy(base.model)
    meant, refused = meaning_or_refusal(base, drawn)
    if refused:
        before = snapshot(model)
        with pytest.raises(ValueError, match=refused):
            get_peft_model(model, MoELoraConfig(**copy.deepcopy(drawn.fields)))
        assert_unchanged(model, before)
        return
    given = copy.deepcopy(drawn.fields)
    adapted = get_peft_model(model, MoELoraConfig(**given)).eval()
    assert given == drawn.fields, "the user's own values were changed"
    life = fill(base, drawn, adapted, meant)
    check_forward_and_gradients(base, life)
    check_merged(base, life)
    check_files(base, drawn, life, folder)


def meaning_or_refusal(base, drawn):
    """What the configuration means, or the names of the fields that an error may blame."""
    given = dict(drawn.fields)
    blamed = []
    if drawn.wrong:
        blamed.append(drawn.wrong)
        # the other fields beside a right value, as they may be looked at first
        given[drawn.wrong] = {"r": 4, "target_modules": ["experts"]}.get(drawn.wrong)
        given = {name: value for name, value in given.items() if value is not None}
    meant = None
    try:
        meant = written_out.meaning({"target_modules": None, **given}, base.names)
    except written_out.Refused as error:
        blamed.append(str(error))
    return meant, "|".join(blamed)


def check_forward_and_gradients(base, life):
    leaves = {
        name: tuple(side.detach().double().requires_grad_() for side in pair)
        for name, pair in life.pairs.items()
    }
    updates = written_out.updates(leaves, life.meant, base.names)
    changed = written_out.weights(base, updates, life.targets)
    right = written_out.logits(base, {**life.saved, **changed}, IDS)
    out = logits_of(life.adapted)
    plain = logits_of(base.model)
    assert relative_error(right, plain) > 1e-3, "the adapter's share is too small to see"
    assert_close(out, right, EXACT, "logits")
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out)
    flat = [side for pair in leaves.values() for side in pair]
    expected = torch.autograd.grad(right, flat, direction)
    held = [side for pair in life.pairs.values() for side in pair]
    assert all(side.requires_grad for side in held)
    found = torch.autograd.grad(out, held, direction)
    largest = max(gradient.abs().max() for gradient in expected)
    for name, got, wanted in zip(life.targets, found[::2], expected[::2], strict=True):
        error = (got - wanted).abs().max() / largest
        assert error < EXACT, f"gradient of {name}: {error:.2e}"
    for name, got, wanted in zip(life.targets, found[1::2], expected[1::2], strict=True):
        error = (got - wanted).abs().max() / largest
        assert error < EXACT, f"gradient of B of {name}: {error:.2e}"
    life.logits = right.detach()
    life.updates = {name: update.detach() for name, update in updates.items()}
    life.weights = {name: weight.detach() for name, weight in changed.items()} | life.saved


# ---- files ---------------------------------------------------------------------------------------


def check_files(base, drawn, life, folder):
    dtype = getattr(torch, drawn.dtype)
    for pair in life.pairs.values():
        for side in pair:
            side.data = side.data.to(dtype)
    ours = folder / "ours"
    life.adapted.save_pretrained(ours)
    held = load_file(ours / "adapter_model.safetensors")
    assert {t.dtype for n, t in held.items() if ".lora_" in n} == {dtype}
    life.without_lora = [name for name in held if ".lora_" not in name]
    assert_close(logits_of(loaded(base, ours)), life.logits, EXACT, "logits of what was saved")
    obstacle = no_conversion(base, drawn, life)
    if obstacle:
        for to in FORMATS:
            check_refused(folder, ours, base, to, obstacle)
        return
    for to in FORMATS:
        check_converted(base, drawn, life, folder, to)
    check_merged_file(base, life, folder)


def loaded(base, folder):
    return PeftModel.from_pretrained(copy.deepcopy(base.model), folder).eval()


def no_conversion(base, drawn, life):
    """Words of the error, where no format can take the adapter; None where one can."""
    alphas = (drawn.fields.get("alpha_pattern") or {}).values()
    if 0 in (drawn.fields.get("lora_alpha"), *alphas):
        return "other than 0"
    if not set(life.meant) & set(base.names.experts):
        return "no tensors of experts"
    return None


def no_such_format(base, life, to):
    """Words of the error, where a format cannot take the adapter; None where it can."""
    if to == "moe_lora":
        return None
    if base.family in NO_EXPORT:
        return "merge it"
    if to == "peft" and dropped_by_peft(base, life):
        return "PEFT takes"
    if to == "vllm_3d" and (life.without_lora or base.family in NOT_IN_VLLM_3D):
        return "vLLM"
    if to == "sglang_3d" and not_in_sglang(base, life):
        return "SGLang"
    if to == "mlx" and (base.family not in IN_MLX or not_in_mlx(base, life)):
        return "mlx-lm"
    routers = set(life.meant) & set(base.names.routers)
    # PEFT ignores the experts of these families in this format
    unread = {
        "gpt_oss": not_in_sglang(base, life),
        "nemotron_h": bool(life.without_lora or routers),
    }
    # and a layer beside the experts of others, where the servers refuse what is no LoRA
    dropped = bool(life.without_lora) and dropped_by_peft(base, life)
    if to == "per_expert" and unread.get(base.family, dropped):
        return "no program reads"
    return None


def not_in_sglang(base, life):
    """Whether SGLang cannot load what is beside the experts."""
    routers = set(life.meant) & set(base.names.routers)
    blocks = {}
    for path in life.meant:
        block, _, name = path.rpartition(".")
        blocks.setdefault(block, set()).add(name)
    return bool(life.without_lora or routers or any(map(incomplete, blocks.values())))


def not_in_mlx(base, life):
    """Whether mlx-lm has no LoRA on a layer beside the experts."""
    absent = IN_MLX[base.family] | {"embed_tokens"}
    return bool(life.without_lora) or any(path.rpartition(".")[2] in absent for path in life.meant)


def incomplete(names):
    """Whether a block adapts a part of what SGLang stacks."""
    query = names & {"q_proj", "k_proj", "v_proj"}
    latent = names & {"q_a_proj", "kv_a_proj_with_mqa"}
    return (bool(query) and not query >= {"q_proj", "v_proj"}) or len(latent) == 1


def dropped_by_peft(base, life):
    names = DROPPED_BY_PEFT.get(base.family, ())
    return any(path.endswith(names) for path in life.meant)


def check_refused(folder, ours, base, to, words):
    before = sorted(folder.iterdir())
    with pytest.raises(AdapterError, match=words) as refusal:
        convert_adapter(ours, folder / to, to=to, base_config=base.folder)
    assert sorted(folder.iterdir()) == before
    return refusal


def check_converted(base, drawn, life, folder, to):
    ours = folder / "ours"
    words = no_such_format(base, life, to)
    if words:
        assert isinstance(check_refused(folder, ours, base, to, words).value, RefusedError)
        return
    tolerance = ROUNDED[drawn.dtype]
    done = convert_adapter(ours, folder / to, to=to, base_config=base.folder)
    notes = " ".join(done.notes)
    note(f"{to}: {notes}")
    back = folder / f"back from {to}"
    convert_adapter(folder / to, back, to="moe_lora", base_config=base.folder)
    verified = verify_adapter(ours, base.folder, folder / to)
    assert verified.ok or verified.max_error < tolerance, verified
    assert_same(logits_of(loaded(base, back)), life, tolerance, f"{to} and back")
    reads_peft = to in ("peft", "vllm_3d", "per_expert") and "PEFT does not read" not in notes
    reads_peft = reads_peft and not dropped_by_peft(base, life)
    if reads_peft:
        with_peft = loaded(base, folder / to)
        assert type(with_peft.base_model) is LoraModel
        assert_same(logits_of(with_peft), life, tolerance, f"{to}, read by PEFT")


def assert_same(logits, life, tolerance, what):
    # rounding B may turn a routing decision; EXACT is what holds where nothing is rounded
    if relative_error(logits, life.logits) <= EXACT:
        return
    share = (logits - life.logits).norm() / life.logits.norm()
    assert tolerance > EXACT, f"{what}: {relative_error(logits, life.logits):.2e}"
    assert share <= 10 * tolerance, f"{what}: {share:.2e}"


def check_merged_file(base, life, folder):
    merge_adapter(folder / "ours", base.folder, folder / "merged")
    merged = type(base.model).from_pretrained(folder / "merged").state_dict()
    named = dict(base.model.named_parameters())
    for name, parameter in named.items():
        right = life.weights.get(name, parameter)
        assert_close(merged[name], right.float(), STORED, f"merged {name}")
    assert json.loads((folder / "merged" / "config.json").read_text())


def check_merged(base, life):
    """In memory: merged, taken out again, and unloaded."""
    life.adapted.merge_adapter()
    assert_close(logits_of(life.adapted), life.logits, EXACT, "logits of the merged model")
    life.adapted.unmerge_adapter()
    assert_close(logits_of(life.adapted), life.logits, EXACT, "logits after unmerging")
    with life.adapted.disable_adapter():
        # as in PEFT, biases are trained in place
        biases = trained_biases(life.adapted)
        plain = written_out.logits(base, biases, IDS)
        assert_close(logits_of(life.adapted), plain, EXACT, "logits without it")
    merged = copy.deepcopy(life.adapted).merge_and_unload().state_dict()
    named = dict(base.model.named_parameters())
    assert set(named) <= set(merged)
    for name, parameter in named.items():
        assert_close(merged[name], life.weights.get(name, parameter), STORED, f"merged {name}")

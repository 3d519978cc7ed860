"""Training as users run it: each mode against the same model written out densely.

On a CPU the experts run in plain PyTorch, on a CUDA device in the kernels. The adapter changes much
of the output. Numbers are compared with `DenseTwin`: the base model on W + scaling * B A.
"""

import copy

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from peft import LoraConfig, get_peft_model

from helpers import (
    FP32,
    FUSED_FAMILIES,
    ROUTED_FAMILIES,
    SAME,
    UNFUSED_FAMILIES,
    DenseTwin,
    R,
    adapter_parameters,
    assert_close,
    assert_share_of_order_one,
    experts_paths,
    fill_adapter,
    moe_lora,
    tiny_model,
    token_ids,
)
from peft_moe_lora.functional import steps, whole

EVERYWHERE = ["experts", "q_proj", "v_proj"]
families = pytest.mark.parametrize("family", ROUTED_FAMILIES)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


def adapted(device, family="qwen3_moe", dtype=torch.float32, seed=0, changes=None, **config):
    """A tiny model with a random adapter on a device, with the backend of that device."""
    base = tiny_model(family, seed=seed, **(changes or {}))
    config = {"backend": "triton" if device == "cuda" else "torch", **config}
    model = moe_lora(base, **config).to(device)
    for module in model.modules():
        # the adapter stays fp32, as PEFT has it
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    return model


def ids_on(device, **kwargs):
    return token_ids(**kwargs).to(device)


def logits(model, ids, **kwargs):
    return model(input_ids=ids, use_cache=False, **kwargs).logits


def language_loss(model, ids, **kwargs):
    return model(input_ids=ids, labels=kwargs.pop("labels", ids), use_cache=False, **kwargs).loss


def gradients(model):
    """{name: gradient} of the adapter; all exist and none is zero."""
    found = {name: parameter.grad for name, parameter in adapter_parameters(model).items()}
    assert all(grad is not None and grad.abs().max() > 0 for grad in found.values())
    return {name: grad.clone() for name, grad in found.items()}


def assert_gradients(actual, expected, tolerance=FP32):
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        assert_close(actual[name], grad, tolerance, name)


def test_the_twin_is_the_model(device):
    """All tests below rely on this: forward and gradients, experts and attention."""
    for family in ROUTED_FAMILIES:
        targets = ["experts", "q_a_proj"] if family == "deepseek_v3" else EVERYWHERE
        model, ids = adapted(device, family, target_modules=targets), ids_on(device)
        twin = DenseTwin(model)
        with model.disable_adapter():
            plain = logits(model, ids)
        assert_share_of_order_one(logits(model, ids), plain)
        assert_close(logits(model, ids), logits(twin, ids))
        language_loss(model, ids).backward()
        assert_gradients(gradients(model), twin.gradients(language_loss(twin, ids)), 5 * FP32)


# ---- gradient checkpointing ----------------------------------------------------------------------


@pytest.fixture
def routings(monkeypatch):
    """Every routing that the experts layers make, in order."""
    made = []
    ops_for = whole.ops_for

    class Recording:
        def __init__(self, ops):
            self.ops = ops

        def __getattr__(self, name):
            return getattr(self.ops, name)

        def replayed(self, function, *arguments):
            # a replayed call routes on the device alone
            return function(*arguments)

        def route(self, *args):
            routing = self.ops.route(*args)
            index = routing.expert_offsets, routing.row_token, routing.row_slot, routing.slot_row
            made.append([t.clone() for t in index])
            return routing

    for module in (whole, steps):
        monkeypatch.setattr(module, "ops_for", lambda *args: Recording(ops_for(*args)))
    return made


@families
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_recomputed_routing_is_the_saved_routing(device, family, use_reentrant, autocast, routings):
    """With dropout before the router, so that the routing depends on the draw."""
    model = adapted(device, family, lora_dropout=0.3, target_modules=["experts", "o_proj"]).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        loss = language_loss(model, ids_on(device))
    forward = list(routings)
    loss.backward()
    backward = routings[len(forward) :]
    assert len(forward) == len(backward) == len(experts_paths(tiny_model(family)))
    # backward goes through the layers from the last to the first
    for saved, recomputed in zip(forward, reversed(backward), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(saved, recomputed, strict=True))
    model.eval()
    routings.clear()
    with torch.no_grad():
        logits(model, ids_on(device))
    assert not torch.equal(routings[-1][2], forward[-1][2]), (
        "dropout changed no routing: the test proves nothing"
    )


@families
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_checkpointed_gradients_are_the_twins(device, family, use_reentrant, recompute):
    model, ids = (
        adapted(device, family, recompute=recompute, target_modules=["experts", "o_proj"]).train(),
        ids_on(device),
    )
    twin = DenseTwin(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    language_loss(model, ids).backward()
    assert_gradients(gradients(model), twin.gradients(language_loss(twin, ids)), 5 * FP32)


@families
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_repeats_dropout(device, family, use_reentrant):
    model = adapted(device, family, lora_dropout=0.2, target_modules=["experts", "o_proj"]).train()
    model.enable_input_require_grads()

    def run():
        model.zero_grad()
        torch.manual_seed(8)
        loss = language_loss(model, ids_on(device))
        loss.backward()
        return loss.detach(), gradients(model)

    (kept, kept_grads), (eval_loss, _) = (
        run(),
        (language_loss(model.eval(), ids_on(device)), model.train()),
    )
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    loss, grads = run()
    assert_close(loss, kept, SAME)
    assert_gradients(grads, kept_grads)
    assert not torch.allclose(loss, eval_loss, rtol=1e-3), "dropout did nothing"


# ---- mixed precision -----------------------------------------------------------------------------


def steady_batch(model, device, batch=3, length=6, of=400):
    """Random sequences whose tokens are furthest from other experts: rounding changes none."""
    ids = ids_on(device, batch=of, length=length)
    with torch.no_grad():
        routers = model(input_ids=ids, output_router_logits=True, use_cache=False).router_logits
    best = torch.stack(routers).sort(dim=-1, descending=True).values  # [layers, batch * length, E]
    margin = (best[..., 1] - best[..., 2]).view(len(routers), of, length).amin(dim=(0, 2))
    return ids[margin.topk(batch).indices]


def relative(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def assert_as_exact_as_the_twin(actual, twins, exact, atol):
    """No more than twice the rounding of the same computation in plain PyTorch."""
    for name, right in exact.items():
        error, plain = relative(actual[name], right), relative(twins[name], right)
        assert error <= 2 * plain + atol, (
            f"{name}: {error:.2e} against {plain:.2e} in plain PyTorch"
        )


LOW = [torch.bfloat16, torch.float16]
# the result is rounded once
ATOL = {torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.mark.parametrize("low", LOW, ids=str)
@pytest.mark.parametrize("base", [torch.float32, None], ids=["fp32 base", "low base"])
def test_autocast_rounds_no_more_than_plain_pytorch(device, low, base, routings):
    model = adapted(device, target_modules=EVERYWHERE).train()
    ids, exact_twin = steady_batch(model, device), DenseTwin(model)
    exact_loss = language_loss(exact_twin, ids)
    exact = {"loss": exact_loss.detach(), **exact_twin.gradients(exact_loss)}
    model = adapted(device, dtype=base or low, target_modules=EVERYWHERE).train()
    twin = DenseTwin(model)
    routings.clear()
    with torch.autocast(device, low):
        loss, twin_loss = language_loss(model, ids), language_loss(twin, ids)
    loss.backward()
    found = gradients(model)
    assert all(grad.dtype == torch.float32 for grad in found.values())
    # row_token: which tokens each expert has; the order of a token's two experts is free
    low_routing = [r[1] for r in routings]
    routings.clear()
    logits(adapted(device, target_modules=EVERYWHERE), ids)
    assert all(torch.equal(a, b[1]) for a, b in zip(low_routing, routings, strict=True)), (
        "a token changed experts"
    )
    twins = {"loss": twin_loss.detach(), **twin.gradients(twin_loss)}
    assert_as_exact_as_the_twin({"loss": loss.detach(), **found}, twins, exact, ATOL[low])


@pytest.mark.parametrize("base", [torch.float32, torch.float16], ids=str)
def test_unscaled_gradients_are_the_unscaled_models(device, base):
    model = adapted(device, target_modules=EVERYWHERE).train()
    ids, twin = steady_batch(model, device), DenseTwin(model)
    exact = twin.gradients(language_loss(twin, ids))
    model = adapted(device, dtype=base, target_modules=EVERYWHERE).train()
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
    optimizer = torch.optim.SGD(adapter_parameters(model).values(), lr=0.1)
    with torch.autocast(device, torch.float16):
        loss = language_loss(model, ids)
    scaler.scale(loss).backward()
    assert_gradients(gradients(model), {n: 2.0**10 * g for n, g in exact.items()}, 2e-2)
    scaler.unscale_(optimizer)
    assert_gradients(gradients(model), exact, 2e-2)
    before = {n: p.detach().clone() for n, p in adapter_parameters(model).items()}
    scaler.step(optimizer)
    moved = {n: before[n] - p.detach() for n, p in adapter_parameters(model).items()}
    assert_gradients(moved, {n: 0.1 * g for n, g in exact.items()}, 2e-2)


@pytest.mark.parametrize("base", [torch.float32, torch.float16], ids=str)
def test_a_step_that_overflows_is_skipped_and_the_next_one_is_taken(device, base):
    model, ids = adapted(device, dtype=base, target_modules=EVERYWHERE).train(), ids_on(device)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**40, backoff_factor=2.0**-30)
    optimizer = torch.optim.SGD(adapter_parameters(model).values(), lr=0.1)
    before = {n: p.detach().clone() for n, p in adapter_parameters(model).items()}

    def step():
        optimizer.zero_grad()
        with torch.autocast(device, torch.float16):
            loss = language_loss(model, ids)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    step()
    assert not all(p.grad.isfinite().all() for p in adapter_parameters(model).values())
    assert all(torch.equal(p, before[n]) for n, p in adapter_parameters(model).items())
    assert scaler.get_scale() == 2.0**10
    step()
    assert scaler.get_scale() == 2.0**10
    for name, parameter in adapter_parameters(model).items():
        assert parameter.isfinite().all()
        assert not torch.equal(parameter, before[name]), name


# ---- accumulation, eval and train ----------------------------------------------------------------


@families
def test_accumulated_gradients_are_those_of_the_whole_batch(device, family):
    model = adapted(device, family).train()
    batches, twin = [ids_on(device, seed=s) for s in (1, 2, 3)], DenseTwin(model)
    for ids in batches:
        (language_loss(model, ids) / 3).backward()
    assert_gradients(
        gradients(model), twin.gradients(language_loss(twin, torch.cat(batches))), 5 * FP32
    )


def test_eval_and_train_switch_dropout_and_nothing_else(device):
    model, ids = adapted(device, lora_dropout=0.5, target_modules=EVERYWHERE), ids_on(device)
    twin = DenseTwin(model)
    right = logits(twin, ids)
    for _ in range(2):
        assert_close(logits(model.eval(), ids), right)
        model.train()
        assert not torch.equal(logits(model, ids), logits(model, ids)), "dropout draws anew"
        torch.manual_seed(2)
        first = logits(model, ids)
        torch.manual_seed(2)
        assert torch.equal(logits(model, ids), first)
    # an evaluation between forward and backward, as in some loops, does not change the step
    torch.manual_seed(2)
    loss = language_loss(model.train(), ids)
    with torch.no_grad():
        assert_close(logits(model.eval(), ids), right)
    loss.backward()
    between = gradients(model)
    model.train().zero_grad()
    torch.manual_seed(2)
    language_loss(model, ids).backward()
    assert_gradients(between, gradients(model), SAME)
    # gradients in eval mode are those without dropout
    model.eval().zero_grad()
    language_loss(model, ids).backward()
    assert_gradients(gradients(model), twin.gradients(language_loss(twin, ids)), 5 * FP32)


# ---- torch.compile -------------------------------------------------------------------------------


def count_breaks(model, ids):
    torch._dynamo.reset()
    found = torch._dynamo.explain(model)(input_ids=ids, use_cache=False)
    return found.graph_break_count, [str(reason.reason)[:200] for reason in found.break_reasons]


@pytest.mark.parametrize("family", [*FUSED_FAMILIES, *UNFUSED_FAMILIES])
def test_compiling_breaks_no_more_graphs_than_without_the_adapter(device, family):
    base, ids = tiny_model(family).to(device), ids_on(device)
    without, _ = count_breaks(base, ids)
    backend = "triton" if device == "cuda" else "torch"
    model = moe_lora(base, backend=backend, lora_dropout=0.1).train()
    breaks, reasons = count_breaks(model, ids)
    assert breaks <= without, reasons
    with model.disable_adapter():
        breaks, reasons = count_breaks(model, ids)
    assert breaks <= without, reasons


def test_compiling_breaks_no_more_graphs_with_attention_adapted_too(device):
    base, ids = tiny_model().to(device), ids_on(device)
    attention = get_peft_model(
        copy.deepcopy(base), LoraConfig(r=R, target_modules=["q_proj", "o_proj"])
    )
    without, _ = count_breaks(attention, ids)
    backend = "triton" if device == "cuda" else "torch"
    model = moe_lora(base, backend=backend, target_modules=["experts", "q_proj", "o_proj"])
    breaks, reasons = count_breaks(model, ids)
    assert breaks <= without, reasons
    with model.disable_adapter():
        breaks, reasons = count_breaks(model, ids)
    assert breaks <= without, reasons


# gpt_oss takes the same compiled path as qwen3_moe
@pytest.mark.parametrize(
    "family",
    ["qwen3_moe", pytest.param("gpt_oss", marks=pytest.mark.long), *UNFUSED_FAMILIES],
)
def test_a_compiled_model_is_the_eager_one(device, family):
    """Outputs, gradients, and switches after compiling: adapter off, on again, another adapter."""
    torch._dynamo.reset()
    model, ids = adapted(device, family), ids_on(device)

    def run(call):
        model.zero_grad()
        out = call(input_ids=ids, use_cache=False)
        out = out.logits if hasattr(out, "logits") else out.last_hidden_state
        out.square().mean().backward()
        return out.detach(), gradients(model)

    compiled = torch.compile(model, backend="inductor" if device == "cuda" else "aot_eager")
    expected, expected_grads = run(model)
    out, grads = run(compiled)
    assert_close(out, expected)
    assert_gradients(grads, expected_grads, 5 * FP32)

    def forward(call):
        with torch.no_grad():
            out = call(input_ids=ids, use_cache=False)
        return out.logits if hasattr(out, "logits") else out.last_hidden_state

    with model.disable_adapter():
        plain = forward(model)
        assert_close(forward(compiled), plain)
    assert_share_of_order_one(expected, plain)
    assert_close(forward(compiled), expected)
    model.add_adapter("other", model.peft_config["default"])
    fill_adapter(model, "other", seed=11)
    model.set_adapter("other")
    other = forward(model)
    assert_share_of_order_one(other, expected, low=0.1)
    assert_close(forward(compiled), other)


# ---- generation and padding ----------------------------------------------------------------------

GREEDY = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@families
def test_generation_is_the_merged_models_with_and_without_cache(device, family):
    model, ids = (
        adapted(device, family, target_modules=["experts", "o_proj"]),
        ids_on(device, length=6),
    )
    merged = copy.deepcopy(model).merge_and_unload()
    with model.disable_adapter():
        plain = model.generate(input_ids=ids, use_cache=False, **GREEDY)
    expected = merged.generate(input_ids=ids, use_cache=False, **GREEDY)
    assert not torch.equal(expected, plain), "the adapter has no say in what is generated"
    for settings in ({"use_cache": False}, {"use_cache": True}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(input_ids=ids, **settings, **GREEDY), expected), settings


def left_padded(device):
    """Three sequences of 4, 7 and 11 tokens, one by one and as a left-padded batch with a mask."""
    rows = [ids_on(device, batch=1, length=n, seed=n) for n in (4, 7, 11)]
    ids = torch.cat([torch.nn.functional.pad(row, (11 - row.shape[1], 0)) for row in rows])
    mask = torch.cat(
        [torch.nn.functional.pad(torch.ones_like(row), (11 - row.shape[1], 0)) for row in rows]
    )
    return rows, ids, mask


@families
def test_left_padding_changes_no_logit_and_no_gradient(device, family):
    model = adapted(device, family).train()
    rows, ids, mask = left_padded(device)
    twin = DenseTwin(model)
    # no position predicts a sequence's first token, and the padding before it does not either
    labels = ids.masked_fill(mask * mask.roll(1, 1) == 0, -100)
    padded = logits(model, ids, attention_mask=mask)
    for i, row in enumerate(rows):
        assert_close(padded[i, -row.shape[1] :], logits(twin, row)[0])
    language_loss(model, ids, attention_mask=mask, labels=labels).backward()
    # a mean over the predicted tokens: n - 1 of each sequence
    tokens = [row.shape[1] - 1 for row in rows]
    right = sum(n * language_loss(twin, row) for n, row in zip(tokens, rows, strict=True)) / sum(
        tokens
    )
    assert_gradients(gradients(model), twin.gradients(right), 5 * FP32)


@families
@pytest.mark.parametrize("use_cache", [False, True])
def test_left_padded_prompts_generate_what_each_generates_alone(device, family, use_cache):
    model = adapted(device, family)
    rows, ids, mask = left_padded(device)
    together = model.generate(input_ids=ids, attention_mask=mask, use_cache=use_cache, **GREEDY)
    merged = model.merge_and_unload()
    for i, row in enumerate(rows):
        assert torch.equal(
            together[i, 11:], merged.generate(input_ids=row, **GREEDY)[0, row.shape[1] :]
        )


# ---- accelerate ----------------------------------------------------------------------------------


def assert_runs_and_trains_as(twin, model, ids):
    assert_close(logits(model, ids), logits(twin, ids))
    for _ in range(2):
        model.zero_grad()
        language_loss(model, ids).backward()
        found = {name: grad.to(ids.device) for name, grad in gradients(model).items()}
        assert_gradients(found, twin.gradients(language_loss(twin, ids)), 5 * FP32)


def offloaded(model):
    """How many experts modules have their weights elsewhere."""
    experts = [m for name, m in model.named_modules() if name.endswith(".experts.base_layer")]
    experts = experts or [model.get_submodule(path) for path in experts_paths(model)]
    return sum(all(p.is_meta for p in module.parameters()) for module in experts)


@families
@pytest.mark.parametrize("checkpointing", [False, True])
def test_experts_offloaded_to_the_cpu_train(device, family, checkpointing):
    twin, ids = DenseTwin(adapted(device, family)), ids_on(device)
    base = tiny_model(family)
    for path in experts_paths(base):
        cpu_offload(base.get_submodule(path), execution_device=torch.device(device))
    assert offloaded(base) == len(experts_paths(tiny_model(family)))
    model = moe_lora(base, backend="triton" if device == "cuda" else "torch")
    # the adapter lies where its experts run
    assert {p.device.type for p in adapter_parameters(model).values()} == {device}
    for parameter in base.parameters():
        parameter.data = parameter.data if parameter.is_meta else parameter.data.to(device)
    for module in base.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    assert_runs_and_trains_as(twin, model, ids)
    assert offloaded(model) == len(experts_paths(tiny_model(family)))


def test_an_adapter_lies_where_its_offloaded_experts_run():
    """It does not lie where their weights are stored; a third device shows this."""
    base = tiny_model()
    cpu_offload(base, execution_device=torch.device("meta"))
    assert all(p.is_meta for p in adapter_parameters(moe_lora(base, randomize=False)).values())
    base = tiny_model()
    cpu_offload(base, execution_device=torch.device("cpu"))
    assert not any(p.is_meta for p in adapter_parameters(moe_lora(base, randomize=False)).values())


@families
def test_a_whole_model_offloaded_after_wrapping_runs(device, family):
    model, ids = adapted(device, family), ids_on(device)
    twin = DenseTwin(model)
    model.to("cpu")
    cpu_offload(model, execution_device=torch.device(device))
    assert offloaded(model) == len(experts_paths(tiny_model(family)))
    with torch.no_grad():
        assert_close(logits(model, ids), logits(twin, ids))
        with model.disable_adapter():
            assert_close(logits(model, ids), logits(twin.plain, ids))


def spread(model, places):
    """A device map: the second layer goes to places[1], everything else to places[0]."""
    top = {
        f"model.{name}": places[0] for name, _ in model.model.named_children() if name != "layers"
    }
    layers = {f"model.layers.{i}": places[min(i, 1)] for i in range(len(model.model.layers))}
    return {**top, **layers, "lm_head": places[0]}


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_a_model_spread_by_a_device_map_runs_and_trains(device, family, place, tmp_path):
    if (device, place) == ("cpu", "cpu"):
        place = "disk"
    twin, ids = DenseTwin(adapted(device, family)), ids_on(device)
    base = tiny_model(family)
    here = 0 if device == "cuda" else "cpu"
    base = dispatch_model(base, spread(base, [here, place]), offload_dir=tmp_path, force_hooks=True)
    assert offloaded(base) == 1
    model = moe_lora(base, backend="triton" if device == "cuda" else "torch")
    assert_runs_and_trains_as(twin, model, ids)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="spreads a model over two CUDA devices")
@families
def test_a_model_spread_over_two_devices_runs_and_trains(family):
    twin, ids = DenseTwin(adapted("cuda", family)), ids_on("cuda")
    base = tiny_model(family)
    base = dispatch_model(base, spread(base, [0, 1]))
    model = moe_lora(base, backend="triton")
    assert {p.device.index for p in adapter_parameters(model).values()} == {0, 1}
    assert_runs_and_trains_as(twin, model, ids)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_checkpoint_loaded_with_a_device_map_runs_and_trains(device, family, tmp_path):
    """`from_pretrained(device_map=...)` with a layer on disk, as large models are loaded."""
    base = tiny_model(family)
    base.save_pretrained(tmp_path / "model")
    twin, ids = DenseTwin(adapted(device, family)), ids_on(device)
    here = 0 if device == "cuda" else "cpu"
    loaded = type(base).from_pretrained(
        tmp_path / "model",
        device_map=spread(base, [here, "disk"]),
        offload_folder=tmp_path / "disk",
    )
    assert offloaded(loaded) == 1
    model = moe_lora(loaded, backend="triton" if device == "cuda" else "torch")
    assert_runs_and_trains_as(twin, model, ids)

"""Training: dropout, checkpointing, accumulation, the Trainer; gradients by finite differences."""

import copy
import functools

import pytest
import torch
from peft import PeftModel
from torch.utils.checkpoint import checkpoint
from transformers import Trainer

from helpers import (
    FUSED_KINDS,
    NEMOTRON_H,
    QWEN3_MOE,
    SAME,
    VOCAB,
    E,
    H,
    R,
    adapter_parameters,
    assert_close,
    assert_share_of_order_one,
    build_experts,
    experts_adapter,
    fill_adapter,
    in_double,
    moe_lora,
    outputs,
    random_rows,
    tiny_model,
    token_ids,
    training_arguments,
    wrap,
)
from peft_moe_lora import MoELoraConfig


def qwen_experts():
    return build_experts(*QWEN3_MOE)


def adapter_grads(model):
    return {name: parameter.grad.clone() for name, parameter in adapter_parameters(model).items()}


# ---- gradients against finite differences --------------------------------------------------------


@pytest.mark.parametrize(("family", "name"), FUSED_KINDS)
@pytest.mark.parametrize("recompute", [False, True])
def test_gradcheck_of_the_whole_layer(family, name, recompute):
    experts = build_experts(family, name, hidden=6, intermediate=5, num_experts=3)
    # finite differences across a clamp's corner do not give the gradient
    experts.limit = 50.0
    model = wrap(experts, r=2, lora_alpha=4, recompute=recompute).double()
    x, index, weights = random_rows(T=4, hidden=6, num_experts=3, dtype=torch.float64)
    inputs = [x.requires_grad_(), weights.requires_grad_(), *adapter_parameters(model).values()]
    assert len(inputs) == 6
    torch.autograd.gradcheck(lambda *_: model(x, index, weights), inputs, atol=1e-6)


# ---- dropout -------------------------------------------------------------------------------------


def test_dropout_is_off_in_eval_mode():
    plain, rows = qwen_experts(), random_rows()
    without, dropping = wrap(copy.deepcopy(plain)), wrap(copy.deepcopy(plain), lora_dropout=0.5)
    assert torch.equal(dropping.eval()(*rows), without.eval()(*rows))
    assert_share_of_order_one(dropping(*rows), plain(*rows))
    assert not torch.equal(dropping.train()(*rows), without.train()(*rows))


def test_dropout_modules_switched_alone_decide_as_in_peft():
    """Some code freezes every `nn.Dropout`, and some leaves them alone in training."""
    model, rows = wrap(qwen_experts(), lora_dropout=0.5), random_rows()
    right = model.eval()(*rows)

    def switch(mode):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.train(mode)

    model.train()
    switch(False)
    assert torch.equal(model(*rows), right)
    model.eval()
    switch(True)
    assert not torch.equal(model(*rows), model(*rows)), "dropout draws anew"


def test_an_adapter_that_joins_an_evaluated_layer_drops_nothing():
    model, rows = wrap(qwen_experts()).eval(), random_rows()
    model.add_adapter("second", MoELoraConfig(r=R, lora_dropout=0.5, target_modules=["experts"]))
    fill_adapter(model, "second")
    model.set_adapter("second")
    assert torch.equal(model(*rows), model(*rows))


def test_dropout_follows_the_seed():
    model, rows = wrap(qwen_experts(), lora_dropout=0.5).train(), random_rows()

    def run(seed):
        torch.manual_seed(seed)
        return model(*rows)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_dropout_of_a_new_adapter_changes_nothing(probability):
    plain, rows = qwen_experts(), random_rows()
    model = wrap(copy.deepcopy(plain), randomize=False, lora_dropout=probability).train()
    assert_close(model(*rows), plain(*rows), 1e-6)


def shows_its_draws(probability):
    """A model that shows its dropout: for inputs of ones the output is 0 or 1 / (1 - p).

    Its first projection is linear, ungated and zero, with A and B the identity; the second
    projection is the identity. So the layer returns what enters A.
    """
    experts = build_experts(*NEMOTRON_H, hidden=H, intermediate=H)
    experts.act_fn = torch.nn.Identity()
    with torch.no_grad():
        experts.up_proj.zero_()
        experts.down_proj.copy_(torch.eye(H).expand_as(experts.down_proj))
    model = wrap(
        experts, lora_dropout=probability, r=H, lora_alpha=H, target_projections=["gate_up"]
    ).train()
    with torch.no_grad():
        lora_A, lora_B = experts_adapter(model)["gate_up"]
        lora_A.copy_(torch.eye(H).repeat(E, 1))
        lora_B.copy_(torch.eye(H).repeat(1, E))
    return model


@pytest.mark.parametrize("probability", [0.25, 0.5])
def test_dropout_drops_each_value_of_each_row_on_its_own(probability):
    T = 400
    left = shows_its_draws(probability)(
        torch.ones(T, H), torch.arange(T)[:, None] % E, torch.ones(T, 1)
    ).detach()
    dropped = left.abs() < 1e-6
    # kept values are scaled up, so that the expectation stays the same
    assert_close(left[~dropped], torch.full_like(left[~dropped], 1 / (1 - probability)), 1e-6)
    # three standard deviations of 12,800 draws are 1.3 %
    assert dropped.float().mean().item() == pytest.approx(probability, abs=0.015)
    # dropout drops neither whole rows nor whole columns
    assert not dropped.all(dim=1).any()
    assert not dropped.all(dim=0).any()
    assert dropped.float().mean(dim=0).std() < 0.1
    # a row's draw differs from the next row's, and from that of the next row of its expert
    for shift in (1, E):
        agree = (dropped[shift:] == dropped[:-shift]).float().mean().item()
        assert agree == pytest.approx(probability**2 + (1 - probability) ** 2, abs=0.03)


def test_rows_of_one_token_are_dropped_apart():
    """Dropout draws per row, not per token: a token's slots go to different experts."""
    # the second slot counts ten times, so that the sum shows both draws
    index, weights = (
        torch.tensor([[0, 3]]).repeat(200, 1),
        torch.tensor([[1.0, 10.0]]).repeat(200, 1),
    )
    out = shows_its_draws(0.5)(torch.ones(200, H), index, weights)
    second = (out > 19).float()
    first = (out - 20 * second > 1).float()
    assert (first == second).float().mean().item() == pytest.approx(0.5, abs=0.03)


def test_two_steps_draw_twice():
    model = shows_its_draws(0.5)
    rows = torch.ones(200, H), torch.zeros(200, 1, dtype=torch.long), torch.ones(200, 1)
    assert ((model(*rows) == 0) == (model(*rows) == 0)).float().mean().item() == pytest.approx(
        0.5, abs=0.03
    )


def test_mean_over_seeds_is_the_output_without_dropout():
    """Only for `down`, where everything after A is linear."""
    plain, rows = qwen_experts(), random_rows(T=6)
    model = wrap(copy.deepcopy(plain), lora_dropout=0.3, target_projections=["down"])
    expected = model.eval()(*rows)
    assert_share_of_order_one(expected, plain(*rows), low=0.2)
    model.train()
    with torch.no_grad():
        mean = torch.stack([model(*rows) for _ in range(600)]).double().mean(dim=0)
    # one draw is off by about half the adapter's share; 600 of them by a 24th of that
    assert ((mean - expected).norm() / expected.norm()).item() < 0.04
    assert ((model(*rows) - expected).norm() / expected.norm()).item() > 0.1


def test_dropout_gradients_are_those_of_the_drawn_mask():
    """Backward drops what forward dropped: finite differences with one seed."""
    experts = build_experts(*QWEN3_MOE, hidden=6, intermediate=5, num_experts=3)
    model = wrap(experts, r=2, lora_alpha=4, lora_dropout=0.4).double().train()
    x, index, weights = random_rows(T=4, hidden=6, num_experts=3, dtype=torch.float64)
    inputs = [x.requires_grad_(), weights.requires_grad_(), *adapter_parameters(model).values()]

    def run(*_):
        torch.manual_seed(5)
        return model(x, index, weights)

    torch.autograd.gradcheck(run, inputs, atol=1e-6)


# ---- recomputation -------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_dropout_is_the_same_in_a_recomputed_layer(use_reentrant, recompute):
    x, index, weights = random_rows()
    model = wrap(qwen_experts(), lora_dropout=0.5, recompute=recompute).train()
    results = []
    for run in (model, functools.partial(checkpoint, model, use_reentrant=use_reentrant)):
        model.zero_grad()
        torch.manual_seed(8)
        rows = (x.clone().requires_grad_(), index, weights.clone().requires_grad_())
        out = run(*rows)
        out.square().sum().backward()
        results.append([out, rows[0].grad, rows[2].grad, *adapter_grads(model).values()])
    for actual, expected in zip(*results, strict=True):
        assert expected.abs().max() > 0
        assert torch.equal(actual, expected)


# ---- loops ---------------------------------------------------------------------------------------


def language_loss(model, ids):
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def test_backward_twice_through_a_kept_graph():
    model = moe_lora(tiny_model()).train()
    loss = language_loss(model, token_ids())
    loss.backward(retain_graph=True)
    once = adapter_grads(model)
    loss.backward()
    for name, grad in adapter_grads(model).items():
        assert_close(grad, 2 * once[name], 1e-6, name)


def test_a_router_in_training_gets_its_gradient():
    """`modules_to_save=["gate"]` trains the router too: its gradient runs through top_k_weights."""
    base = tiny_model()
    model = moe_lora(copy.deepcopy(base)).train()
    router = model.base_model.model.model.layers[1].mlp.gate.weight.requires_grad_()
    language_loss(model, token_ids()).backward()
    merged = model.merge_and_unload()
    right = merged.model.layers[1].mlp.gate.weight
    actual, right.grad = router.grad.clone(), None
    merged.requires_grad_()
    language_loss(merged, token_ids()).backward()
    assert right.grad.abs().max() > 0
    assert_close(actual, right.grad, 1e-5)


def test_every_step_lowers_the_loss_of_one_batch():
    model = moe_lora(tiny_model(), randomize=False).train()
    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = language_loss(model, token_ids())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]


class Rhyme(torch.utils.data.Dataset):
    """Sequences that repeat one pattern: a loss that must fall fast."""

    def __len__(self):
        return 64

    def __getitem__(self, i):
        ids = (torch.arange(12) * 7 + i % 4) % (VOCAB - 3) + 3
        return {"input_ids": ids, "labels": ids}


def arguments(directory, **changes):
    settings = {
        "per_device_train_batch_size": 8,
        "max_steps": 24,
        "learning_rate": 1e-2,
        "logging_steps": 4,
    }
    return training_arguments(directory, **settings | changes)


@pytest.mark.parametrize(
    ("why", "changes"),
    [
        ("the plain run", {}),
        (
            "checkpointing",
            {
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": False},
            },
        ),
        ("accumulation", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}),
        ("mixed precision", {"bf16": True}),
    ],
)
def test_the_trainer_lowers_the_loss(why, changes, tmp_path):
    base = tiny_model()
    frozen = copy.deepcopy(base.state_dict())
    model = moe_lora(
        base, randomize=False, lora_dropout=0.05, target_modules=["experts", "q_proj", "v_proj"]
    )
    trainer = Trainer(model=model, args=arguments(tmp_path, **changes), train_dataset=Rhyme())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.6 * losses[0], losses
    trained = adapter_parameters(model)
    assert all((p != 0).any() for n, p in trained.items() if ".lora_B." in n)
    # training changed the adapter and nothing else
    unloaded = model.unload().state_dict()
    assert all(torch.equal(unloaded[name], tensor) for name, tensor in frozen.items())


def test_the_trainer_saves_and_resumes_the_adapter(tmp_path):
    def fresh():
        torch.manual_seed(1)
        return moe_lora(tiny_model(), randomize=False)

    settings = {"save_strategy": "steps", "save_steps": 6, "max_steps": 12}
    straight = Trainer(model=fresh(), args=arguments(tmp_path, **settings), train_dataset=Rhyme())
    straight.train()
    names = {p.name for p in (tmp_path / "checkpoint-6").iterdir()}
    assert "adapter_model.safetensors" in names
    assert not any(
        name.endswith(".safetensors") and name != "adapter_model.safetensors" for name in names
    )
    resumed = Trainer(model=fresh(), args=arguments(tmp_path, **settings), train_dataset=Rhyme())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    for name, parameter in adapter_parameters(resumed.model).items():
        right = dict(straight.model.named_parameters())[name]
        assert right.abs().max() > 0
        assert_close(parameter, right, 1e-5, name)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "checkpoint-12")
    assert_close(outputs(loaded), outputs(straight.model.eval()), SAME)


def test_a_clipped_norm_counts_the_adapter():
    model = moe_lora(tiny_model()).train()
    language_loss(model, token_ids()).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert norm > 1e-3
    total = torch.stack([g.norm() for g in adapter_grads(model).values()]).norm()
    assert total.item() == pytest.approx(1e-3, rel=1e-3)


def test_inference_mode_and_no_grad_work():
    model, rows = wrap(qwen_experts()), random_rows()
    expected = model(*rows).detach()
    with torch.inference_mode():
        assert torch.equal(model(*rows), expected)
    with torch.no_grad():
        out = model(*rows)
        assert torch.equal(out, expected)
        assert not out.requires_grad
    # and training goes on after both
    model(*rows).sum().backward()
    assert all(grad.abs().max() > 0 for grad in adapter_grads(model).values())


def test_only_the_wanted_gradients_are_given():
    """A frozen adapter in a trained model: the input still gets its gradient, A and B none."""
    plain = qwen_experts()
    model = wrap(copy.deepcopy(plain))
    x, index, weights = random_rows()
    right = torch.autograd.grad(model(x.requires_grad_(), index, weights).square().sum(), x)[0]
    for parameter in adapter_parameters(model).values():
        parameter.requires_grad_(False)
    (dx,) = torch.autograd.grad(model(x, index, weights).square().sum(), x)
    assert torch.equal(dx, right)
    assert right.abs().max() > 0


def test_no_gradient_is_asked_of_the_input_of_the_first_layer():
    """Embeddings are frozen: the input needs no gradient, A and B still get theirs."""
    model, rows = wrap(qwen_experts()), random_rows()
    model(*rows).square().sum().backward()
    without = adapter_grads(model)
    model.zero_grad()
    model(rows[0].clone().requires_grad_(), *rows[1:]).square().sum().backward()
    for name, grad in adapter_grads(model).items():
        assert grad.abs().max() > 0
        assert_close(without[name], grad, 1e-6, name)


def test_float64_tiny_module_agrees_with_fp32_to_rounding():
    plain = qwen_experts()
    low = wrap(copy.deepcopy(plain))
    high = wrap(in_double(plain))
    high = high.double()
    fill_adapter(high)
    with torch.no_grad():
        for name, parameter in adapter_parameters(high).items():
            parameter.copy_(dict(low.named_parameters())[name])
    rows = random_rows()
    assert_close(low(*rows), high(rows[0].double(), rows[1], rows[2].double()))
    assert experts_adapter(high)["down"][0].shape[0] == R * E

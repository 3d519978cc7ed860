"""Rows per expert are what counting by hand gives.

Padding, evaluation and recomputation are left out, and nothing is counted twice.
"""

import copy
import sys
import warnings

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer

from helpers import (
    TOP_K,
    E,
    Holder,
    adapter_parameters,
    build_experts,
    causal_families,
    experts_paths,
    moe_lora,
    outputs,
    random_rows,
    tiny_model,
    token_ids,
    training_arguments,
    wrap,
)
from peft_moe_lora import (
    ExpertLoad,
    ExpertLoadCallback,
    MoELoraConfig,
    expert_load,
    plot_expert_load,
    select_experts,
)
from peft_moe_lora.stats.select import _fewest
from peft_moe_lora.stats.watch import RoutingWatch

BATCH, LENGTH = 3, 7


def padded(side="left"):
    """Three samples of 7, 4 and 2 tokens."""
    mask = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    for line, length in zip(mask, (7, 4, 2), strict=True):
        line[LENGTH - length :] = 1
    mask = mask if side == "left" else mask.flip(1)
    return {"input_ids": token_ids(BATCH, LENGTH), "attention_mask": mask}


def routed(model, batch):
    """Path -> (top_k_index, top_k_weights) [batch, length, top_k] of the plain model's experts."""
    found, handles = {}, []
    for path in experts_paths(model):

        def keep(module, args, path=path):
            found[path] = [t.detach().unflatten(0, batch["input_ids"].shape) for t in args[1:3]]

        handles.append(model.get_submodule(path).register_forward_pre_hook(keep))
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return found


def counted(index, mask, num_experts=E):
    """[E] rows per expert, counted one by one."""
    counts = [0] * num_experts
    for sample, line in zip(index.tolist(), mask.tolist(), strict=True):
        for experts, kept in zip(sample, line, strict=True):
            for e in experts if kept else ():
                counts[e] += 1
    return counts


# ---- loads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", causal_families())
def test_load_is_what_counting_by_hand_gives(family, side):
    base, batch = tiny_model(family), padded(side)
    by_hand = {
        path: counted(index, batch["attention_mask"], base.get_submodule(path).down_proj.shape[0])
        for path, (index, _) in routed(base, batch).items()
    }
    assert {path: c.tolist() for path, c in expert_load(base, [batch]).counts.items()} == by_hand
    # B is zero, so the adapter changes no routing
    model = moe_lora(base, randomize=False)
    load = expert_load(model, [batch, batch])
    assert {path: c.tolist() for path, c in load.counts.items()} == {
        p: [2 * n for n in c] for p, c in by_hand.items()
    }


def test_without_a_mask_every_token_counts():
    base, ids = tiny_model(), token_ids()
    load = expert_load(base, (ids for _ in range(2)))
    index = {path: i for path, (i, _) in routed(base, {"input_ids": ids}).items()}
    for path, counts in load.counts.items():
        assert counts.dtype == torch.int64
        assert counts.tolist() == [2 * n for n in counted(index[path], torch.ones_like(ids))]


def test_a_model_is_left_as_it_was():
    model = moe_lora(tiny_model(), lora_dropout=0.5).train()
    model.get_submodule("base_model.model.model.norm").eval()
    modes = {name: m.training for name, m in model.named_modules()}
    before = outputs(copy.deepcopy(model).eval())
    first, second = (expert_load(model, [padded()]) for _ in range(2))
    assert all(torch.equal(first.counts[p], second.counts[p]) for p in first.counts), (
        "dropout was on"
    )
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert torch.equal(outputs(model.eval()), before)


def test_ids_out_of_range_are_nobodys():
    model = wrap(build_experts("qwen3_moe", "Qwen3MoeExperts"))
    x, _, weights = random_rows(T=3)
    with RoutingWatch(model) as watch:
        model(x, torch.tensor([[0, E], [E + 3, 2], [-1, 2]]), weights)
        assert watch.take()["experts"].tolist() == [1, 0, 2, 0, 0]


def test_numbers_of_a_load():
    load = ExpertLoad(
        {"layers.0": torch.tensor([6, 2, 0, 0]), "layers.1": torch.tensor([1, 1, 1, 1])}
    )
    assert load.max_violation == {"layers.0": 2.0, "layers.1": 0.0}
    assert load.dead == {"layers.0": [2, 3], "layers.1": []}
    assert load.metrics() == {"max_violation": 1.0, "largest_max_violation": 2.0, "dead_experts": 2}
    assert "layers.0: 8 rows, max violation 2.00, 2 of 4 experts dead" in str(load)
    twice = load + ExpertLoad(
        {"layers.1": torch.tensor([0, 0, 0, 4]), "layers.2": torch.tensor([0])}
    )
    assert twice.counts["layers.1"].tolist() == [1, 1, 1, 5]
    assert twice.counts["layers.0"].tolist() == [6, 2, 0, 0]
    assert ExpertLoad({"layers.0": torch.zeros(2)}).metrics() == {}


def test_what_cannot_be_counted_is_an_error():
    model = tiny_model()
    with pytest.raises(ValueError, match="DbrxExperts has neither num_experts nor down_proj"):
        expert_load(Holder(type("DbrxExperts", (torch.nn.Linear,), {})(2, 2)), [])
    with pytest.raises(ValueError, match="holds no experts"):
        expert_load(torch.nn.Linear(2, 2), [])
    with pytest.raises(ValueError, match="there was no batch"):
        expert_load(model, [])
    with pytest.raises(ValueError, match="all of it is padding"):
        expert_load(
            model, [padded() | {"attention_mask": torch.zeros(BATCH, LENGTH, dtype=torch.long)}]
        )
    with pytest.raises(ValueError, match="2-D attention_mask"):
        expert_load(
            model,
            [padded() | {"attention_mask": torch.ones(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool)}],
        )
    assert not any(m._forward_pre_hooks for m in model.modules())
    holder = Holder(build_experts("qwen3_moe", "Qwen3MoeExperts"))
    with (
        RoutingWatch(holder),
        pytest.raises(ValueError, match=r"Qwen3MoeExperts is not called as experts\("),
    ):
        holder(torch.randn(2, 32), torch.randn(2, 2), torch.randn(2, 2))


class ExpertsAlone(torch.nn.Module):
    """A model that has nothing to say about its mask."""

    def __init__(self):
        super().__init__()
        self.experts = build_experts("qwen3_moe", "Qwen3MoeExperts")

    def forward(self, hidden_states, attention_mask):
        return self.experts(*random_rows(T=hidden_states.shape[0] * hidden_states.shape[1]))


@pytest.mark.parametrize("shape", [(BATCH, LENGTH - 1), (2, LENGTH)], ids=["shorter", "fewer"])
def test_a_mask_of_other_tokens_is_an_error(shape):
    model, mask = ExpertsAlone(), torch.ones(shape, dtype=torch.long)
    with RoutingWatch(model), pytest.raises(ValueError, match=r"got 21 tokens, but attention_mask"):
        model(torch.randn(BATCH, LENGTH, 32), attention_mask=mask)


# ---- while training ------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_recomputation_counts_once(use_reentrant):
    model, batch = moe_lora(tiny_model(), randomize=False), padded()
    right = expert_load(model, [batch])
    model.train()
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
    with RoutingWatch(model) as watch:
        for _ in range(3):
            model(**batch).logits.square().sum().backward()
        counts = watch.take()
        assert {p: c.tolist() for p, c in counts.items()} == {
            p: (3 * c).tolist() for p, c in right.counts.items()
        }
        assert not any(c.any() for c in watch.take().values()), "taking starts anew"
        doubled = []
        model(**batch)
        watch.take(lambda sums: doubled.append(sums.mul_(2)))
    assert doubled[0].tolist() == [n for c in right.counts.values() for n in (2 * c).tolist()]
    assert all(p.grad is not None for p in adapter_parameters(model).values())


def test_beside_a_cache_the_running_tokens_count():
    model, batch = tiny_model(), padded()
    with RoutingWatch(model) as watch, torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        watch.take()
        mask = torch.cat([batch["attention_mask"], torch.tensor([[1], [1], [0]])], 1)
        model(input_ids=token_ids(BATCH, 1), attention_mask=mask, past_key_values=cache)
        assert all(c.sum() == 2 * TOP_K for c in watch.take().values())


def test_a_compiled_model_counts_the_same():
    model, batch = moe_lora(tiny_model(), randomize=False), padded()
    right = expert_load(model, [batch])
    with RoutingWatch(model) as watch, torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        for _ in range(2):
            compiled(**batch)
        counts = watch.take()
    assert {p: c.tolist() for p, c in counts.items()} == {
        p: (2 * c).tolist() for p, c in right.counts.items()
    }


class Samples(torch.utils.data.Dataset):
    """Sixteen samples of 5 to 8 tokens and padding."""

    def __len__(self):
        return 16

    def __getitem__(self, i):
        ids, length = token_ids(1, 8, seed=i)[0], 5 + i % 4
        mask = (torch.arange(8) < length).long()
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": ids.masked_fill(mask == 0, -100),
        }


def arguments(folder, **changes):
    settings = {"per_device_train_batch_size": 2, "max_steps": 5, "logging_steps": 2}
    return training_arguments(folder, **settings | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "gradient_accumulation_steps": 2,
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
            "eval_strategy": "steps",
            "eval_steps": 1,
        },
    ],
    ids=["plain", "accumulation, checkpointing, evaluation"],
)
def test_the_trainer_logs_loads(changes, tmp_path, capsys):
    model = moe_lora(tiny_model(), randomize=False)
    trainer = Trainer(
        model, arguments(tmp_path, **changes), train_dataset=Samples(), eval_dataset=Samples()
    )
    seen = []
    trainer.get_batch_samples = _recording(trainer.get_batch_samples, seen)
    callback = ExpertLoadCallback(trainer, per_layer=True)
    trainer.add_callback(callback)
    trainer.train()
    capsys.readouterr()

    rows = sum(int(batch["attention_mask"].sum()) for batch in seen) * TOP_K
    assert rows > 0
    assert [int(c.sum()) for c in callback.total.counts.values()] == [rows, rows]
    logged = [entry for entry in trainer.state.log_history if "expert_load/max_violation" in entry]
    assert [entry["step"] for entry in logged] == [2, 4]
    for entry in logged:
        layers = [entry[f"expert_load/max_violation/{path}"] for path in callback.total.counts]
        assert entry["expert_load/max_violation"] == pytest.approx(sum(layers) / 2)
        assert entry["expert_load/largest_max_violation"] == max(layers)
        assert entry["expert_load/dead_experts"] >= 0
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [2, 4]
    assert int(callback.last.counts[next(iter(callback.last.counts))].sum()) < rows
    assert not any(
        m._forward_pre_hooks for name, m in model.named_modules() if name.endswith("experts")
    )


def _recording(method, seen):
    def get_batch_samples(*args, **kwargs):
        batches, items = method(*args, **kwargs)
        seen.extend(batches)
        return batches, items

    return get_batch_samples


# ---- choosing ------------------------------------------------------------------------------------


def scores_by_hand(index, weights, mask, score):
    """[E]: the score by its definition, sample by sample and token by token."""
    total = torch.zeros(E, dtype=torch.float64)
    for j in range(len(mask)):
        length = int(mask[j].sum())
        for t in range(mask.shape[1]):
            for k in range(index.shape[2] if mask[j, t] else 0):
                gate = weights[j, t, k].double() if score == "gates" else 1 / index.shape[2]
                total[index[j, t, k]] += gate / length / len(mask)
    return total


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("score", ["tokens", "gates"])
# routing weights that sum to one, and ones that do not
@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe"])
def test_the_fewest_experts_that_reach_the_threshold(family, score, threshold):
    base, batch = tiny_model(family, num_experts=E), padded()
    chosen = select_experts(base, [batch], score=score, threshold=threshold)
    assert list(chosen) == experts_paths(base)
    for path, (index, weights) in routed(base, batch).items():
        scores = scores_by_hand(index, weights, batch["attention_mask"], score)
        shares = (scores / scores.sum()).tolist()
        picked = chosen[path]
        assert picked == sorted(set(picked))
        reached = sum(shares[e] for e in picked)
        assert reached >= threshold - 1e-9
        assert reached - min(shares[e] for e in picked) < threshold - 1e-9, "one expert too many"
        assert min(shares[e] for e in picked) >= max(
            [shares[e] for e in range(E) if e not in picked], default=0
        )


def test_a_sample_counts_as_one_whatever_its_length():
    base, batch = tiny_model(), padded()
    with RoutingWatch(base, "tokens") as watch, torch.no_grad():
        base(**batch)
        weighted = watch.take()
    for path, (index, weights) in routed(base, batch).items():
        right = scores_by_hand(index, weights, batch["attention_mask"], "tokens") * BATCH
        torch.testing.assert_close(weighted[path], right)
        rows = torch.tensor(counted(index, batch["attention_mask"]), dtype=torch.float64)
        assert (weighted[path] / weighted[path].sum() - rows / rows.sum()).abs().max() > 0.01


@pytest.mark.parametrize("given", ["input_ids", "inputs_embeds"])
def test_a_sample_counts_as_one_without_a_mask_too(given):
    base, ids = tiny_model(), token_ids(BATCH, LENGTH)
    arguments = {"input_ids": ids, "inputs_embeds": base.get_input_embeddings()(ids).detach()}
    with RoutingWatch(base, "tokens") as watch, torch.no_grad():
        base(**{given: arguments[given]})
    for sums in watch.take().values():
        assert float(sums.sum()) == pytest.approx(BATCH)


@pytest.mark.parametrize("measure", ["tokens", "gates"])
def test_a_sample_of_padding_alone_adds_nothing(measure):
    base, batch = tiny_model(), padded()
    batch["attention_mask"][1] = 0
    with RoutingWatch(base, measure) as watch, torch.no_grad():
        base(**batch)
        sums = watch.take()
    mask = batch["attention_mask"][[0, 2]]
    for path, (index, weights) in routed(base, batch).items():
        right = scores_by_hand(index[[0, 2]], weights[[0, 2]], mask, measure) * len(mask)
        torch.testing.assert_close(sums[path], right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("count", range(1, 11))
def test_equal_shares_reach_a_threshold_that_is_their_sum(count):
    shares = torch.full((10,), 0.1, dtype=torch.float64)
    assert _fewest(shares, count / 10) == count


@pytest.mark.parametrize("top", [1, 2, E])
def test_the_experts_with_the_highest_scores_are_chosen(top):
    base, batch = tiny_model(), padded()
    chosen = select_experts(base, [batch], top=top)
    for path, (index, weights) in routed(base, batch).items():
        scores = scores_by_hand(index, weights, batch["attention_mask"], "tokens")
        assert len(chosen[path]) == top
        others = [scores[e] for e in range(E) if e not in chosen[path]]
        assert min(scores[e] for e in chosen[path]) >= max(others, default=torch.zeros(())) - 1e-12


def test_a_selection_goes_into_a_configuration():
    base, batch = tiny_model(), padded()
    chosen = select_experts(base, [batch], score="gates", threshold=0.5)
    model = get_peft_model(base, MoELoraConfig(r=2, expert_indices=chosen))
    assert f"{sum(map(len, chosen.values()))} of {2 * E} experts" in model.base_model.summary()
    # the paths are the base model's, with an adapter too
    assert select_experts(model, [batch], score="gates", threshold=0.5) == chosen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either threshold or top"),
        ({"top": 1, "threshold": 0.1}, "either threshold or top"),
        ({"threshold": 0.0}, r"threshold must be in \(0, 1\]"),
        ({"threshold": 1.5}, r"threshold must be in \(0, 1\]"),
        ({"top": 0}, "top must be an integer"),
        ({"top": E + 1}, f"top={E + 1} must be at most"),
        ({"score": "norm", "top": 1}, "score must be one of"),
    ],
    ids=str,
)
def test_selections_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        select_experts(tiny_model(), [token_ids()], **options)


# ---- the picture ---------------------------------------------------------------------------------


def test_heatmap_shows_loads_relative_to_the_mean():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    load = ExpertLoad(
        {"layers.3.mlp": torch.tensor([6, 2, 0, 0]), "layers.5.mlp": torch.tensor([1, 1])}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = plot_expert_load(load)
        figure.canvas.draw()
    axes = figure.axes[0]
    drawn = torch.tensor(axes.images[0].get_array().filled(-1.0))
    assert drawn.tolist() == [[3.0, 1.0, 0.0, 0.0], [1.0, 1.0, -1.0, -1.0]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["3", "5"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("expert", "layer")
    assert plot_expert_load(load, axes) is figure


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"peft-moe-lora\[notebook\]"):
        plot_expert_load(ExpertLoad({"layers.0": torch.tensor([1, 2])}))

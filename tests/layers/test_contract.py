"""Before its first own computation, a layer compares itself with the module that it stands for.

That concerns classes outside transformers' interface: the module's own forward does not run any
more, so what the layer computes has to be what the module would have computed.
"""

import pytest
import torch

from helpers import (
    QWEN3_MOE,
    E,
    HandWrittenExperts,
    assert_close,
    build_experts,
    fill,
    random_rows,
    wrap,
)
from peft_moe_lora.experts.stored import UnsupportedExperts
from peft_moe_lora.layers import layer as layers


class Times(HandWrittenExperts):
    """Experts with a factor that their activation does not have, and that know no sentinels."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = factor
        self.compared = []

    def forward(self, hidden_states, top_k_index, top_k_weights):
        assert top_k_index.min() >= 0
        assert top_k_index.max() < E
        self.compared.append(top_k_index.tolist())
        return self.factor * super().forward(hidden_states, top_k_index, top_k_weights)


def adapted(factor=1.0):
    """The module, and a model in which it has an adapter."""
    module = fill(Times(factor))
    return module, wrap(module)


@pytest.mark.parametrize("factor", [0.5, 0.94, 1.06, 2.0])
def test_a_factor_that_the_layer_does_not_know_is_refused(factor):
    _, model = adapted(factor)
    with pytest.raises(UnsupportedExperts, match=r"Times\.forward does not compute"):
        model(*random_rows())


# bf16 rounds by up to two percent
@pytest.mark.parametrize("factor", [0.97, 1.03])
def test_a_difference_as_small_as_rounding_is_none(factor):
    _, model = adapted(factor)
    assert model(*random_rows()).isfinite().all()


def test_experts_that_give_zeros_agree():
    module, model = adapted()
    torch.nn.init.zeros_(module.down_proj)
    assert model(*random_rows()).any(), "the adapter alone gives the output"
    assert len(module.compared) == 1


def test_tokens_with_an_id_out_of_range_are_not_compared():
    module, model = adapted()
    x, _, weights = random_rows(T=6)
    # the first and the last expert are compared, ids beside them are not
    index = torch.tensor([[-1, 0], [0, E - 1], [E, 1], [1, E], [E - 1, 2], [3, -1]])
    out = model(x, index, weights)
    assert module.compared == [[[0, E - 1], [E - 1, 2]]]
    # the layer computes these tokens nevertheless
    for row in (0, 2, 3, 5):
        known = (index[row] >= 0) & (index[row] < E)
        alone = model(x[row, None], index[row, known][None], weights[row, known][None])
        assert_close(out[row, None], alone)


def test_without_a_token_to_compare_the_next_call_is_compared():
    module, model = adapted(2.0)
    x, index, weights = random_rows(T=3)
    assert not model(x, torch.full_like(index, E), weights).any()
    assert not module.compared
    with pytest.raises(UnsupportedExperts, match=r"Times\.forward"):
        model(x, index, weights)


def test_what_agreed_once_is_not_compared_again():
    module, model = adapted()
    for _ in range(3):
        model(*random_rows())
    assert len(module.compared) == 1
    # the first few tokens are enough
    assert len(module.compared[0]) < len(random_rows()[0])


def test_an_implementation_that_trained_once_is_not_checked_again(monkeypatch):
    checks = {"check_implementation": 0, "check_gradients": 0}

    def counting(name):
        check = getattr(layers, name)

        def counted(*args, **kwargs):
            checks[name] += 1
            return check(*args, **kwargs)

        return counted

    model, rows = wrap(build_experts(*QWEN3_MOE), backend="materialize"), random_rows()
    for name in checks:
        monkeypatch.setattr(layers, name, counting(name))
    with torch.no_grad():
        model(*rows)
    # without gradients there is nothing to see
    assert checks == {"check_implementation": 1, "check_gradients": 0}
    for _ in range(3):
        model(*rows).sum().backward()
        assert checks == {"check_implementation": 2, "check_gradients": 1}

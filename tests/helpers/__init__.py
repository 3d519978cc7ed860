"""What tests share: tiny modules and models, adapters on them, and the numbers they have to give.

sizes < comparing, classes < families, models, adapters < dense. `from helpers import X` works for
every name below. The written-out formulas import nothing from the package.
"""

from helpers.adapters import (
    adapter_parameters,
    expert_major,
    experts_adapter,
    fill_adapter,
    fold_scaling,
    moe_lora,
    rank_major,
    wrap,
)
from helpers.classes import (
    MODELS,
    HandWrittenExperts,
    Holder,
    build_experts,
    build_step3p7,
    experts_class,
    experts_paths,
    fill,
    in_double,
    interface_families,
    is_on_the_interface,
    modeling_module,
    tiny_config,
)
from helpers.comparing import (
    assert_close,
    assert_share_of_order_one,
    assert_unchanged,
    grads_of,
    relative_error,
    snapshot,
)
from helpers.dense import (
    DenseTwin,
    base_bias,
    base_weight,
    default_gate,
    dense_delta,
    dense_deltas,
    oracle,
    random_rows,
)
from helpers.families import (
    FUSED_FAMILIES,
    FUSED_KINDS,
    GPT_OSS,
    NEMOTRON_H,
    QWEN3_MOE,
    ROUTED_FAMILIES,
    STORED_FAMILIES,
    UNFUSED_FAMILIES,
    UNFUSED_KINDS,
    one_of_each_kind,
)
from helpers.models import (
    KNOWS_WRAPPERS,
    causal_families,
    outputs,
    tiny_families,
    tiny_model,
    token_ids,
    train,
    training_arguments,
)
from helpers.sizes import BF16, FP32, SAME, TOP_K, VOCAB, E, H, I, R

"""The lists of model families that tests share, each under a name that says what it lists.

The families with a tiny model are listed in `helpers.models`, those off the experts interface in
`families.off_interface`.
"""

from helpers.classes import interface_families

# (family, class name)
# the plain case: gated, concatenated, [E, 2I, H]
QWEN3_MOE = ("qwen3_moe", "Qwen3MoeExperts")
# interleaved, transposed, biased and clamped
GPT_OSS = ("gpt_oss", "GptOssExperts")
# no gate
NEMOTRON_H = ("nemotron_h", "NemotronHExperts")
# one for each way that experts run in the fused kernels
FUSED_KINDS = [QWEN3_MOE, GPT_OSS, NEMOTRON_H]
FUSED_FAMILIES = [family for family, _ in FUSED_KINDS]

# one for each way that checkpoints on the hub store experts: one tensor per expert, stacked,
# w1 w2 w3, without a gate
STORED_FAMILIES = ["qwen3_moe", "gpt_oss", "mixtral", "nemotron_h"]

# softmax over all experts; softmax over the chosen ones, with a bias; sigmoid in fp32, by groups,
# with a shared expert
ROUTED_FAMILIES = ["qwen3_moe", "gpt_oss", "deepseek_v3"]


def _installed(cases):
    """Those of the cases, (family, class name), that the installed transformers has."""
    return [case for case in cases if case in interface_families()]


# a norm after down_proj, which no kernel has; transformers 5.17 does not have the family
UNFUSED_KINDS = _installed([("muse_spark", "MuseSparkExperts")])
UNFUSED_FAMILIES = [family for family, _ in UNFUSED_KINDS]


def one_of_each_kind():
    """(family, class name), one for each way that experts run, fused or not."""
    return [*FUSED_KINDS, *UNFUSED_KINDS]

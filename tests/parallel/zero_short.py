"""What each process of test_zero.py runs: every situation, in one family."""

from parallel import zero, zero_trainer

STAGES = (2, 3)
SCENARIOS = {
    "qwen3_moe ZeRO-2": zero.trains("qwen3_moe", 2),
    "qwen3_moe ZeRO-3": zero.trains("qwen3_moe", 3),
    "qwen3_moe ZeRO-3, loaded in parts": zero.trains("qwen3_moe", 3, loaded_in_parts=True),
    "checkpointing": zero.trains("qwen3_moe", 3, checkpointing=True),
    "experts alone": zero.trains_experts_alone,
    "loses gradients": zero.loses_gradients,
    "by accelerate": zero.saves_a_state_dict_of_the_first_process,
    "bf16, stage 3": zero.trains_in_bf16(3),
    "Trainer, stage 3, loaded in parts": zero_trainer.lives("qwen3_moe", 3, loaded_in_parts=True),
    **{f"loads, stage {stage}": zero.loads_and_trains_on(stage) for stage in STAGES},
    **{f"resumes, stage {stage}": zero.resumes(stage) for stage in STAGES},
    "merges, stage 2": zero.merges("qwen3_moe", 2),
    # stored as [E, K, N]
    "merges, stage 3": zero.merges("gpt_oss", 3),
    **{f"adapts, stage {stage}": zero.adapts_a_trained_model(stage) for stage in STAGES},
}

"""Which tests are nearest to a module: they notice a break of it, and take seconds.

A module has the tests of its own row, or else those of its folder's row. The tests that notice most
come first, because a run ends at the first test that fails.
"""

from pathlib import Path

# path in the package -> test files or folders, or tests as pytest names them
NEAREST = {
    "convert": (
        "convert/test_formats.py",
        "convert/test_reading.py",
        "convert/test_bad_adapters.py",
    ),
    "convert/base.py": (
        "convert/test_formats.py",
        "convert/test_serving.py",
        "convert/test_bad_adapters.py",
        "convert/test_beside_lora.py",
    ),
    "convert/checkpoint.py": (
        "convert/test_merging.py",
        "convert/test_reading.py",
        "convert/test_beside_lora.py",
        "families/test_off_interface.py",
    ),
    "convert/convert.py": (
        "convert/test_bad_adapters.py",
        "convert/test_formats.py",
        "convert/test_folders.py",
    ),
    "convert/fit.py": ("convert/test_some_experts.py", "convert/test_formats.py"),
    "convert/formats/per_expert.py": (
        "convert/test_reading.py",
        "convert/test_serving.py",
        "convert/test_formats.py",
        "convert/test_some_experts.py",
    ),
    "convert/inspect.py": ("convert/test_formats.py", "convert/test_some_experts.py"),
    "convert/linears.py": (
        "convert/test_names.py",
        "convert/test_beside_lora.py",
        "convert/test_formats.py",
    ),
    "convert/load.py": ("convert/test_merging.py",),
    "convert/merge.py": (
        "convert/test_merging.py",
        "convert/test_beside_lora.py",
        "convert/test_reading.py",
        "convert/test_some_experts.py",
        "convert/test_folders.py",
    ),
    "convert/reading.py": (
        "convert/test_bad_adapters.py",
        "convert/test_reading.py",
        "convert/test_some_experts.py",
        "convert/test_formats.py",
        "files/test_saved_means_trained.py",
        "files/test_interrupted_saves.py",
    ),
    "convert/replacements.py": ("convert/test_beside_lora.py", "convert/test_merging.py"),
    "convert/saved.py": (
        "convert/test_beside_lora.py",
        "convert/test_names.py",
        "convert/test_formats.py",
    ),
    "convert/serving.py": ("convert/test_serving.py", "convert/test_command_line.py"),
    "convert/targets.py": (
        "convert/test_names.py",
        "convert/test_beside_lora.py",
        "convert/test_formats.py",
    ),
    "convert/verify.py": (
        "convert/test_beside_lora.py",
        "convert/test_some_experts.py",
        "convert/test_formats.py",
        "convert/test_bad_adapters.py",
    ),
    "convert/consolidate.py": ("convert/test_consolidating.py",),
    "convert/sharded.py": ("convert/test_consolidating.py",),
    "convert/state_keys.py": ("convert/test_consolidating.py",),
    "experts": ("experts", "families/test_off_interface.py", "layers/test_contract.py"),
    "files": ("files", "tuner/test_bad_input.py", "convert/test_bad_adapters.py"),
    "files/adapter_file.py": (
        "files/test_checked_before_loading.py",
        "files/test_checkpoint.py",
        "files/test_saving_again.py",
        "files/test_saved_means_trained.py",
        "files/test_damaged_json.py",
        "tuner/test_bad_input.py",
    ),
    "files/card.py": (
        "convert/test_command_line.py",
        "convert/test_serving.py",
        "files/test_damaged_json.py",
        "files/test_saving_again.py",
        "files/test_interrupted_saves.py",
        "tuner/test_choosing.py",
    ),
    "files/config_fields.py": (
        "files/test_config_fields.py",
        "files/test_damaged_json.py",
        "tuner/test_bad_input.py",
        "tuner/test_choosing.py",
        "convert/test_bad_adapters.py",
    ),
    "files/expressions.py": ("files/test_expressions.py", "tuner/test_choosing.py"),
    "files/folders.py": ("convert/test_folders.py", "convert/test_interruptions.py"),
    "files/tensor_file.py": (
        "convert/test_bad_adapters.py",
        "files/test_damaged_json.py",
        "files/test_interrupted_saves.py",
        "convert/test_interruptions.py",
        "convert/test_merging.py",
        "convert/test_folders.py",
    ),
    "files/writing.py": ("files/test_interrupted_saves.py", "convert/test_interruptions.py"),
    "functional": (
        "functional",
        "tuner/test_choosing.py",
        "families/test_off_interface.py",
    ),
    "interop": ("interop",),
    "ops": (
        "functional/test_functional.py",
        "functional/test_composed.py",
        "functional/test_dropout.py",
        "tuner/test_choosing.py",
        "families/test_off_interface.py",
    ),
    "ops/grouped.py": (
        "functional/test_grouped_mm.py",
        "functional/test_functional.py",
        "tuner/test_choosing.py",
    ),
    "ops/quantize.py": (
        "quant/test_quantized.py",
        "quant/test_quantized_loading.py",
        "experts/test_quantized_bases.py",
    ),
    "ops/quantized.py": (
        "quant/test_quantized.py",
        "quant/test_quantized_loading.py",
        "experts/test_quantized_bases.py",
    ),
    "ops/reference.py": (
        "functional/test_functional.py",
        "functional/test_composed.py",
        "functional/test_dropout.py",
        "quant/test_quantized.py",
        "functional/test_sentinel_rows.py",
        "tuner/test_choosing.py",
        "families/test_off_interface.py",
    ),
    "quant": ("quant",),
    "stats": ("stats",),
    "config.py": (
        "tuner/test_bad_input.py",
        "tuner/test_choosing.py",
        "tuner/test_peft_api.py",
        "files/test_checkpoint.py",
        "files/test_saved_means_trained.py",
        "files/test_saving_again.py",
        "files/test_damaged_json.py",
        "layers/test_materialize.py::test_options_without_a_meaning_are_refused_by_name",
    ),
    "layers": ("layers", "tuner/test_peft_api.py", "tuner/test_choosing.py"),
    "parallel": ("parallel",),
    "tuner": (
        "tuner/test_peft_api.py",
        "tuner/test_bad_input.py",
        "tuner/test_second_adapter.py",
        "tuner/test_choosing.py",
        "tuner/test_beside_experts.py",
        "files/test_checkpoint.py",
        "files/test_saving_again.py",
    ),
    "tuner/beside.py": ("tuner/test_beside_adapters.py", "tuner/test_bad_input.py"),
    "tuner/checkpoint.py": (
        "tuner/test_bad_input.py",
        "files/test_checkpoint.py",
        "files/test_saved_means_trained.py",
        "files/test_checked_before_loading.py",
        "tuner/test_choosing.py",
        "tuner/test_beside_adapters.py",
    ),
    "tuner/combining.py": ("tuner/test_weighted_adapters.py", "tuner/test_weighted_models.py"),
    "layers/dispatch.py": (
        "layers/test_contract.py",
        "layers/test_config_view.py",
        "tuner/test_peft_api.py",
        "test_integrations.py",
    ),
    "tuner/initial.py": ("tuner/test_initial_state.py",),
    "layers/implementations.py": ("layers/test_materialize.py", "layers/test_contract.py"),
    "layers/layer.py": (
        "tuner/test_peft_api.py",
        "tuner/test_choosing.py",
        "tuner/test_peft_helpers.py",
        "layers/test_offload.py",
        "layers/test_contract.py",
        "layers/test_materialize.py",
        "quant/test_quantized.py",
    ),
    "layers/materialize.py": ("layers/test_materialize.py",),
    "layers/merging.py": (
        "layers/test_merging.py",
        "tuner/test_peft_api.py",
        "tuner/test_choosing.py",
        "tuner/test_peft_helpers.py",
        "quant/test_quantized.py",
        "parallel/test_fully_sharded.py",
    ),
    "tuner/copies.py": ("tuner/test_beside_adapters.py",),
    "tuner/frames.py": ("files/test_whole_before_writing.py", "tuner/test_bad_input.py"),
    "tuner/loading.py": (
        "tuner/test_bad_input.py",
        "files/test_checked_before_loading.py",
        "files/test_saved_means_trained.py",
        "tuner/test_moved_base.py",
        "tuner/test_beside_adapters.py",
        "test_integrations.py",
    ),
    "tuner/model.py": (
        "tuner/test_peft_api.py",
        "tuner/test_bad_input.py",
        "tuner/test_second_adapter.py",
        "tuner/test_choosing.py",
        "tuner/test_weighted_models.py",
        "tuner/test_beside_experts.py",
        "tuner/test_peft_helpers.py",
        "tuner/test_beside_adapters.py",
        "tuner/test_initial_state.py",
        "files/test_checkpoint.py",
        "files/test_saving_again.py",
        "files/test_whole_before_writing.py",
    ),
    "tuner/moved.py": ("tuner/test_moved_base.py",),
    "layers/offload.py": (
        "layers/test_offload.py",
        "families/test_off_interface.py::test_offloaded_weights_come_back_for_the_adapter",
        "tuner/test_training_modes.py",
    ),
    "tuner/peft_model.py": (
        "tuner/test_status.py",
        "tuner/test_peft_api.py",
        "files/test_interrupted_saves.py",
    ),
    "layers/projections.py": (
        "tuner/test_second_adapter.py",
        "tuner/test_peft_api.py",
        "tuner/test_choosing.py",
        "families/test_off_interface.py",
    ),
    "layers/refusals.py": ("tuner/test_one_matrix.py", "tuner/test_peft_helpers.py"),
    "layers/router.py": (
        "layers/test_merging.py",
        "families/test_routers.py",
        "parallel/test_divided.py",
        "tuner/test_beside_experts.py",
        "parallel/test_expert_parallel.py",
    ),
    "tuner/saving.py": ("files/test_saved_means_trained.py", "files/test_saving_again.py"),
    "tuner/summary.py": ("tuner/test_peft_api.py", "tuner/test_beside_experts.py"),
    "tuner/targets.py": (
        "tuner/test_bad_input.py",
        "tuner/test_peft_api.py",
        "tuner/test_beside_experts.py",
        "tuner/test_choosing.py",
        "tuner/test_beside_adapters.py",
        "tuner/test_second_adapter.py",
    ),
    "tuner/ties.py": ("tuner/test_beside_adapters.py",),
    "tuner/whole.py": ("files/test_whole_before_writing.py",),
    "tuner/weighted.py": ("tuner/test_weighted_adapters.py", "tuner/test_weighted_models.py"),
}


def nearest_to(module: Path) -> tuple[str, ...]:
    """Paths of the tests, from the project's root.

    Args:
        module: path of a source file in the package.
    """
    for path in (module, *module.parents):
        if str(path) in NEAREST:
            return tuple(f"tests/{name}" for name in NEAREST[str(path)])
    raise KeyError(f"tests/mutants/nearest.py has no tests for {module}")

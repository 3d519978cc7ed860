"""Which tests are nearest to a module: they notice a break of it, and take seconds.

A module has the tests of its own row, or else those of its folder's row. The tests that notice most
come first, because a run ends at the first test that fails.
"""

from pathlib import Path

# path in the package -> test files or folders
NEAREST = {
    "convert": ("convert",),
    "experts": ("experts", "families/test_off_interface.py", "tuner/test_contract.py"),
    "files": ("files", "tuner/test_bad_input.py", "convert/test_bad_adapters.py"),
    "functional": (
        "functional",
        "tuner/test_choosing.py",
        "families/test_off_interface.py",
    ),
    "ops": (
        "functional",
        "tuner/test_choosing.py",
        "families/test_off_interface.py",
    ),
    "ops/quantize.py": ("quant/test_quantized.py",),
    "ops/quantized.py": ("quant/test_quantized.py", "quant/test_quantized_loading.py"),
    "quant": ("quant",),
    "stats": ("stats",),
    "tuner": (
        "tuner/test_peft_api.py",
        "tuner/test_bad_input.py",
        "tuner/test_second_adapter.py",
        "tuner/test_choosing.py",
        "tuner/test_beside_experts.py",
        "files/test_checkpoint.py",
        "files/test_saving_again.py",
    ),
    "tuner/checkpoint.py": (
        "files/test_checkpoint.py",
        "files/test_saving_again.py",
        "tuner/test_bad_input.py",
        "tuner/test_choosing.py",
        "files/test_damaged_json.py",
    ),
    "tuner/dispatch.py": (
        "tuner/test_contract.py",
        "tuner/test_peft_api.py",
        "test_integrations.py",
    ),
    "tuner/implementations.py": ("tuner/test_materialize.py",),
    "tuner/layer.py": (
        "tuner/test_peft_api.py",
        "tuner/test_choosing.py",
        "tuner/test_peft_helpers.py",
        "tuner/test_offload.py",
        "tuner/test_contract.py",
        "tuner/test_materialize.py",
    ),
    "tuner/materialize.py": ("tuner/test_materialize.py",),
    "tuner/merging.py": (
        "tuner/test_merging.py",
        "tuner/test_peft_api.py",
        "tuner/test_choosing.py",
        "tuner/test_peft_helpers.py",
        "quant/test_quantized.py",
    ),
    "tuner/offload.py": ("tuner/test_offload.py", "tuner/test_training_modes.py"),
    "tuner/projections.py": (
        "tuner/test_second_adapter.py",
        "tuner/test_peft_api.py",
        "tuner/test_choosing.py",
        "families/test_off_interface.py",
    ),
    "tuner/refusals.py": ("tuner/test_peft_helpers.py",),
    "tuner/router.py": (
        "tuner/test_merging.py",
        "families/test_routers.py",
        "tuner/test_beside_experts.py",
    ),
    "tuner/summary.py": ("tuner/test_peft_api.py", "tuner/test_beside_experts.py"),
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

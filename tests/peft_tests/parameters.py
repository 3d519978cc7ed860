"""A plugin of pytest: PEFT's tests of `target_parameters` with `apply_to_peft` in force."""

from peft_moe_lora import apply_to_peft
from peft_moe_lora.interop import wrappers
from peft_tests import stand_ins

# a part of a test's name -> why it cannot run
LEFT_OUT = {
    "test_target_parameter_result_caching_works": "it counts the weights that PEFT's own code "
    "writes, and here none is written",
}

_computed = []


def pytest_configure():
    stand_ins.install()
    compute = wrappers.ExpertsCall.compute

    def counted(call, module, *rows):
        _computed.append(type(module).__name__)
        return compute(call, module, *rows)

    wrappers.ExpertsCall.compute = counted
    apply_to_peft()


def pytest_collection_modifyitems(items):
    stand_ins.skip(items, LEFT_OUT)


def pytest_terminal_summary(terminalreporter):
    terminalreporter.line(f"computed by peft_moe_lora: {len(_computed)}")

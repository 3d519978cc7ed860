"""`apply_to_peft` replaces one method of PEFT and adds one; its handle undoes both."""

import pytest
from peft.tuners.lora.layer import ParamWrapper

from peft_moe_lora import apply_to_peft


def test_an_import_changes_nothing_and_removal_restores_peft():
    own = vars(ParamWrapper)["forward"]
    assert own.__module__ == "peft.tuners.lora.layer"
    assert own.__code__.co_filename.endswith("peft/tuners/lora/layer.py")
    before = dict(vars(ParamWrapper))
    handle = apply_to_peft()
    now = dict(vars(ParamWrapper))
    assert {name for name in before if before[name] is not now[name]} == {"forward"}
    assert now.keys() - before.keys() == {"moe_lora_prepare"}
    handle.remove()
    assert dict(vars(ParamWrapper)) == before
    handle.remove()
    assert vars(ParamWrapper)["forward"] is own


def test_applying_twice_changes_nothing_and_the_inner_block_leaves_the_outer():
    own = vars(ParamWrapper)["forward"]
    with apply_to_peft():
        once = vars(ParamWrapper)["forward"]
        with apply_to_peft():
            assert vars(ParamWrapper)["forward"] is once
        assert vars(ParamWrapper)["forward"] is once
    assert vars(ParamWrapper)["forward"] is own
    apply_to_peft()
    apply_to_peft().remove()
    assert vars(ParamWrapper)["forward"] is own


def test_an_exception_in_the_block_removes_it_too():
    own = vars(ParamWrapper)["forward"]
    with pytest.raises(ZeroDivisionError), apply_to_peft():
        raise ZeroDivisionError
    assert vars(ParamWrapper)["forward"] is own


def test_what_replaced_the_method_since_has_to_go_first(monkeypatch):
    handle = apply_to_peft()
    with monkeypatch.context() as patch:
        patch.setattr(ParamWrapper, "forward", lambda self, *args: None)
        with pytest.raises(RuntimeError, match="replaced again"):
            handle.remove()
    handle.remove()


def test_it_can_be_applied_again_after_others_restored_peft():
    own = vars(ParamWrapper)["forward"]
    apply_to_peft()
    ParamWrapper.forward = own
    handle = apply_to_peft()
    assert vars(ParamWrapper)["forward"] is not own
    handle.remove()
    assert vars(ParamWrapper)["forward"] is own

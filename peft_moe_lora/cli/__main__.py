"""`python -m peft_moe_lora.cli` is the command `peft-moe-lora`."""

from . import main

main()

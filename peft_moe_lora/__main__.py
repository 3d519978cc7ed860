"""`python -m peft_moe_lora` is the command `peft-moe-lora`."""

from .cli import main

main()

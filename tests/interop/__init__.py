"""PEFT's own LoRA on experts, computed by this package: the same numbers, and PEFT's otherwise."""

"""What a user does with `MoELoraConfig` and a PEFT model: attach, train, merge, save."""

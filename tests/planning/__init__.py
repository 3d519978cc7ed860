"""What a step needs, as `plan` finds it, beside what the same code allocates when it runs."""

"""PEFT's own tests, run with this package in the place of PEFT's code (`make test-peft`)."""

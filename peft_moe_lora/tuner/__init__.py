"""The PEFT side: configuration, layers and model of the tuner.

May import functional, experts, files and below.
"""

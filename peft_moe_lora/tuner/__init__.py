"""The PEFT side: an adapter is added, trained beside others, saved, loaded, merged and combined.

May import layers, parallel, config, functional, experts, files and below.
"""

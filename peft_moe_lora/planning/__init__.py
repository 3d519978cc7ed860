"""What a training step needs, found on the meta device: memory by part, time, and GPUs.

It imports rooms below it alone: `tuner/`, `experts/`, `functional/`, `ops/`.
"""

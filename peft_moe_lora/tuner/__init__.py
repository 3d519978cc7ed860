"""The PEFT side: configuration, layers and model of the tuner.

May import functional, experts, files and below.

The files build on one another in this order: `materialize` and `implementations` (another way to
run experts), `config`, then the parts of a layer (`offload`, `dispatch`, `projections`, `merging`),
`layer` itself and `router`, and last `checkpoint`, `summary` and `model`.
"""

"""The PEFT side: configuration, layers and model of the tuner.

May import functional, experts, files and below.

Each file imports only files that come before it in this order: `materialize` and `implementations`
(experts run by the model's own code), `config`, the parts of a layer (`offload`, `dispatch`,
`projections`, `merging`, `refusals`), `layer`, `router`, `checkpoint`, `summary`, `model`.
"""

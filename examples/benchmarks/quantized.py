"""Time LoRA on quantized experts beside LoRA on the dense weights they stand for, and train a 30B model in 24 GB.

    python examples/benchmarks/quantized.py                        one layer: step, peak, decoding; small on a CPU
    python examples/benchmarks/quantized.py --scratch 32 128 1024  the same for several bounds of the scratch, in MiB
    python examples/benchmarks/quantized.py --tokens 1 64 512      few rows: codes decoded by their product, or before
    python examples/benchmarks/quantized.py --model                48 layers of Qwen3-30B-A3B, random NF4 experts
    python examples/benchmarks/quantized.py --model --loss-chunk 512 --rank 16

The layer: `get_peft_model` on transformers' Qwen3-MoE experts, forward and backward, dense and quantized by turns in
one run; outputs and gradients are compared with a reference in higher precision first. The model: built layer by
layer, never dense as a whole, LoRA on every expert and on attention, gradient checkpointing, fp32 AdamW; memory is
torch.cuda.max_memory_allocated. bitsandbytes is not needed.
"""

import argparse
import json
import statistics
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from layer import (
    BOUNDS,
    DTYPES,
    MIB,
    PROJECTIONS,
    SHAPES,
    Case,
    Problem,
    Timer,
    check,
    first_step,
    forward,
    memory,
    moe_lora,
    relative_errors,
    renew,
    step,
    synchronize,
)
from peft_moe_lora import MoELoraConfig
from peft_moe_lora.experts.decoding import store
from peft_moe_lora.ops import reference
from peft_moe_lora.ops.quantize import quantize

FORMATS = {
    "nf4": {"format": "nf4"},
    "nf4-plain": {"format": "nf4", "double_quant": False},
    "fp4": {"format": "fp4"},
    "int8": {"format": "int8"},
}
# of Qwen3-30B-A3B, as published
QWEN3_30B = {
    "vocab_size": 151936, "hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
    "num_experts_per_tok": 8, "norm_topk_prob": True, "tie_word_embeddings": False, "max_position_embeddings": 40960,
}  # fmt: skip
TINY = QWEN3_30B | {
    "vocab_size": 256, "hidden_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip


# ---- one layer -----------------------------------------------------------------------------------------------------


def time_layer(case: Case, formats: list[str], repeat: int) -> list[dict]:
    """A row for the dense layer and for each format: ms of a step, MiB of its peak, both over the dense one's.

    Raises:
        CheckFailed: if a route's output or gradients are not the reference's.
    """
    timer, rows = Timer(case.device), []
    for name in formats:
        problem = Problem(case)
        codes = {}
        for projection in PROJECTIONS:
            codes[projection] = quantize(problem.weights[projection], **FORMATS[name])
            # both routes and the reference work with the same weights
            problem.weights[projection].copy_(codes[projection].dense())
        routes = {"dense": moe_lora(problem), name: moe_lora(problem)}
        experts = routes[name].forward.experts.base_layer
        for projection, weight in codes.items():
            store(experts, f"{projection}_proj", weight)
        expected = problem.reference(problem.scaling)
        found = {}
        for route_name, route in routes.items():
            check(relative_errors(first_step(problem, route)[1], expected), BOUNDS[case.dtype])
            found[route_name] = {"times": [], **memory(problem, route)}
        del expected
        for _ in range(3):
            for route_name, route in routes.items():
                times, _ = timer(
                    partial(step, problem, route), partial(renew, problem, route), repeat
                )
                found[route_name]["times"].append(statistics.median(times))
        for route_name, row in found.items():
            if route_name == "dense" and rows:
                continue
            weights = sum(
                w.nbytes for w in (problem.weights if route_name == "dense" else codes).values()
            )
            times = row.pop("times")
            dense = found["dense"]
            rows.append(
                {
                    "case": case.label, "route": route_name, "step": statistics.median(times), **row,
                    "weights": weights / MIB, "dense_step": None, "x_step": 1.0, "x_peak": 1.0,
                }
            )  # fmt: skip
            if route_name != "dense":
                base = statistics.median(dense["times"]) if "times" in dense else rows[0]["step"]
                rows[-1] |= {
                    "dense_step": base, "x_step": rows[-1]["step"] / base, "x_peak": row["peak"] / dense["peak"],
                    "decode": decoding_speed(problem, codes, timer, repeat),
                }  # fmt: skip
    return rows


def decoding_speed(problem: Problem, codes: dict, timer: Timer, repeat: int) -> dict | None:
    """ms and GB/s (codes read, dense written) of decoding every expert of each projection at once; None on a CPU."""
    if problem.case.device.type != "cuda":
        return None
    from peft_moe_lora.ops import kernels

    offsets, found = reference.route(problem.top_k_index, problem.case.E).expert_offsets, {}
    for projection, weight in codes.items():
        out = torch.empty(weight.stored_shape, dtype=weight.dtype, device=weight.device)
        kernels.dequantize(weight, offsets, 0, out)
        if not torch.equal(out, weight.dense()):
            raise SystemExit(f"{projection}: the kernel's bits are not the twin's")
        times, _ = timer(partial(kernels.dequantize, weight, offsets, 0, out), lambda: None, repeat)
        ms = statistics.median(times)
        found[projection] = {"ms": ms, "GB/s": (weight.nbytes + out.nbytes) / ms / 1e6}
    return found


# ---- where codes are decoded ---------------------------------------------------------------------------------------

# `MAX_BLOCK_M` of `ops.kernels.codes.product_4bit`: products decode at every number of rows, or at none
DECODING = {"in the product": 128, "into a scratch": 0}


@contextmanager
def decoding(max_block_m: int):
    """Within it, products over tiles of at most so many rows decode their codes."""
    from peft_moe_lora.ops.kernels.codes import product_4bit
    from peft_moe_lora.ops.kernels.launching import replay

    kept, product_4bit.MAX_BLOCK_M = product_4bit.MAX_BLOCK_M, max_block_m
    # what was recorded goes the other way
    replay.forget()
    try:
        yield
    finally:
        product_4bit.MAX_BLOCK_M = kept
        replay.forget()


def use_blocks(blocks: dict) -> None:
    """Give every row of the table for products of codes these settings, such as {"BLOCK_K": 32, "num_warps": 8}."""
    from peft_moe_lora.ops.kernels.launching import table
    from tune_kernels import forget

    for row in table.TABLE:
        if row.op.endswith("4bit") and row.arch:
            row.blocks.update(blocks)
    forget()


def few_rows(case: Case, format: str, repeat: int) -> dict:
    """ms of forward, of forward in a CUDA graph and of a step: dense, and each way of DECODING, by turns in one run.

    Raises:
        CheckFailed: if a way's output or gradients are not the reference's.
    """
    problem = Problem(case)
    routes = {"dense": moe_lora(problem), format: moe_lora(problem)}
    experts = routes[format].forward.experts.base_layer
    for projection in PROJECTIONS:
        weight = quantize(problem.weights[projection], **FORMATS[format])
        problem.weights[projection].copy_(weight.dense())
        store(experts, f"{projection}_proj", weight)
    cuda = case.device.type == "cuda"
    # the kernels are a GPU's; elsewhere there is one way
    ways = {"dense": ("dense", 0)} | {
        way: (format, bound) for way, bound in (DECODING if cuda else {"": 0}).items()
    }
    expected, timer, found = problem.reference(problem.scaling), Timer(case.device), {}
    calls = {}
    for way, (name, bound) in ways.items():
        route = routes[name]
        with decoding(bound) if cuda else nullcontext():
            check(relative_errors(first_step(problem, route)[1], expected), BOUNDS[case.dtype])
            calls[way] = {
                "forward": partial(forward, problem, route),
                "step": partial(step, problem, route),
            }
            if cuda:
                graph = torch.cuda.CUDAGraph()
                with torch.no_grad():
                    # compiled, recorded and replayed before it is captured
                    for _ in range(3):
                        forward(problem, route)
                    with torch.cuda.graph(graph):
                        forward(problem, route)
                calls[way]["graph"] = graph.replay
        found[way] = {kind: [] for kind in calls[way]}
    for _ in range(3):
        for way, (name, bound) in ways.items():
            with decoding(bound) if cuda else nullcontext():
                for kind, call in calls[way].items():
                    with torch.no_grad() if kind == "forward" else nullcontext():
                        times, _ = timer(call, partial(renew, problem, routes[name]), repeat)
                    found[way][kind].append(statistics.median(times))
    rows = case.T * case.top_k / case.E
    medians = {
        way: {kind: statistics.median(t) for kind, t in kinds.items()}
        for way, kinds in found.items()
    }
    return {"case": case.label, "tokens": case.T, "rows_per_expert": rows, "ms": medians}


# ---- a whole model -------------------------------------------------------------------------------------------------


def build(sizes: dict, format: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A random Qwen3-MoE whose experts were quantized one projection at a time."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(**sizes)
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config).to(dtype)
    for decoder in model.model.layers:
        experts = decoder.mlp.experts
        for name in ("gate_up_proj", "down_proj"):
            shape = getattr(experts, name).shape
            stack = torch.empty(shape, dtype=dtype, device=device).normal_(std=0.02)
            store(experts, name, quantize(stack, **FORMATS[format]))
            del stack
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                value = torch.empty(parameter.shape, dtype=dtype, device=device)
                # norms are the only vectors
                value = value.fill_(1.0) if parameter.ndim == 1 else value.normal_(std=0.02)
                setattr(module, name, nn.Parameter(value, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model.requires_grad_(False)


def loss_of(model: nn.Module, ids: torch.Tensor, chunk: int | None) -> torch.Tensor:
    """Cross entropy of the next token; with `chunk`, that many tokens' logits at a time, forward and backward."""
    if chunk is None:
        return model(input_ids=ids, labels=ids, use_cache=False).loss
    inner = model.get_base_model()
    hidden = inner.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    targets = ids[:, 1:].flatten()

    def part(hidden, targets):
        return F.cross_entropy(inner.lm_head(hidden).float(), targets, reduction="sum")

    losses = [
        checkpoint(part, *both, use_reentrant=False)
        for both in zip(hidden.split(chunk), targets.split(chunk), strict=True)
    ]
    return torch.stack(losses).sum() / len(targets)


def train(arguments: argparse.Namespace, device: torch.device) -> dict:
    """Three steps of the whole model: bytes at each stage, ms of a step, losses."""
    from peft import get_peft_model

    sizes = QWEN3_30B if device.type == "cuda" else TINY
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found = {
        "sizes": sizes,
        "format": arguments.formats[0],
        "r": arguments.rank,
        "T": arguments.tokens,
    }
    peaks = found["GiB"] = {}

    def note(stage: str):
        if device.type == "cuda":
            synchronize(device)
            peaks[stage] = {
                "held": torch.cuda.memory_allocated() / 2**30,
                "peak": torch.cuda.max_memory_allocated() / 2**30,
                "reserved": torch.cuda.max_memory_reserved() / 2**30,
            }
            torch.cuda.reset_peak_memory_stats()

    torch.manual_seed(0)
    model = build(sizes, arguments.formats[0], dtype, device)
    note("built")
    config = MoELoraConfig(
        r=arguments.rank,
        lora_alpha=2 * arguments.rank,
        target_modules=["experts", "q_proj", "k_proj", "v_proj", "o_proj"],
    )
    model = get_peft_model(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    found["trained"] = sum(p.numel() for p in trained)
    note("adapter")
    inner = model.get_base_model()
    # transformers 5.17 knows this name alone
    inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(sizes["vocab_size"], (1, arguments.tokens), device=device)
    found["losses"], found["ms"] = [], []
    for i in range(arguments.steps):
        synchronize(device)
        start = time.perf_counter()
        loss = loss_of(model, ids, arguments.loss_chunk)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found["losses"].append(loss.item())
        found["ms"].append(1e3 * (time.perf_counter() - start))
        note(f"step {i + 1}")
    if peaks:
        found["peak_GiB"] = max(stage["peak"] for stage in peaks.values())
        found["of_24_GiB"] = found["peak_GiB"] / 24
    return found


def main(argv: list[str] | None = None) -> list[dict] | dict:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", action="store_true", help="train the whole model instead of timing a layer"
    )
    parser.add_argument(
        "--shape", help=f"one of {', '.join(SHAPES)} (default: qwen3-30b, many-small on a CPU)"
    )
    parser.add_argument(
        "--formats", nargs="+", choices=FORMATS, default=["nf4"], help="(default: nf4)"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        help="(default: 8192 for a layer, 2048 for the model; 256, 64 on a CPU); "
        "several: times each with codes decoded in the product and into a scratch",
    )
    parser.add_argument(
        "--blocks", type=json.loads, help="with several --tokens: settings of the products, as JSON"
    )
    parser.add_argument("--rank", type=int, help="(default: 16 for a layer, 4 for the model)")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of a layer (default: bfloat16, float32 on a CPU)"
    )
    parser.add_argument(
        "--scratch", type=int, nargs="+", help="bounds of the scratch, MiB (default: the set one)"
    )
    parser.add_argument(
        "--repeat", type=int, default=20, help="timed steps a round, three rounds (default: 20)"
    )
    parser.add_argument("--steps", type=int, default=3, help="of the model (default: 3)")
    parser.add_argument(
        "--loss-chunk", type=int, help="tokens whose logits are formed at once (default: all)"
    )
    parser.add_argument("--json", type=Path, help="keep the numbers here")
    arguments = parser.parse_args(argv)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    default_tokens = (2048 if cuda else 64) if arguments.model else (8192 if cuda else 256)
    tokens = arguments.tokens or [default_tokens]
    arguments.tokens = tokens[0]
    arguments.rank = arguments.rank or (4 if arguments.model else 16)
    if arguments.model:
        found = train(arguments, device)
        print(json.dumps(found, indent=2))
    else:
        shape = arguments.shape or ("qwen3-30b" if cuda else "many-small")
        dtype = DTYPES[arguments.dtype or ("bfloat16" if cuda else "float32")]
        case = Case(shape, *SHAPES[shape], arguments.tokens, arguments.rank, dtype, 0.0, device)
        found = []
        if arguments.blocks:
            use_blocks(arguments.blocks)
        for T in tokens if len(tokens) > 1 else []:
            found.append(few_rows(replace(case, T=T), arguments.formats[0], arguments.repeat))
            print(f"{found[-1]['case']}, {found[-1]['rows_per_expert']:g} rows an expert")
            for way, times in found[-1]["ms"].items():
                print(
                    f"    {way or 'quantized':<16}",
                    *(f"{kind} {ms:8.3f} ms" for kind, ms in times.items()),
                    flush=True,
                )
        for scratch in [] if found else (arguments.scratch or [None]):
            if scratch is not None:
                from peft_moe_lora.ops.kernels import parts

                parts.SCRATCH_BYTES = scratch * MIB
            for row in time_layer(case, arguments.formats, arguments.repeat):
                found.append({"scratch": scratch} | row)
                print(
                    f"{row['case']:<28} {row['route']:<10} scratch {scratch or 'set'} MiB: step {row['step']:.2f} ms "
                    f"({row['x_step']:.2f}x dense), peak {row['peak']:.0f} MiB ({row['x_peak']:.2f}x), "
                    f"weights {row['weights']:.0f} MiB, decoding {row.get('decode')}",
                    flush=True,
                )
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    return found


if __name__ == "__main__":
    main()

"""Time whole training steps of a slice of Qwen3-30B-A3B: without an adapter, with PEFT's own, with peft_moe_lora.

    python examples/benchmarks/train_step.py         8 layers at real widths, on a GPU of 48 GiB or more
    python examples/benchmarks/train_step.py --tiny  the same steps of a tiny model on a CPU, in seconds

A step is forward, backward and AdamW on the adapters (LoRA of rank 16 on experts, q, k, v and o; fp32 on a bf16 base;
sdpa, experts_implementation="grouped_mm"). Every route runs on the same weights in memory, and the embeddings' output
asks for a gradient in all of them, so that backward goes through every layer; `base` has nothing to train and no
optimizer. Before anything is timed PEFT's adapter is set to ours, and both must give the same logits and gradients.
"""

import argparse
import copy
import gc
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from layer import MIB, CheckFailed, allocations, describe_machine, synchronize
from peft_moe_lora import MoELoraConfig

# peft 0.21 reads a name that transformers 5.23 deprecates; drop when peft's floor moves
warnings.filterwarnings(
    "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
)

SLICE = {
    "vocab_size": 32768,
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 8,
}
TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "moe_intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = {"gate_up": "gate_up_proj", "down": "down_proj"}
# |ours - PEFT's| / |PEFT's - base's|, the median token's logits; |ours - PEFT's| / |PEFT's|, every gradient. In bf16
# rounding sends some tokens to other experts, in one route and not in the other; in fp32 sums in another order remain.
BOUNDS = {torch.float32: (1e-3, 1e-3), torch.bfloat16: (0.1, 0.35)}
# what moe_lora is held to on an H200: times as fast as PEFT by batch, faster than base, peak without checkpointing
GOAL_SPEED = {"4x2048": 1.6, "1x2048": 2.0}
GOAL_PEAK = 0.4

WHAT = (
    "whole training step (forward, backward, AdamW on the adapters) of Qwen3-30B-A3B cut to {layers} layers, "
    "hidden_size {hidden_size}, {num_experts} experts, vocabulary {vocab_size}, random weights, {dtype}, sdpa, "
    "experts_implementation grouped_mm, LoRA r={rank} in fp32 on experts and q/k/v/o. base: frozen, no adapter, no "
    "optimizer, forward and backward. The embeddings' output requires a gradient in every route: each goes backward "
    "through every layer. Routes take turns in every round and share the base weights. ms: median over the rounds "
    "of the mean step. tok_s: tokens per second. peak: MiB allocated at most during a step above the base weights, "
    "the route's adapter, gradients and optimizer state included. spread: (slowest - fastest round) / median. first: "
    "seconds of the route's first step of this case. x_base, x_peft: the other route's ms over this one's; "
    "peak_of_peft: this route's peak over PEFT's."
)


@dataclass
class Route:
    """One model that trains.

    Attributes:
        model: called as model(input_ids=..., labels=...).
        trained: its adapter's parameters; empty without an adapter.
        optimizer: over `trained`, None without.
    """

    model: nn.Module
    trained: dict[str, nn.Parameter] = field(default_factory=dict)
    optimizer: torch.optim.Optimizer | None = None

    def static_bytes(self) -> int:
        """Of the adapter and its optimizer state."""
        state = self.optimizer.state.values() if self.optimizer else ()
        tensors = [
            *self.trained.values(),
            *(t for s in state for t in s.values() if isinstance(t, torch.Tensor)),
        ]
        return sum(
            t.numel() * t.element_size()
            for t in tensors
            if t.device.type == next(iter(tensors)).device.type
        )


# ---- the models ----------------------------------------------------------------------------------------------------


def build_base(args: argparse.Namespace) -> nn.Module:
    """The frozen slice with random weights, made on the device."""
    sizes = TINY if args.tiny else SLICE
    config = Qwen3MoeConfig(
        **{**sizes, "num_hidden_layers": args.layers, "norm_topk_prob": True, "use_cache": False}
    )
    torch.manual_seed(0)
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=args.dtype, attn_implementation="sdpa"
        )
    model.set_experts_implementation("grouped_mm")
    return model.requires_grad_(False).train()


def sharing_weights(base: nn.Module) -> nn.Module:
    """A second model on the same parameters in memory."""
    return copy.deepcopy(
        base, {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    )


def base_route(base: nn.Module, args: argparse.Namespace) -> Route:
    model = sharing_weights(base)
    model.enable_input_require_grads()
    return Route(model)


def peft_route(base: nn.Module, args: argparse.Namespace) -> Route:
    """PEFT's own: its LoRA on attention, a ParamWrapper for each of the experts' parameters."""
    config = LoraConfig(
        r=args.rank,
        lora_alpha=2 * args.rank,
        target_modules=ATTENTION,
        target_parameters=[f"experts.{name}" for name in EXPERTS.values()],
    )
    model = get_peft_model(sharing_weights(base), config)
    trained = {}
    for path, module in model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            # wrappers of one experts module lie in each other: ...experts, ...experts.base_layer
            path = path.removeprefix("base_model.model.").removesuffix(".base_layer")
            projection = next(
                (p for p, name in EXPERTS.items() if name == getattr(module, "parameter_name", "")),
                None,
            )
            end = projection or "weight"
            trained[f"{path}.lora_A.{end}"] = module.lora_A["default"].weight
            trained[f"{path}.lora_B.{end}"] = module.lora_B["default"].weight
    return trainable(model, trained)


def moe_lora_route(base: nn.Module, args: argparse.Namespace, **settings) -> Route:
    """peft_moe_lora as a user gets it; `settings` are further fields of its configuration."""
    targets = ["experts", *ATTENTION]
    config = MoELoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, target_modules=targets, **settings
    )
    model = get_peft_model(sharing_weights(base), config)
    named = ((name, p) for name, p in model.named_parameters() if ".lora_" in name)
    return trainable(
        model,
        {name.removeprefix("base_model.model.").replace(".default.", "."): p for name, p in named},
    )


def trainable(model: nn.Module, trained: dict[str, nn.Parameter]) -> Route:
    model.enable_input_require_grads()
    fused = next(iter(trained.values())).is_cuda
    return Route(model.train(), trained, torch.optim.AdamW(trained.values(), lr=1e-5, fused=fused))


ROUTES: dict[str, Callable[[nn.Module, argparse.Namespace], Route]] = {
    "base": base_route,
    "peft": peft_route,
    "moe_lora": moe_lora_route,
    "moe_lora-recompute": partial(moe_lora_route, recompute=True),
}


@torch.no_grad()
def fill_adapter(route: Route, rank: int, base: nn.Module) -> None:
    """Random A and B, each update about half as large as what it is added to."""
    generator = torch.Generator(next(iter(route.trained.values())).device).manual_seed(1)
    for name, parameter in route.trained.items():
        K = route.trained[name.replace("lora_B", "lora_A")].shape[1]
        # base weights are drawn with this deviation: W x is about std * sqrt(K) |x|, A x about |x|, scaling is 2
        std = (
            K**-0.5
            if "lora_A" in name
            else 0.25 * base.config.initializer_range * (K / rank) ** 0.5
        )
        parameter.normal_(std=std, generator=generator)


def in_pefts_order(name: str, tensor: torch.Tensor, rank: int) -> torch.Tensor:
    """B of experts from our order, column e*r + j, to PEFT's, column j*E + e; everything else as it is."""
    if ".experts.lora_B." not in name:
        return tensor
    return tensor.unflatten(1, (-1, rank)).transpose(1, 2).flatten(1)  # [N, E, r] -> [N, r, E]


# ---- the check -----------------------------------------------------------------------------------------------------


def check(routes: dict[str, Route], base: nn.Module, args: argparse.Namespace) -> dict[str, float]:
    """Give every adapted route the same random adapter and compare it with the first of them.

    Returns: the losses by route.
    Raises:
        CheckFailed: if two routes disagree, or the adapter has no say.
    """
    adapted = {name: route for name, route in routes.items() if route.trained}
    if not adapted:
        return {}
    first = next(iter(adapted))
    source = next((r for n, r in adapted.items() if n != "peft"), adapted[first])
    fill_adapter(source, args.rank, base)
    with torch.no_grad():
        for name, route in adapted.items():
            for key, parameter in route.trained.items():
                value = source.trained[key]
                if route is not source:
                    parameter.copy_(
                        in_pefts_order(key, value, args.rank) if name == "peft" else value
                    )
    ids = batch_of(args, *args.batches[-1], seed=99)
    plain = forward(Route(sharing_weights(base)), ids)
    found = {
        name: forward_and_gradients(route, ids, args.rank, name == "peft")
        for name, route in adapted.items()
    }
    right_logits, _, right_gradients = found[first]
    share = ((right_logits - plain).norm() / plain.norm()).item()
    if not 0.1 <= share <= 10:
        raise CheckFailed(f"the adapter's share of the logits is {share:.2e}, not of order one")
    logits_bound, gradients_bound = BOUNDS[args.dtype]
    for name, (logits, _, gradients) in found.items():
        difference = (logits - right_logits).norm(dim=-1) / (right_logits - plain).norm(dim=-1)
        if not difference.median() <= logits_bound:
            raise CheckFailed(
                f"the logits of {name} are {difference.median():.1e} off those of {first}"
            )
        errors = {key: relative(gradients[key], right) for key, right in right_gradients.items()}
        worst = max(errors, key=errors.get)
        if not errors[worst] <= gradients_bound:
            raise CheckFailed(
                f"the gradient of {worst} in {name} is {errors[worst]:.1e} off that of {first}"
            )
        print(
            f"  {name}: loss {found[name][1]:.4f}, logits {difference.median():.1e} and gradients at most "
            f"{errors[worst]:.1e} from those of {first}",
            file=sys.stderr,
        )
    return {name: loss for name, (_, loss, _) in found.items()}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@torch.no_grad()
def forward(route: Route, ids: torch.Tensor) -> torch.Tensor:
    """[batch, T, V] fp32 logits."""
    return route.model(input_ids=ids).logits.float()


def forward_and_gradients(route: Route, ids: torch.Tensor, rank: int, rank_major: bool):
    """(fp32 logits, loss, {name: gradient in our order})."""
    out = route.model(input_ids=ids, labels=ids)
    out.loss.backward()
    gradients = {}
    for name, parameter in route.trained.items():
        if parameter.grad is None:
            raise CheckFailed(f"{name} gets no gradient")
        gradient, parameter.grad = parameter.grad, None
        if rank_major and ".experts.lora_B." in name:
            gradient = gradient.unflatten(1, (rank, -1)).transpose(1, 2).flatten(1)
        gradients[name] = gradient
    return out.logits.detach().float(), out.loss.item(), gradients


# ---- measuring -----------------------------------------------------------------------------------------------------


def batch_of(args: argparse.Namespace, sequences: int, length: int, seed: int = 0) -> torch.Tensor:
    """[sequences, length] random token ids on the device."""
    vocabulary = (TINY if args.tiny else SLICE)["vocab_size"]
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (sequences, length), generator=generator).to(args.device)


def step(route: Route, ids: torch.Tensor) -> None:
    route.model(input_ids=ids, labels=ids).loss.backward()
    if route.optimizer is not None:
        route.optimizer.step()
        route.optimizer.zero_grad(set_to_none=True)


def set_checkpointing(model: nn.Module, on: bool) -> None:
    """Non-reentrant, every layer."""
    # transformers 5.17 has only the old name, 5.23 warns of it; drop when the floor moves
    word = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:
        getattr(model, f"{word}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{word}_checkpointing_disable")()


def peak_bytes(route: Route, ids: torch.Tensor, device: torch.device) -> int:
    """At most allocated during one step, above the base weights: with the route's adapter and optimizer state."""
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        start = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step(route, ids)
        synchronize(device)
        above = torch.cuda.max_memory_allocated(device) - start
    else:
        at = above = 0
        for nbytes in allocations(lambda: step(route, ids)):
            at += nbytes
            above = max(above, at)
    return above + route.static_bytes()


def seconds_of(route: Route, ids: torch.Tensor, device: torch.device, steps: int) -> float:
    """Of one step, the mean of `steps` in a row: the host may run ahead within them, as it does in training."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        step(route, ids)
    synchronize(device)
    return (time.perf_counter() - start) / steps


def run_case(
    routes: dict[str, Route], sequences: int, length: int, checkpointing: bool, args
) -> list[dict]:
    """One row per route, measured in rounds in which every route takes its turn."""
    ids, rows = batch_of(args, sequences, length), {}
    for name, route in routes.items():
        rows[name] = {
            "route": name,
            "batch": f"{sequences}x{length}",
            "ckpt": checkpointing,
            "failed": None,
        }
        set_checkpointing(route.model, checkpointing)
        try:
            rows[name]["first"] = seconds_of(route, ids, args.device, 1)
            seconds_of(route, ids, args.device, 2)
            rows[name]["peak"] = peak_bytes(route, ids, args.device) / MIB
        except torch.OutOfMemoryError as error:
            fail(rows[name], route, error)
    times = {name: [] for name in routes if not rows[name]["failed"]}
    for _ in range(args.rounds):
        for name in times:
            times[name].append(1e3 * seconds_of(routes[name], ids, args.device, args.steps))
    for name, measured in times.items():
        ms = statistics.median(measured)
        spread = (max(measured) - min(measured)) / ms
        rows[name].update(ms=ms, tok_s=1e3 * sequences * length / ms, spread=spread)
    compare(rows)
    return list(rows.values())


def fail(row: dict, route: Route, error: Exception) -> None:
    row["failed"] = f"raised {type(error).__name__}"
    print(f"  {row['route']}: {row['failed']}: {str(error).splitlines()[0]}", file=sys.stderr)
    route.model.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.empty_cache()


def compare(rows: dict[str, dict]) -> None:
    """Fill in x_base, x_peft and peak_of_peft, and whether moe_lora is where it should be on an H200."""
    for name, row in rows.items():
        if row["failed"]:
            continue
        for other, key in (("base", "x_base"), ("peft", "x_peft")):
            if other in rows and not rows[other]["failed"] and other != name:
                row[key] = rows[other]["ms"] / row["ms"]
        if "x_peft" in row:
            row["peak_of_peft"] = row["peak"] / rows["peft"]["peak"]
        if name == "moe_lora" and row["batch"] in GOAL_SPEED:
            row["goal_x_peft"], row["goal_x_base"] = GOAL_SPEED[row["batch"]], 1.0
            row["goal_peak_of_peft"] = None if row["ckpt"] else GOAL_PEAK


# ---- what comes out ------------------------------------------------------------------------------------------------

COLUMNS = {
    "batch": ("batch", "{}"),
    "ckpt": ("checkpointing", "{}"),
    "route": ("route", "{}"),
    "ms": ("ms", "{:.1f}"),
    "tok_s": ("tokens/s", "{:,.0f}"),
    "x_peft": ("x PEFT", "{:.2f}"),
    "goal_x_peft": ("goal", "{:.1f}"),
    "x_base": ("x base", "{:.2f}"),
    "goal_x_base": ("goal", "{:.1f}"),
    "peak": ("peak MiB", "{:,.1f}"),
    "peak_of_peft": ("of PEFT's", "{:.2f}"),
    "goal_peak_of_peft": ("goal", "{:.1f}"),
    "first": ("first s", "{:.2f}"),
    "spread": ("spread", "{:.0%}"),
}


def format_table(rows: list[dict]) -> str:
    columns = {
        key: column
        for key, column in COLUMNS.items()
        if any(row.get(key) is not None for row in rows)
    }
    lines = [[title for title, _ in columns.values()]]
    for row in rows:
        shown = {**row, "ckpt": "yes" if row["ckpt"] else "no"}
        lines.append(
            [
                "" if shown.get(key) is None else form.format(shown[key])
                for key, (_, form) in columns.items()
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = [key in ("batch", "ckpt", "route") for key in columns]
    text = []
    for cells, row in zip(lines, [None, *rows], strict=True):
        padded = [
            c.ljust(w) if is_left else c.rjust(w)
            for c, w, is_left in zip(cells, widths, left, strict=True)
        ]
        text.append(
            "  ".join(padded).rstrip()
            + (f"  FAILED: {row['failed']}" if row and row["failed"] else "")
        )
    return "\n".join(text)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, what depends on --tiny filled in."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny model in fp32 on a CPU")
    parser.add_argument("--device", help="default: cuda, with --tiny cpu")
    parser.add_argument("--layers", type=int, help="default: 8, with --tiny 2")
    parser.add_argument(
        "--batches", nargs="+", metavar="BxT", help="sequences x tokens (default: 4x2048 1x2048)"
    )
    parser.add_argument("--rank", type=int, default=16, help="r; lora_alpha is 2 r (default: 16)")
    parser.add_argument(
        "--routes", nargs="+", choices=list(ROUTES), default=["base", "peft", "moe_lora"]
    )
    parser.add_argument("--checkpointing", nargs="+", choices=["no", "yes"], default=["no", "yes"])
    parser.add_argument(
        "--rounds", type=int, help="in which every route takes its turn (default: 6, with --tiny 2)"
    )
    parser.add_argument(
        "--steps", type=int, help="timed in a row per turn (default: 5, with --tiny 1)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number here")
    args = parser.parse_args(argv)
    defaults = {"device": "cpu", "layers": 2, "batches": ["4x32", "1x32"], "rounds": 2, "steps": 1}
    if not args.tiny:
        defaults = {
            "device": "cuda",
            "layers": 8,
            "batches": ["4x2048", "1x2048"],
            "rounds": 6,
            "steps": 5,
        }
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if min(args.layers, args.rank, args.rounds, args.steps) < 1:
        parser.error("--layers, --rank, --rounds and --steps are at least 1")
    pairs = [batch.partition("x")[::2] for batch in args.batches]
    if not all(a.isdecimal() and b.isdecimal() and int(a) and int(b) > 1 for a, b in pairs):
        parser.error(f"--batches: {args.batches} are not all like 4x2048, with at least two tokens")
    args.batches = [(int(a), int(b)) for a, b in pairs]
    args.device = torch.device(args.device)
    args.dtype = torch.float32 if args.tiny else torch.bfloat16
    return args


def main(argv: list[str] | None = None) -> int:
    """Check, measure, print a table; 1 if routes disagree or one failed."""
    args = parse_arguments(argv)
    started = datetime.now(UTC)
    base = build_base(args)
    routes = {name: ROUTES[name](base, args) for name in args.routes}
    print("Checking that the adapted routes agree", file=sys.stderr)
    try:
        losses = check(routes, base, args)
    except CheckFailed as error:
        print(f"No numbers: {error}.", file=sys.stderr)
        return 1
    machine, rows = describe_machine(args.device), []
    what = {
        "layers": args.layers,
        "rank": args.rank,
        "dtype": str(args.dtype).removeprefix("torch."),
    }
    what = WHAT.format(**(TINY if args.tiny else SLICE), **what)
    report = {"machine": machine, "date": started.isoformat(timespec="seconds"), "what": what}
    report |= {"command": sys.argv[1:] if argv is None else argv, "losses": losses}
    for sequences, length in args.batches:
        for checkpointing in args.checkpointing:
            print(
                f"{sequences} x {length}, checkpointing: {checkpointing} ...",
                file=sys.stderr,
                flush=True,
            )
            rows += run_case(routes, sequences, length, checkpointing == "yes", args)
            if args.json:
                # after every case, so that an interrupted run leaves what it has
                args.json.write_text(json.dumps({**report, "rows": rows}, indent=1) + "\n")
    print(
        ", ".join(
            f"{k} {machine[k]}" for k in ("device", "torch", "triton", "transformers", "peft")
        ),
        end="",
    )
    print(f", {started:%Y-%m-%d}; {args.layers} layers, r = {args.rank}")
    print(format_table(rows))
    return int(any(row["failed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())

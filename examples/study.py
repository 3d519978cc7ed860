"""Which rank, learning rate and targets? A tiny model, adapted in every way, on a CPU.

    python examples/study.py                     all of it, three seeds: under an hour on two cores
    python examples/study.py --seeds 1 --only targets

A tiny Mixture-of-Experts model (2 layers, 8 experts, 2 of them per token) is pretrained on
CPython's documentation, and adapted to the standard library's source by every variant below. Each
row of the results has the held-out loss on both texts and the number of trained parameters. Results
are written after each run; a run that is in the file already is not repeated.
"""

import json
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from transformers.optimization import get_cosine_schedule_with_warmup

from peft_moe_lora import MoELoraConfig, select_experts
from texts import Block, documentation, hold_out, pack, standard_library
from tiny import make_base

__all__ = ["VARIANTS", "Variant", "run", "table"]

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS, TOP_K = 8, 2
RANKS = (1, 2, 4, 8, 16, 32)
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
LENGTH = 128
BATCH = 8
EVAL_BLOCKS = 32
# of the samples from which experts are chosen
SAMPLE_BLOCKS = 16


@dataclass(frozen=True)
class Variant:
    """One way to adapt the model.

    Attributes:
        group: the question that it belongs to.
        name: what differs within the group.
        r: rank of each update.
        rate: the highest learning rate.
        alpha: lora_alpha; the update is multiplied by alpha / r, with rslora by alpha / sqrt(r).
        targets: as in `MoELoraConfig`.
        expert_r: rank of the experts where it is another one.
        rslora: as in `MoELoraConfig`.
        chosen: how many experts of a layer are adapted, those with most tokens; 0 for all.
    """

    group: str
    name: str
    r: int
    rate: float
    alpha: float
    targets: tuple[str, ...] = ("experts",)
    expert_r: int = 0
    rslora: bool = False
    chosen: int = 0


def variants() -> Iterator[Variant]:
    """Every way, by question."""
    for r in RANKS:
        for rate in RATES:
            yield Variant("rank", f"r = {r}", r, rate, 2 * r)
    both = ("experts", *ATTENTION)
    for rate in RATES[1:3]:
        for r in (2, 32):
            yield Variant("scaling", f"r = {r}, alpha = 32", r, rate, 32)
            yield Variant("scaling", f"r = {r}, alpha = 8, rslora", r, rate, 8, rslora=True)
        yield Variant("targets", "experts", 8, rate, 16)
        yield Variant("targets", "attention", 8, rate, 16, tuple(ATTENTION))
        yield Variant("targets", "experts, attention", 8, rate, 16, both)
        yield Variant("targets", "experts, attention, routers", 8, rate, 16, (*both, "gate"))
        yield Variant("targets", "4 of 8 experts", 8, rate, 16, chosen=4)
        yield Variant(
            "targets", "experts r / top_k, attention", 8, rate, 16, both, expert_r=8 // TOP_K
        )
        yield Variant(
            "targets", "experts r / E, attention", 8, rate, 16, both, expert_r=8 // EXPERTS
        )


VARIANTS = tuple(variants())


@dataclass
class Arguments:
    """The command line."""

    output: Path = field(
        default=Path("moe-lora-study"), metadata={"help": "folder of the model and the results"}
    )
    seeds: int = field(default=3, metadata={"help": "runs of every variant (default: 3)"})
    steps: int = field(default=120, metadata={"help": "optimizer steps of a run (default: 120)"})
    pretrain_steps: int = field(default=300, metadata={"help": "steps that make the model"})
    only: str = field(
        default="", metadata={"help": "one question", "choices": ["", "rank", "scaling", "targets"]}
    )
    workers: int = field(default=2, metadata={"help": "processes of one thread (default: 2)"})


@dataclass(frozen=True)
class Data:
    """Blocks to train on, and held-out blocks [n, LENGTH] of both texts."""

    train: list[Block]
    new: torch.Tensor
    old: torch.Tensor


@cache
def read_data(base: Path) -> Data:
    """The texts in the tokens of the pretrained model."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts, unseen = hold_out(standard_library())
    _, unseen_documentation = hold_out(documentation())

    def blocks(held_out: list[str]) -> torch.Tensor:
        packed = pack(held_out, tokenizer, LENGTH)[:EVAL_BLOCKS]
        return torch.stack([block["input_ids"] for block in packed])

    return Data(pack(texts, tokenizer, LENGTH), blocks(unseen), blocks(unseen_documentation))


@torch.no_grad()
def loss_of(model: torch.nn.Module, blocks: torch.Tensor) -> float:
    """Mean loss in nats per token."""
    model.eval()
    return model(input_ids=blocks, labels=blocks).loss.item()


def adapted(base: Path, variant: Variant, data: Data) -> PeftModel:
    """The pretrained model with a new adapter."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = MoELoraConfig(
        r=variant.r,
        lora_alpha=variant.alpha,
        target_modules=list(variant.targets),
        use_rslora=variant.rslora,
        task_type="CAUSAL_LM",
    )
    if variant.expert_r:
        config.rank_pattern = {"experts": variant.expert_r}
        # the same alpha / r
        config.alpha_pattern = {"experts": variant.alpha * variant.expert_r / variant.r}
    if variant.chosen:
        samples = [block["input_ids"][None] for block in data.train[:SAMPLE_BLOCKS]]
        config.expert_indices = select_experts(model, samples, top=variant.chosen)
    return get_peft_model(model, config)


def run(base: Path, variant: Variant, seed: int, steps: int) -> dict:
    """Adapt the model, and measure it on both texts.

    Args:
        base: folder of the pretrained model.
        seed: of A, and of the order of the blocks.
    Returns: the variant's fields, seed, steps, parameters, and loss on the new and the old text.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    data = read_data(base)
    model = adapted(base, variant, data)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=variant.rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    order = torch.randperm(len(data.train))[: steps * BATCH].tolist()
    model.train()
    for i in range(steps):
        chosen = order[i * BATCH : (i + 1) * BATCH]
        ids = torch.stack([data.train[n]["input_ids"] for n in chosen])
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
    return {
        **asdict(variant),
        "targets": list(variant.targets),
        "seed": seed,
        "steps": steps,
        "parameters": sum(p.numel() for p in trained),
        "new": loss_of(model, data.new),
        "old": loss_of(model, data.old),
    }


def key_of(row: dict) -> tuple:
    """What tells two runs apart."""
    return row["group"], row["name"], row["rate"], row["seed"], row["steps"]


def table(rows: list[dict]) -> str:
    """A table in markdown: of each variant the better rate, by the mean over its seeds."""
    lines = [
        "| question | variant | parameters | best rate | new text | old text |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    by_name: dict[tuple[str, str], dict[float, list[dict]]] = {}
    for row in rows:
        rates = by_name.setdefault((row["group"], row["name"]), {})
        rates.setdefault(row["rate"], []).append(row)
    for (group, name), rates in by_name.items():
        means = {rate: statistics.mean(row["new"] for row in of) for rate, of in rates.items()}
        best = min(means, key=lambda rate: means[rate])
        new = [row["new"] for row in rates[best]]
        old = statistics.mean(row["old"] for row in rates[best])
        spread = max(new) - min(new)
        lines.append(
            f"| {group} | {name} | {rates[best][0]['parameters']:,} | {best:g} | "
            f"{means[best]:.3f} ({spread:.3f}) | {old:.3f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Pretrain the model, run what is not in the results yet, print the table."""
    parser = HfArgumentParser(Arguments, description=__doc__)
    (args,) = parser.parse_args_into_dataclasses(argv)
    base = args.output / "base"
    results = args.output / "study.json"
    if not base.exists():
        args.output.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        make_base(base, args.pretrain_steps)
    rows = []
    if results.exists():
        rows = json.loads(results.read_text())["rows"]
    done = {key_of(row) for row in rows}
    todo = [
        (variant, seed)
        for seed in range(args.seeds)
        for variant in VARIANTS
        if args.only in ("", variant.group)
        and (variant.group, variant.name, variant.rate, seed, args.steps) not in done
    ]
    data = read_data(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = {"new": loss_of(model, data.new), "old": loss_of(model, data.old)}
    print(f"{len(todo)} runs of {args.steps} steps; before: {before}", flush=True)
    with ProcessPoolExecutor(args.workers) as pool:
        running = [pool.submit(run, base, variant, seed, args.steps) for variant, seed in todo]
        for n, future in enumerate(running, start=1):
            rows.append(future.result())
            report = {
                "date": f"{datetime.now(UTC):%Y-%m-%d}",
                "torch": torch.__version__,
                "before": before,
                "rows": rows,
            }
            results.write_text(json.dumps(report, indent=1) + "\n")
            print(f"{n} of {len(todo)}: {rows[-1]['name']}, {rows[-1]['new']:.3f}", flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()

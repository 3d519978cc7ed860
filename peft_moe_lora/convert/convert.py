"""Adapters from one format into another, on files alone: what goes in comes out, or one error says why not.

Nothing is loaded but the tensors being converted, one projection of one experts module at a time.
"""

import math
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..experts.families import ONE_EACH
from ..experts.layout import EVERY_PROJECTION, PROJECTIONS
from ..files.adapter_file import PICKLE_NAME, WEIGHTS_NAME, read_description
from ..files.card import VLLM_RANKS, write_card
from ..files.tensor_file import (
    AdapterError,
    Block,
    Progress,
    RefusedError,
    TensorFile,
    new_folder,
    read_json,
    write_tensors,
)
from ..tuner.config import checked_indices
from .base import BaseModel, read_base
from .formats import FORMATS, PREFIX, READERS
from .model import Adapter, LinearPair, Source, fill_in, make_uniform, pad, rescale

CONFIG_NAME = "adapter_config.json"
# experts sampled per projection when two files are compared
SAMPLED_EXPERTS = 2

# beginnings of the names of what lies beside an adapter and belongs to it: its tokenizer, what its README says
_TRAVELS = (
    "tokenizer",
    "special_tokens_map",
    "added_tokens",
    "chat_template",
    "vocab.",
    "merges.txt",
    "README.md",
)
_LORA = re.compile(r"(?P<path>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB])(?:\.weight)?")


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
        source, to: format read, format written.
        path: the folder written.
        modules, experts: experts modules, and experts adapted in all of them.
        notes: what was changed or should be known, in sentences.
    """

    source: str
    to: str
    path: Path
    modules: int
    experts: int
    notes: tuple[str, ...]


def convert_adapter(
    src,
    dst,
    *,
    to: str,
    base_config=None,
    b_layout: str = "auto",
    force: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Write an adapter in another format.

    Args:
        src: folder of an adapter in any format, found by its tensors' names.
        dst: folder to write; put in place when it is whole.
        to: "moe_lora", "peft", "per_expert", "vllm_3d" or "sglang_3d".
        base_config: the base model: a folder, a config, or a name on the hub; by default the adapter's own base where
            it is a local folder. Shapes are held against it, and splitting gate from up needs it.
        b_layout: order of lora_B in PEFT's keys: "auto", "rank_major" (PEFT) or "expert_major" (old Unsloth).
        force: replace what lies at `dst`.
        progress: called with (blocks written, blocks in all).
    Returns: what was done, with notes.
    Raises:
        AdapterError: if the adapter is damaged, unknown, or for another model.
        RefusedError: if the reader would refuse or misread the result, or the adapter can be read in two ways.
        ExistsError: if `dst` exists.
    """
    if to not in FORMATS:
        raise RefusedError(
            f"to={to!r} is not written; known are {', '.join(FORMATS)} (peft_legacy is read only)."
        )
    adapter = prepare(open_adapter(src, base_config, b_layout), to)
    with new_folder(dst, force) as folder:
        write_adapter(adapter, to, folder, progress)
    experts = sum(len(next(iter(pairs.values())).experts) for pairs in adapter.experts.values())
    return Conversion(adapter.format, to, Path(dst), len(adapter.experts), experts, adapter.notes)


def prepare(adapter: Adapter, to: str) -> Adapter:
    """The adapter as the readers of a format take it; all that they would refuse is refused here."""
    form = FORMATS[to]
    if to != "moe_lora":
        _refuse_own_kinds(adapter, to)
    adapter = form.prepare(adapter)
    if form.whole:
        adapter = fill_in(adapter, set(PROJECTIONS), to)
    if form.uniform:
        adapter = make_uniform(adapter, to)
    if to in ("vllm_3d", "per_expert"):
        rank = adapter.config["r"]
        fitting = [allowed for allowed in VLLM_RANKS if allowed >= rank]
        if fitting:
            adapter = adapter.noted(f"vLLM: serve with --max-lora-rank {fitting[0]}")
    if to != "moe_lora" and any(pair.chosen is not None for pair in adapter.pairs()):
        adapter = adapter.noted(
            "experts without an adapter are written as zeros: only moe_lora can leave them out"
        )
    if to != "moe_lora" and adapter.config.get("lora_dropout"):
        adapter = adapter.noted(
            "lora_dropout is written as 0: it has no meaning once training is over"
        )
    return adapter


def _refuse_own_kinds(adapter: Adapter, to: str) -> None:
    """Families whose experts no format but ours describes."""
    for path, pairs in adapter.experts.items():
        family = adapter.base.experts[path].family if adapter.base is not None else None
        # without a base model, what shows in the file
        why = family.exports if family is not None else ONE_EACH * ("linear" in pairs)
        if why:
            raise RefusedError(
                f"{path} cannot be written as {to}: {why}; merge it into its model instead."
            )


def write_adapter(
    adapter: Adapter, to: str, folder: Path, progress: Progress | None = None
) -> None:
    """Write a prepared adapter into an empty folder: weights, configuration, card, the tokenizer beside it."""
    form = FORMATS[to]
    config = form.config(adapter)
    write_tensors(folder / WEIGHTS_NAME, _blocks(adapter, to), form.metadata(adapter), progress)
    config.save_pretrained(folder)
    for file in adapter.file.path.parent.iterdir():
        if file.is_file() and file.name.startswith(_TRAVELS):
            shutil.copy(file, folder)
    write_card(folder, to, config.to_dict(), adapter.notes)


def open_adapter(path, base_config=None, b_layout: str = "auto") -> Adapter:
    """Read what an adapter's two files say, in whatever format; no tensor is kept.

    Raises:
        AdapterError, RefusedError: as `convert_adapter`.
    """
    folder = Path(path)
    if not (folder / WEIGHTS_NAME).is_file():
        pickle = (folder / PICKLE_NAME).is_file()
        raise AdapterError(
            f"{folder} holds no {WEIGHTS_NAME}{f', and {PICKLE_NAME}, a pickle, is not read' if pickle else ''}; "
            "name the folder of an adapter, saved as safetensors."
        )
    config = _read_config(folder / CONFIG_NAME)
    file = TensorFile(folder / WEIGHTS_NAME)
    base = _base(base_config, config)
    names = _names(file, base)
    wrong = next(
        (n for n in file.tensors if ".lora_" in n and not file.tensors[n].dtype.is_floating_point),
        None,
    )
    if wrong is not None:
        raise AdapterError(
            f"{file.path}: {wrong} is {file.tensors[wrong].dtype}; adapters are floating point."
        )
    source = Source(file, config, names, base, b_layout)
    found = [(form, slots) for form in READERS if (slots := form.slots(source))]
    if len(found) != 1:
        raise AdapterError(
            f"{file.path} holds {' and '.join(form.name for form, _ in found) or 'no'} experts tensors; "
            + (
                "an adapter has them in one format."
                if found
                else "there is nothing for a MoE conversion to do."
            )
        )
    (form, slots), taken = found[0], set()
    for path, sides in slots.items():
        keys = {key for side in sides.values() for key in side.values()}
        if len(dtypes := {str(source.info(key).dtype) for key in keys}) > 1:
            raise AdapterError(
                f"{file.path}: {path} mixes {' and '.join(sorted(dtypes))}; save it in one dtype."
            )
        taken |= keys
    name, experts, notes = form.read(source, slots)
    _check_description(source, experts)
    linears, carried = _others(source, [key for key in names if key not in taken])
    ordered = dict(sorted(experts.items(), key=lambda item: _natural(item[0])))
    return Adapter(name, config, file, names, ordered, linears, carried, base, notes)


def _base(base_config, config: dict) -> BaseModel | None:
    """The base model that was named, else the adapter's own where it lies on this machine."""
    if base_config is not None:
        return read_base(base_config)
    own = config.get("base_model_name_or_path")
    return read_base(own) if isinstance(own, str) and Path(own, "config.json").is_file() else None


def _read_config(path: Path) -> dict:
    config = read_json(path)
    if config.get("peft_type") not in ("LORA", "MOE_LORA"):
        raise AdapterError(f"{path}: peft_type {config.get('peft_type')!r} is no LoRA.")
    for name in ("use_dora", "lora_bias", "use_qalora", "fan_in_fan_out"):
        if config.get(name):
            raise RefusedError(
                f"{path}: {name}={config[name]!r} has no counterpart in a conversion."
            )
    r, alpha = config.get("r"), config.get("lora_alpha")
    config |= {name: config.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    if not all(isinstance(config[name], dict) for name in ("rank_pattern", "alpha_pattern")):
        raise AdapterError(
            f"{path}: rank_pattern and alpha_pattern are objects of names and numbers."
        )
    ranks = [r, *config["rank_pattern"].values()]
    if not all(isinstance(x, int) and not isinstance(x, bool) and x >= 1 for x in ranks):
        raise AdapterError(f"{path}: ranks are integers of at least 1, got {ranks}.")
    alphas = [alpha, *config["alpha_pattern"].values()]
    if not all(isinstance(x, int | float) and math.isfinite(x) and x != 0 for x in alphas):
        raise AdapterError(f"{path}: lora_alpha is a finite number other than 0, got {alphas}.")
    config["use_rslora"] = bool(config.get("use_rslora"))
    if config.get("expert_indices") is not None:
        try:
            config["expert_indices"] = checked_indices(config["expert_indices"])
        except ValueError as error:
            raise AdapterError(f"{path}: {error}") from error
    return config


def _names(file: TensorFile, base: BaseModel | None) -> dict[str, str]:
    """Key without PEFT's prefix, in the base's own paths -> name in the file."""
    resolved: dict[str, str] = {}
    paths: dict[str, str] = {}
    for name in file.tensors:
        key = name.removeprefix(PREFIX)
        if base is not None:
            # the path of the module a tensor belongs to: an experts module for all that lies within it
            head = re.match(r"(.*\bexperts)(?=\.)|(.*?)(?=\.lora_)|(.*)(?=\.)", key)
            if head is not None:
                path = head[0]
                key = paths.setdefault(path, base.resolve(path)) + key[len(path) :]
        if key in resolved:
            raise AdapterError(
                f"{file.path}: {name} and {resolved[key]} are the same tensor under two names."
            )
        resolved[key] = name
    return resolved


def _check_description(source: Source, experts: dict) -> None:
    """Our own files say E, r, K and N in their metadata: what they say must be what they hold."""
    for path, described in (
        read_description(str(source.file.path), source.file.metadata).get("experts", {}).items()
    ):
        pairs = experts.get(source.base.resolve(path) if source.base else path, {})
        held = {
            n: {"r": p.r, "in_features": p.in_features, "out_features": p.out_features}
            for n, p in pairs.items()
        }
        numbers = {p.num_experts for p in pairs.values()}
        said = {n: value for n, value in described.items() if n not in ("num_experts", "experts")}
        chosen, listed = {p.chosen for p in pairs.values()}, described.get("experts")
        same_experts = chosen == {None if listed is None else tuple(listed)}
        if said != held or numbers != {described.get("num_experts")} or not same_experts:
            raise AdapterError(
                f"{source.file.path}: its metadata says {described} of {path}, the tensors with adapter_config.json "
                f"say {numbers or 'no'} experts of {held}, experts {chosen}; the two files do not belong together."
            )


def _others(source: Source, keys: list[str]) -> tuple[dict[str, LinearPair], tuple[str, ...]]:
    """What is not of experts: LoRA of ordinary layers, and tensors saved whole."""
    found: dict[str, dict[str, str]] = {}
    carried = []
    saved = (*(source.config.get("modules_to_save") or ()), "embed_tokens", "lm_head")
    for key in keys:
        match = _LORA.fullmatch(key)
        if match is not None:
            found.setdefault(match["path"], {})[match["side"]] = key
        # as PEFT matches them: the name may be the end of a longer one
        elif ".lora_" not in key and (any(f"{n}." in key for n in saved) or key.endswith(".bias")):
            carried.append(key)
        else:
            raise AdapterError(
                f"{source.file.path}: {source.names[key]} is no tensor of a LoRA adapter as known here."
            )
    linears, routers = (
        {},
        read_description(str(source.file.path), source.file.metadata).get("routers", ()),
    )
    for path, sides in sorted(found.items(), key=lambda item: _natural(item[0])):
        by_parameter = _matches(f"{path}.weight", source.config.get("target_parameters"))
        name = f"{path}.weight" if by_parameter else path
        r, scaling = source.rank(name), source.scaling(name)
        if len(sides) < 2:
            raise AdapterError(
                f"{source.file.path}: {next(iter(sides.values()))} stands without its other half."
            )
        A, B = source.info(sides["A"]).shape, source.info(sides["B"]).shape
        sizes = None if source.base is None else source.base.linears.get(path)
        if (
            len(A) != 2
            or len(B) != 2
            or A[0] != r
            or B[1] != r
            or (sizes and (A[1], B[0]) != sizes)
        ):
            raise AdapterError(
                f"{source.file.path}: {path} has A {list(A)} and B {list(B)}, not [{r}, {sizes[0] if sizes else 'K'}] "
                f"and [{sizes[1] if sizes else 'N'}, {r}]; the adapter is for another model, or its files do not "
                "belong together."
            )
        if source.base is not None and path not in source.base.modules:
            raise AdapterError(
                f"{source.file.path} adapts {path}, which {source.base.name} does not have."
            )
        # a router is no linear layer to PEFT: as the base says, else as it was targeted or as our own files say
        bare = by_parameter or path in routers if source.base is None else path in source.base.bare
        linears[path] = LinearPair(path, sides["A"], sides["B"], r, scaling, bare=bare)
    return linears, tuple(carried)


def _matches(path: str, names) -> bool:
    return any(f".{path}".endswith(f".{name}") for name in names or ())


def _blocks(adapter: Adapter, to: str) -> Iterator[Block]:
    form = FORMATS[to]
    for path, pairs in adapter.experts.items():
        for projection, pair in pairs.items():
            yield form.block(adapter, path, projection, pair)
    for pair in adapter.linears.values():
        for key, dim in ((pair.A, 0), (pair.B, 1)):
            yield _linear_block(adapter, form.rename(adapter, key), key, dim, pair)
    for key in adapter.carried:
        info = adapter.file.tensors[adapter.names[key]]
        name = adapter.names[key]
        yield Block(
            {form.rename(adapter, key): info.shape},
            info.dtype,
            lambda name=name: [adapter.file.load(name)],
        )


def _linear_block(adapter: Adapter, name: str, key: str, dim: int, pair: LinearPair) -> Block:
    info = adapter.file.tensors[adapter.names[key]]
    shape = tuple(pair.r if i == dim else size for i, size in enumerate(info.shape))

    def make():
        tensor = adapter.file.load(adapter.names[key])
        yield pad(rescale(tensor, pair.factor) if dim else tensor, dim, pair.r)

    return Block({name: shape}, info.dtype, make)


def _natural(path: str) -> list:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]


# ---------------------------------------------------------------------------------------------------------- inspecting


@dataclass(frozen=True)
class Inspection:
    """What an adapter's files say.

    Attributes:
        path, format, base_model: folder, format its tensors are in, base_model_name_or_path.
        modules: number of experts modules; num_experts: of each; adapted: experts in all of them that have an update.
        projections: adapted.
        ranks, scalings, dtypes: value -> number of projections and layers that have it.
        linears: last name of ordinary layers -> how many carry LoRA.
        carried: keys of tensors saved whole.
        parameters: numbers of LoRA parameters.
        readers: format -> "ok", or why its readers would refuse.
        notes: what should be known.
    """

    path: Path
    format: str
    base_model: str | None
    modules: int
    num_experts: tuple[int, ...]
    adapted: int
    projections: tuple[str, ...]
    ranks: dict[int, int]
    scalings: dict[float, int]
    dtypes: dict[str, int]
    linears: dict[str, int]
    carried: tuple[str, ...]
    parameters: int
    readers: dict[str, str]
    notes: tuple[str, ...]


def inspect_adapter(path, base_config=None, b_layout: str = "auto") -> Inspection:
    """Say what an adapter holds and which formats it can be converted to; reads headers only.

    Args:
        path: folder of the adapter.
        base_config: as in `convert_adapter`.
        b_layout: as in `convert_adapter`.
    Raises:
        AdapterError, RefusedError: as `convert_adapter`.
    """
    adapter = open_adapter(path, base_config, b_layout)
    readers = {}
    for name in FORMATS:
        try:
            readers[name] = "; ".join(("ok", *prepare(replace(adapter, notes=()), name).notes))
        except RefusedError as error:
            readers[name] = str(error)
    layers, pairs = adapter.layers(), list(adapter.pairs())
    lora = [adapter.file.tensors[n] for n in adapter.file.tensors if ".lora_" in n]
    return Inspection(
        path=Path(path),
        format=adapter.format,
        base_model=adapter.config.get("base_model_name_or_path"),
        modules=len(adapter.experts),
        num_experts=tuple(sorted({pair.num_experts for pair in pairs})),
        adapted=sum(len(next(iter(found.values())).experts) for found in adapter.experts.values()),
        projections=tuple(
            n for n in EVERY_PROJECTION if any(n in found for found in adapter.experts.values())
        ),
        ranks=dict(Counter(layer.r for layer in layers)),
        scalings=dict(Counter(layer.scaling for layer in layers)),
        dtypes=dict(Counter(str(info.dtype).removeprefix("torch.") for info in lora)),
        linears=dict(Counter(path.rpartition(".")[2] for path in adapter.linears)),
        carried=adapter.carried,
        parameters=sum(math.prod(info.shape) for info in lora),
        readers=readers,
        notes=adapter.notes,
    )


# ----------------------------------------------------------------------------------------------------------- verifying


@dataclass(frozen=True)
class Verification:
    """How far two adapters' updates are apart.

    Attributes:
        compared: pairs (module, projection, expert) and ordinary layers whose updates were formed.
        max_error: the largest |difference| over the largest |update| of its module; 0 without a second adapter.
        where: the module of that error.
        tolerance: what was allowed.
    """

    compared: int
    max_error: float
    where: str
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.max_error <= self.tolerance


def verify_adapter(
    path, base, other=None, *, b_layout: str = "auto", tolerance: float | None = None, seed: int = 0,
    progress: Progress | None = None,
) -> Verification:  # fmt: skip
    """Hold an adapter against its base model, and against a second adapter that should be the same update.

    Of every module and projection some experts are drawn, and scaling * B[e] A[e] is formed from both files: two
    orders of one shape, swapped experts or a lost scaling show as an error of order one.

    Args:
        path: folder of the adapter.
        base: its base model, as in `convert_adapter`.
        other: folder of the second adapter, in any format.
        b_layout: order of lora_B in PEFT's keys, for both.
        tolerance: largest relative error that passes; by default 1e-5 for fp32 files, 1e-2 where one is bf16 or fp16.
        seed: which experts are drawn.
        progress: called with (modules done, modules in all).
    Returns: what was compared and the largest error. Without `other`, every tensor is read and found finite.
    Raises:
        AdapterError, RefusedError: as `convert_adapter`; also if the two do not adapt the same modules.
    """
    first = open_adapter(path, base, b_layout)
    if other is None:
        for done, name in enumerate(first.file.tensors, 1):
            first.file.load(name)
            if progress is not None:
                progress(done, len(first.file.tensors))
        return Verification(0, 0.0, "", 0.0)
    second = open_adapter(other, base, b_layout)
    narrow = any(
        info.dtype.itemsize < 4 for a in (first, second) for info in a.file.tensors.values()
    )
    tolerance = tolerance if tolerance is not None else (1e-2 if narrow else 1e-5)
    compared, worst = 0, (0.0, "")
    generator = torch.Generator().manual_seed(seed)
    layers = _updates(first, second, generator)
    for done, (where, updates, total) in enumerate(layers, 1):
        for a, b in updates:
            size = max(a.abs().max().item(), b.abs().max().item())
            error = (a - b).abs().max().item() / size if size else 0.0
            worst = max(worst, (error, where), key=lambda pair: pair[0])
            compared += 1
        if progress is not None:
            progress(done, total)
    return Verification(compared, *worst, tolerance)


def _updates(first: Adapter, second: Adapter, generator) -> Iterator[tuple[str, Iterator, int]]:
    """(where, pairs of updates, number of layers) of all that either adapter holds; what one lacks is zero."""
    lost = sorted(set(first.linears) ^ set(second.linears)) + sorted(
        set(first.carried) ^ set(second.carried)
    )
    if lost or set(first.experts) != set(second.experts):
        names = lost or sorted(set(first.experts) ^ set(second.experts))
        raise AdapterError(
            f"only one of {first.file.path} and {second.file.path} adapts {names[0]} ({len(names)} so)."
        )
    named = [
        (path, n) for path in first.experts for n in {**first.experts[path], **second.experts[path]}
    ]
    total = len(named) + len(first.linears)
    for path, n in named:
        found = [adapter.experts[path].get(n) for adapter in (first, second)]
        drawn = _drawn([pair for pair in found if pair is not None], generator)
        yield (
            f"{path}, {n}",
            zip(*(_experts_updates(pair, found, drawn) for pair in found), strict=True),
            total,
        )
    for path in first.linears:
        yield path, [tuple(_linear_update(a, a.linears[path]) for a in (first, second))], total


def _drawn(pairs: list, generator) -> list[int]:
    """Some experts that either has an update of, and one that it has none of, where there is such a one."""
    chosen = sorted(set().union(*(pair.chosen or () for pair in pairs)))
    E = pairs[0].num_experts
    if not chosen:
        return torch.randperm(E, generator=generator)[:SAMPLED_EXPERTS].tolist()
    rest = sorted(set(range(E)) - set(chosen))
    few = torch.randperm(len(chosen), generator=generator)[:SAMPLED_EXPERTS].tolist()
    return [chosen[i] for i in few] + rest[:1]


def _experts_updates(pair, found, drawn) -> list[torch.Tensor]:
    if pair is None:
        like = next(p for p in found if p is not None)
        return [torch.zeros(like.out_features, like.in_features)] * len(drawn)
    A, B = pair.load()
    return [pair.scaling * (B[e].double() @ A[e].double()) for e in drawn]


def _linear_update(adapter: Adapter, pair: LinearPair) -> torch.Tensor:
    A, B = (adapter.file.load(adapter.names[key]).double() for key in (pair.A, pair.B))
    return pair.scaling * (B @ A)

"""Adapter formats: each reads its tensors into, and writes them from, A[e] [r, K], B[e] [N, r] and a scaling.

    W[e] + scaling * B[e] A[e]            for every expert e of a projection, whatever the order on disk

`moe_lora` is ours (A [r*E, K], B [N, r*E], both expert-major); `peft` is PEFT's target_parameters (B rank-major:
column j*E + e); `per_expert` holds 2-D tensors of every expert; `vllm_3d` is `peft` as vLLM's 3-D models read it; and
`sglang_3d` holds [E, r, K] and [E, N, r].
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

import torch
from peft import LoraConfig

from ..experts.layout import EVERY_PROJECTION, PROJECTIONS
from ..files.adapter_file import METADATA_KEY, described, described_module
from ..files.card import VLLM_RANKS
from ..files.tensor_file import AdapterError, Block, RefusedError
from ..tuner.config import MoELoraConfig
from .model import Adapter, Pair, Source, fill_in, need_base
from .targets import PARAMETERS, common_fields, parameter_name, short_names

PREFIX = "base_model.model."
B_LAYOUTS = ("auto", "rank_major", "expert_major")
# model types that vLLM is known to read in 3-D (its class says is_3d_moe_weight); the others it reads per expert
VLLM_3D = frozenset(
    {"gpt_oss", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_vl_moe", "qwen3_vl_moe_text"}
)

Slots = dict[str, dict]  # experts path -> slot of the format -> {"A": key, "B": key}


class Format:
    """How one format names and orders its tensors.

    Attributes:
        name: as users write it.
        uniform: whether its readers know one rank and one scaling for all.
        whole: whether its readers want both projections of every expert.
        key: pattern of an expert tensor's key, with groups `path` and `side`, and what tells slots of a path apart.
    """

    name: str
    uniform = False
    whole = False
    key: re.Pattern

    def slots(self, source: Source) -> Slots:
        """The expert tensors of this format: path -> slot -> side -> key.

        Raises:
            AdapterError: if an A stands without its B.
        """
        found: Slots = defaultdict(lambda: defaultdict(dict))
        for key in source.names:
            match = self.key.fullmatch(key)
            if match:
                found[match["path"]][self.slot(match)][match["side"]] = key
        for path, slots in found.items():
            for sides in slots.values():
                if len(sides) < 2:
                    raise AdapterError(
                        f"{source.file.path}: {path} has {next(iter(sides.values()))} without its "
                        f"lora_{'B' if 'A' in sides else 'A'}; the file is damaged or was filtered."
                    )
        return found

    def slot(self, match: re.Match):
        return match["slot"]

    def read(
        self, source: Source, slots: Slots
    ) -> tuple[str, dict[str, dict[str, Pair]], tuple[str, ...]]:
        """The format's name, experts path -> projection -> Pair, and notes."""
        raise NotImplementedError

    def prepare(self, adapter: Adapter) -> Adapter:
        """The adapter in a form this format's readers take.

        Raises:
            RefusedError: if there is none.
        """
        return adapter

    def block(self, adapter: Adapter, path: str, projection: str, pair: Pair) -> Block:
        raise NotImplementedError

    def config(self, adapter: Adapter) -> LoraConfig:
        raise NotImplementedError

    def metadata(self, adapter: Adapter) -> dict[str, str]:
        return {"format": "pt"}

    def rename(self, adapter: Adapter, key: str) -> str:
        """A key in the base model's paths, as this format writes it."""
        return PREFIX + key


# --------------------------------------------------------------------------------------------------------------- ours


class MoELora(Format):
    """`<experts>.lora_A.<projection>` [r*E, K] and `lora_B` [N, r*E], both expert-major; one rank per module."""

    name = "moe_lora"
    key = re.compile(r"(?P<path>.+)\.lora_(?P<side>[AB])\.(?P<slot>gate_up|down|linear)")

    def read(self, source, slots):
        experts = {}
        for path, projections in slots.items():
            experts[path] = {}
            for name, slot in sorted(
                projections.items(), key=lambda item: EVERY_PROJECTION.index(item[0])
            ):
                S, r, K, N = source.stacked_sizes(path, slot, source.rank(path))
                chosen, E = source.chosen(path), S
                if chosen is not None:
                    E = self._experts_in_all(source, path, S, chosen)
                load = self._loader(source, slot, (S, r), E, chosen)
                experts[path][name] = source.pair(
                    path, name, (E, r, K, N), source.scaling(path), slot["A"], load, chosen
                )
        return self.name, experts, ()

    @staticmethod
    def _experts_in_all(source, path, held, chosen) -> int:
        """E, held against what expert_indices chooses of it."""
        E = source.num_experts(path)
        if held != len(chosen) or chosen[-1] >= E:
            raise AdapterError(
                f"{source.file.path} holds {held} experts of {path}, which has {E}; expert_indices of "
                f"adapter_config.json names {list(chosen)}. The two files do not belong together."
            )
        return E

    @staticmethod
    def _loader(source, slot, sizes, num_experts, chosen):
        def load():
            A, B = source.load(slot["A"]), source.load(slot["B"])
            pairs = A.unflatten(0, sizes), B.unflatten(1, sizes).permute(1, 0, 2)
            if chosen is None:
                return pairs
            index = torch.tensor(chosen)
            return tuple(
                t.new_zeros(num_experts, *t.shape[1:]).index_copy_(0, index, t) for t in pairs
            )

        return load

    def prepare(self, adapter):
        """One rank and scaling per module, the same projections everywhere."""
        adapter = fill_in(
            adapter, {name for pairs in adapter.experts.values() for name in pairs}, self.name
        )
        experts = {}
        for path, pairs in adapter.experts.items():
            r, scaling = max(p.r for p in pairs.values()), next(iter(pairs.values())).scaling
            experts[path] = {
                name: pair.padded(r).scaled_to(scaling) for name, pair in pairs.items()
            }
        padded = any(
            len({pair.r for pair in pairs.values()}) > 1 for pairs in adapter.experts.values()
        )
        notes = (
            ["lower ranks padded with zeros: one rank for the projections of a module"]
            if padded
            else []
        )
        return replace(adapter, experts=experts).noted(*notes)

    def block(self, adapter, path, projection, pair):
        def make():
            A, B = pair.load()
            held = slice(None) if pair.chosen is None else list(pair.chosen)
            yield A[held].flatten(0, 1)
            yield B[held].permute(1, 0, 2).flatten(1)

        ranks, K, N = pair.r * len(pair.experts), pair.in_features, pair.out_features
        keys = (f"{PREFIX}{path}.lora_{side}.{projection}" for side in "AB")
        return Block(dict(zip(keys, ((ranks, K), (N, ranks)), strict=True)), pair.dtype, make)

    def config(self, adapter):
        modules = {path: next(iter(pairs.values())) for path, pairs in adapter.experts.items()}
        return MoELoraConfig(
            **common_fields(adapter, {**modules, **adapter.linears}),
            target_modules=short_names(adapter, [*modules, *adapter.linears]),
            target_projections=[n for n in PROJECTIONS if n in next(iter(adapter.experts.values()))]
            or None,
            lora_dropout=adapter.config.get("lora_dropout") or 0.0,
            expert_indices={path: list(pair.experts) for path, pair in modules.items()}
            if any(pair.chosen is not None for pair in modules.values())
            else None,
        )

    def metadata(self, adapter):
        modules = {}
        for path, pairs in adapter.experts.items():
            first = next(iter(pairs.values()))
            modules[path] = described_module(first.num_experts, first.chosen) | {
                n: {"r": p.r, "in_features": p.in_features, "out_features": p.out_features}
                for n, p in pairs.items()
            }
        routers = [path for path, layer in adapter.linears.items() if layer.bare]
        return {
            "format": "pt",
            METADATA_KEY: json.dumps(described(modules, routers), sort_keys=True),
        }


# --------------------------------------------------------------------------------------------------------------- PEFT


class Peft(Format):
    """`<experts>.base_layer.lora_A/B.weight` is gate_up, `<experts>.lora_A/B.weight` down; or the only target.

    A [E*r, K] is expert-major, B [N, r*E] rank-major: column j*E + e. PEFT 0.17 and 0.18 swapped in and out.
    """

    name = "peft"
    key = re.compile(r"(?P<path>.*\bexperts)(?P<slot>\.base_layer)?\.lora_(?P<side>[AB])\.weight")

    def read(self, source, slots):
        layout, notes = self._b_layout(source)
        experts, name = {}, self.name
        for path, sides in slots.items():
            named = self._projections(source, path, sides)
            swapped = self._swapped(source, path, named)
            experts[path] = {}
            for projection, slot in named.items():
                parameter = f"{path}.{parameter_name(source.base, source.config, path, projection)}"
                E, r, K, N = source.stacked_sizes(path, slot, source.rank(parameter))
                sizes = (E, r, N, K) if swapped[projection] else (E, r, K, N)
                load = self._loader(source, slot, (E, r), layout, swapped[projection])
                experts[path][projection] = source.pair(
                    path, projection, sizes, source.scaling(parameter), slot["A"], load
                )
            if any(swapped.values()):
                name = "peft_legacy"
                notes = (
                    *notes,
                    "in and out are swapped, as PEFT before 0.19.1 stored them; they are swapped back",
                )
        return name, experts, tuple(dict.fromkeys(notes))

    @staticmethod
    def _b_layout(source) -> tuple[str, tuple[str, ...]]:
        """Which order B is in: PEFT's own, unless the file was written by a program that had another."""
        if source.b_layout not in B_LAYOUTS:
            raise AdapterError(f"b_layout must be one of {B_LAYOUTS}, got {source.b_layout!r}.")
        marker = source.config.get("lora_B_layout")
        if source.b_layout != "auto":
            return source.b_layout, (f"B was read {source.b_layout}, as told",)
        if marker in B_LAYOUTS[1:]:
            return marker, (f"B was read {marker}, as adapter_config.json says",)
        if marker is not None:
            raise RefusedError(
                f"{source.file.path}: adapter_config.json says lora_B_layout={marker!r}, which is not known; say how "
                "B is ordered with b_layout (--b-layout rank_major or expert_major)."
            )
        mapping, base = (
            source.config.get("auto_mapping") or {},
            source.config.get("base_model_name_or_path") or "",
        )
        if mapping.get("unsloth_fixed") or "unsloth" in base.lower():
            raise RefusedError(
                f"{source.file.path} looks like Unsloth's and does not say how its lora_B is ordered: releases before "
                "September 2026 trained it expert-major, later ones rank-major, and the shapes are the same. Say "
                "which with b_layout (--b-layout expert_major or rank_major)."
            )
        return "rank_major", ()

    @staticmethod
    def _projections(source, path, sides) -> dict[str, dict]:
        """projection -> slot; a single target always has the outer key, whichever it is."""
        if len(sides) == 2:
            return {"gate_up": sides[".base_layer"], "down": sides[None]}
        if None not in sides:
            raise AdapterError(
                f"{source.file.path}: {path} has base_layer.lora_A but no lora_A; the file is damaged."
            )
        slot, targets = sides[None], source.config.get("target_parameters") or []
        named = {
            projection
            for t in targets
            for projection, names in PARAMETERS.items()
            if t.split(".")[-1] in names
        }
        if len(named) != 1 and source.base is not None and path in source.base.experts:
            shapes = (source.info(slot["A"]).shape[1], source.info(slot["B"]).shape[0])
            layout = source.base.experts[path]
            sizes = {
                n: (layout.projection(n).in_features, layout.projection(n).out_features)
                for n in PROJECTIONS
            }
            named = {n for n, size in sizes.items() if shapes in (size, size[::-1])}
        if len(named) != 1:
            raise RefusedError(
                f"{source.file.path}: {path} has one adapted projection, and neither target_parameters={targets!r} "
                "nor the shapes tell whether it is gate_up or down; write the one it is into target_parameters of its "
                "adapter_config.json."
            )
        return {named.pop(): slot}

    def _swapped(self, source, path, named) -> dict[str, bool]:
        """projection -> whether in and out are swapped: by the shapes, where they coincide by the version.

        Raises:
            RefusedError: where nothing decides.
        """
        sizes = {
            n: (source.info(slot["A"]).shape[-1], source.info(slot["B"]).shape[0])
            for n, slot in named.items()
        }
        fits = self._fits(source, path, sizes)
        if not all(fits.values()):
            whose = (
                f" of {source.base.name}"
                if source.base
                else " (name the base model to be sure: --base-config)"
            )
            raise AdapterError(
                f"{source.file.path}: {path} has A and B of {sizes} (in, out), which is no experts projection{whose}; "
                "the adapter is for another model, or damaged."
            )
        certain = {n: next(iter(fit)) for n, fit in fits.items() if len(fit) == 1}
        version = str(source.config.get("peft_version") or "")
        release = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
        # 0.19.0 swapped some projections and others not, so there one says nothing of another
        if len(certain) == len(fits) or (
            release[:3] != (0, 19, 0) and len(set(certain.values())) == 1
        ):
            return {n: certain.get(n, next(iter(certain.values()))) for n in fits}
        if not certain and release and release[:3] != (0, 19, 0):
            return dict.fromkeys(fits, release < (0, 19, 1))
        raise RefusedError(
            f"{source.file.path}: the shapes of {path}, {sizes} (in, out), do not tell whether PEFT swapped in and "
            f"out as it did before 0.19.1, and peft_version={version or None!r} does not either; write the PEFT "
            "version that saved the adapter into peft_version of its adapter_config.json, or name the base model "
            "(--base-config)."
        )

    @staticmethod
    def _fits(source, path, sizes) -> dict[str, set[bool]]:
        """projection -> what its (in, out) can be: right (False), swapped (True), both or neither."""
        if source.base is not None and path in source.base.experts:
            layout, fits = source.base.experts[path], {}
            for n, size in sizes.items():
                right = (layout.projection(n).in_features, layout.projection(n).out_features)
                # stacks stored [E, K, N] were never swapped
                fits[n] = {
                    wrong for wrong in (False, True) if size == (right[::-1] if wrong else right)
                }
                fits[n] -= {True} if layout.transposed else set()
            return fits
        if len(sizes) < 2:
            return {n: {False, True} for n in sizes}
        (K, N), (width, H) = sizes["gate_up"], sizes["down"]
        right, swapped = K == H and N in (width, 2 * width), N == width and K in (H, 2 * H)
        return {
            n: {wrong for wrong, fit in ((False, right), (True, swapped)) if fit} for n in sizes
        }

    @staticmethod
    def _loader(source, slot, expert_sizes, layout, swapped):
        E, r = expert_sizes

        def load():
            A = source.load(slot["A"]).unflatten(0, (E, r))  # [E, r, in]
            B = source.load(slot["B"])
            if layout == "rank_major":
                B = B.unflatten(1, (r, E)).permute(2, 0, 1)  # [E, out, r]
            else:
                B = B.unflatten(1, (E, r)).permute(1, 0, 2)
            # PEFT 0.18 builds the delta as [in, out]: (B A)^T = A^T B^T
            return (B.mT, A.mT) if swapped else (A, B)

        return load

    def block(self, adapter, path, projection, pair):
        def make():
            A, B = pair.load()
            yield A.flatten(0, 1)
            yield B.permute(1, 2, 0).flatten(1)  # [N, r, E] -> [N, r*E]

        E, r, K, N = pair.num_experts, pair.r, pair.in_features, pair.out_features
        inner = ".base_layer" if projection == "gate_up" and len(adapter.experts[path]) == 2 else ""
        keys = (f"{PREFIX}{path}{inner}.lora_{side}.weight" for side in "AB")
        return Block(dict(zip(keys, ((E * r, K), (N, r * E)), strict=True)), pair.dtype, make)

    def config(self, adapter):
        parameters = {
            f"{path}.{parameter_name(adapter.base, adapter.config, path, n, pairs)}": pair
            for path, pairs in adapter.experts.items()
            for n, pair in pairs.items()
        }
        # PEFT adapts a router by its parameter
        linears = {path: layer for path, layer in adapter.linears.items() if not layer.bare}
        parameters |= {
            f"{path}.weight": layer for path, layer in adapter.linears.items() if layer.bare
        }
        return LoraConfig(
            **common_fields(adapter, {**parameters, **linears}),
            target_modules=short_names(adapter, linears),
            target_parameters=short_names(adapter, parameters),
        )


class Vllm3d(Peft):
    """`peft` for vLLM's 3-D models: one rank, one scaling, both projections everywhere, nothing saved whole."""

    name = "vllm_3d"
    uniform = whole = True

    def prepare(self, adapter):
        if adapter.carried:
            raise RefusedError(
                f"vLLM refuses adapters with modules_to_save, this one holds {adapter.carried[0]}."
            )
        if max(layer.r for layer in adapter.layers()) > VLLM_RANKS[-1]:
            raise RefusedError(
                f"vLLM takes ranks up to {VLLM_RANKS[-1]}, this adapter has {max(p.r for p in adapter.layers())}; "
                "merge it into the base model instead (peft-moe-lora merge)."
            )
        if adapter.base is not None and adapter.base.model_type not in VLLM_3D:
            return adapter.noted(
                f"vLLM is not known to read {adapter.base.model_type} in 3-D and would not say so; check that its "
                "class has is_3d_moe_weight, or convert to per_expert"
            )
        return adapter


# -------------------------------------------------------------------------------------------------------- per expert


class PerExpert(Format):
    """`<experts>.{e}.gate_proj|up_proj|down_proj.lora_A/B.weight`, [r, K] and [N, r]; gate and up share A."""

    name = "per_expert"
    uniform = whole = True
    key = re.compile(
        r"(?P<path>.*\bexperts)\.(?P<expert>\d+)\.(?P<slot>gate_proj|up_proj|down_proj|w1|w2|w3)"
        r"\.lora_(?P<side>[AB])\.weight"
    )
    leaves: ClassVar = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}

    def slot(self, match):
        return int(match["expert"]), self.leaves.get(match["slot"], match["slot"])

    def read(self, source, slots):
        base = need_base(
            source.base,
            "per-expert tensors are put together in the order of the base's gate_up_proj",
        )
        experts, notes = {}, ()
        for path, found in slots.items():
            if path not in base.experts:
                raise AdapterError(
                    f"{source.file.path} adapts {path}, which is no experts module of {base.name}."
                )
            layout = base.experts[path]
            leaves = sorted({leaf for _, leaf in found})
            missing = [
                (e, leaf)
                for e in range(layout.num_experts)
                for leaf in leaves
                if (e, leaf) not in found
            ]
            beyond = sorted({e for e, _ in found if e >= layout.num_experts})
            if (
                missing
                or beyond
                or (layout.gated and ("gate_proj" in leaves) != ("up_proj" in leaves))
            ):
                what = (f"misses {missing[0][1]} of expert {missing[0][0]} and {len(missing) - 1} more" if missing else
                        f"has experts {beyond}" if beyond else "has one of gate_proj and up_proj only")  # fmt: skip
                raise AdapterError(
                    f"{source.file.path}: {path} {what}; the model has {layout.num_experts} experts."
                )
            experts[path] = {}
            if "up_proj" in leaves:
                parts = ("gate_proj", "up_proj") if layout.gated else ("up_proj",)
                experts[path]["gate_up"] = self._pair(source, path, "gate_up", found, parts)
            if "down_proj" in leaves:
                experts[path]["down"] = self._pair(source, path, "down", found, ("down_proj",))
        if any(
            "gate_up" in p and p["gate_up"].r == 2 * source.rank(f"{path}.0.gate_proj")
            for path, p in experts.items()
        ):
            notes = ("gate and up have A's of their own: put together at twice the rank, exactly",)
        return self.name, experts, notes

    def _pair(self, source, path, projection, found, parts) -> Pair:
        E = source.base.experts[path].num_experts
        r, scaling = source.rank(f"{path}.0.{parts[0]}"), source.scaling(f"{path}.0.{parts[0]}")
        K = source.info(found[0, parts[0]]["A"]).shape[-1]
        width = source.info(found[0, parts[0]]["B"]).shape[0]
        for (e, leaf), slot in found.items():
            shapes = source.info(slot["A"]).shape, source.info(slot["B"]).shape
            if leaf in parts and shapes != ((r, K), (width, r)):
                raise AdapterError(
                    f"{source.file.path}: {path}, {leaf} of expert {e} has A and B of {[list(s) for s in shapes]}, "
                    f"not {[[r, K], [width, r]]} (r={r} of adapter_config.json, expert 0's sizes)."
                )
            if source.scaling(f"{path}.{e}.{leaf}") != scaling and leaf in parts:
                raise RefusedError(
                    f"{source.file.path}: {path}, {leaf} of expert {e} has a scaling of its own."
                )
        shared = len(parts) == 1 or all(
            torch.equal(source.load(found[e, parts[0]]["A"]), source.load(found[e, parts[1]]["A"]))
            for e in range(E)
        )
        rows = source.base.gate_and_up(path) if len(parts) == 2 else (slice(None),)

        def load():
            rank = r if shared else 2 * r
            A = torch.empty(E, rank, K, dtype=source.info(found[0, parts[0]]["A"]).dtype)
            B = torch.zeros(E, width * len(parts), rank, dtype=A.dtype)
            for e in range(E):
                for i, part in enumerate(parts):
                    at = slice(0, r) if shared else slice(i * r, (i + 1) * r)
                    A[e, at] = source.load(found[e, part]["A"])
                    B[e, rows[i], at] = source.load(found[e, part]["B"])
            return A, B

        sizes = (E, r if shared else 2 * r, K, width * len(parts))
        return source.pair(path, projection, sizes, scaling, found[0, parts[0]]["A"], load)

    def prepare(self, adapter):
        need_base(
            adapter.base, "gate and up lie in its gate_up_proj as the model's family has them"
        )
        for path, pairs in adapter.experts.items():
            if "gate_up" in pairs and adapter.base.experts[path].gated:
                adapter.base.gate_and_up(path)
        return adapter.noted(*refusals_elsewhere(adapter))

    def block(self, adapter, path, projection, pair):
        layout, names = adapter.base.experts[path], adapter.base.hub_names
        parts, rows = (names.down,), (slice(None),)
        if projection == "gate_up":
            parts, rows = (names.up,), (slice(None),)
            if layout.gated:
                parts, rows = (names.gate, names.up), adapter.base.gate_and_up(path)

        def make():
            A, B = pair.load()
            for e in range(pair.num_experts):
                for row in rows:
                    yield A[e]
                    yield B[e, row]

        shapes = {}
        for e in range(pair.num_experts):
            for part in parts:
                key = self.rename(adapter, f"{path}.{e}.{part}")
                shapes[f"{key}.lora_A.weight"] = (pair.r, pair.in_features)
                shapes[f"{key}.lora_B.weight"] = (pair.out_features // len(parts), pair.r)
        return Block(shapes, pair.dtype, make)

    def config(self, adapter):
        names, projections = adapter.base.hub_names, next(iter(adapter.experts.values()))
        gated = next(iter(adapter.base.experts.values())).gated
        parts = ([names.gate] if gated else []) + [names.up] if "gate_up" in projections else []
        parts += [names.down] if "down" in projections else []
        return LoraConfig(
            **common_fields(adapter, adapter.linears),
            target_modules=[*parts, *short_names(adapter, adapter.linears)],
        )

    def rename(self, adapter, key):
        return PREFIX + adapter.base.hub_names.to_hub(key)


# ------------------------------------------------------------------------------------------------------------- SGLang


class Sglang3d(Format):
    """`<experts>.gate_up_proj.lora_A/B.weight` and `down_proj`, [E, r, K] and [E, N, r]; scaled by lora_alpha / r."""

    name = "sglang_3d"
    uniform = whole = True
    key = re.compile(
        r"(?P<path>.*\bexperts)\.(?P<slot>gate_up_proj|up_proj|down_proj)\.lora_(?P<side>[AB])(\.weight)?"
    )

    def read(self, source, slots):
        experts = {}
        for path, found in slots.items():
            experts[path] = {}
            for leaf, slot in sorted(found.items(), key=lambda item: item[0] == "down_proj"):
                A, B = source.info(slot["A"]).shape, source.info(slot["B"]).shape
                r, scaling = source.rank(f"{path}.{leaf}"), source.scaling(f"{path}.{leaf}")
                if len(A) != 3 or len(B) != 3 or (A[0], A[1]) != (B[0], r) or B[2] != r:
                    raise AdapterError(
                        f"{source.file.path}: {slot['A']} {list(A)} and {slot['B']} {list(B)} are no A [E, r, K] and "
                        f"B [E, N, r] for r={r} of adapter_config.json."
                    )
                projection = "down" if leaf == "down_proj" else "gate_up"
                load = self._loader(source, slot)
                experts[path][projection] = source.pair(
                    path, projection, (A[0], r, A[2], B[1]), scaling, slot["A"], load
                )
        return self.name, experts, ()

    @staticmethod
    def _loader(source, slot):
        return lambda: (source.load(slot["A"]), source.load(slot["B"]))

    def prepare(self, adapter):
        if adapter.carried:
            raise RefusedError(
                f"SGLang does not load modules saved whole, this adapter holds {adapter.carried[0]}."
            )
        if adapter.base is None or any(adapter.base.interleaved[path] for path in adapter.experts):
            need_base(
                adapter.base,
                "SGLang reads gate_up as [gate; up], so the base's order has to be known",
            )
            raise RefusedError(
                f"{adapter.base.model_type} alternates gate and up rows, SGLang's 3-D reader takes [gate; up]; "
                "convert to per_expert instead."
            )
        lonely = _query_without_value(adapter)
        if lonely is not None:
            raise RefusedError(
                f"SGLang does not load q_proj without v_proj, as {lonely} has it; train both, or convert without it."
            )
        return adapter

    def block(self, adapter, path, projection, pair):
        def make():
            yield from pair.load()

        leaf = "down_proj" if projection == "down" else "gate_up_proj"
        E, r, K, N = pair.num_experts, pair.r, pair.in_features, pair.out_features
        keys = (f"{PREFIX}{path}.{leaf}.lora_{side}.weight" for side in "AB")
        return Block(dict(zip(keys, ((E, r, K), (E, N, r)), strict=True)), pair.dtype, make)

    def config(self, adapter):
        return LoraConfig(
            **common_fields(adapter, adapter.linears),
            target_modules=["gate_up_proj", "down_proj", *short_names(adapter, adapter.linears)],
        )


FORMATS: dict[str, Format] = {
    f.name: f for f in (MoELora(), Peft(), PerExpert(), Vllm3d(), Sglang3d())
}
# what an adapter's keys are held against, the most telling first; vllm_3d has the keys of peft
READERS = [FORMATS[name] for name in ("moe_lora", "per_expert", "sglang_3d", "peft")]


# ------------------------------------------------------------------------------------------- what the formats share


def peft_reads_per_expert(model_type: str) -> bool | None:
    """Whether PEFT puts a family's per-expert tensors together on loading; None where this PEFT does not say."""
    try:
        from peft.utils.transformers_weight_conversion import (
            _MODEL_TO_CONVERSION_PATTERN,
            _MOE_FUSED_TARGETS,
        )
    except ImportError:
        return None
    return _MODEL_TO_CONVERSION_PATTERN.get(model_type) in _MOE_FUSED_TARGETS


def _query_without_value(adapter: Adapter) -> str | None:
    blocks: dict[str, set[str]] = defaultdict(set)
    for path in adapter.linears:
        block, _, last = path.rpartition(".")
        blocks[block].add(last)
    return next(
        (block for block, names in blocks.items() if "q_proj" in names and "v_proj" not in names),
        None,
    )


def refusals_elsewhere(adapter: Adapter) -> Iterator[str]:
    """What one of the several readers of per-expert adapters would refuse or ignore, though others take it."""
    if peft_reads_per_expert(adapter.base.model_type) is False:
        yield f"PEFT does not read per-expert tensors of {adapter.base.model_type}, it ignores them; give it --to peft"
    if adapter.base.model_type in VLLM_3D:
        yield (
            f"vLLM reads {adapter.base.model_type} in 3-D: convert to vllm_3d, or serve with "
            "--enable-mixed-moe-lora-format and is_3d_lora_weight false"
        )
    if adapter.carried:
        yield f"vLLM and SGLang refuse adapters with modules_to_save ({adapter.carried[0]}); PEFT loads this one"
    if max(layer.r for layer in adapter.layers()) > VLLM_RANKS[-1]:
        yield f"vLLM takes ranks up to {VLLM_RANKS[-1]}"
    lonely = _query_without_value(adapter)
    if lonely is not None:
        yield f"SGLang does not load q_proj without v_proj ({lonely})"

"""The study of ranks and rates: every variant can be run, and the page has what was measured."""

import json
import statistics

import pytest
import torch

import study
from helpers.scripts import ROOT
from texts import documentation
from tiny import make_model, make_tokenizer

RESULTS = ROOT / "docs" / "study.json"
PAGE = ROOT / "docs" / "choosing-rank.md"
BEGIN, END = "<!-- made by examples/study.py -->\n", "<!-- end -->\n"


@pytest.fixture(autouse=True)
def _short_texts(monkeypatch):
    """A part of both texts: reading all of them takes longer than the runs."""
    short = documentation()[:40]
    monkeypatch.setattr(study, "documentation", lambda: short)
    monkeypatch.setattr(study, "standard_library", lambda: short[::-1])
    monkeypatch.setattr(study, "EVAL_BLOCKS", 2)
    study.read_data.cache_clear()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny model that was not pretrained, with its tokenizer."""
    folder = tmp_path_factory.mktemp("study") / "base"
    tokenizer = make_tokenizer(documentation()[:50])
    torch.manual_seed(0)
    make_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# a variant of each name, at one of its rates
KINDS = {variant.name: variant for variant in study.VARIANTS if variant.group != "rank"}


def test_every_kind_of_variant_trains_what_it_says(base):
    found = {name: study.run(base, variant, 0, 2) for name, variant in KINDS.items()}
    for row in found.values():
        assert 0 < row["new"] < 10
        assert 0 < row["old"] < 10
    of_name = {name: row["parameters"] for name, row in found.items()}
    experts, attention = of_name["experts"], of_name["attention"]
    assert of_name["experts, attention"] == experts + attention
    assert of_name["4 of 8 experts"] == experts / 2
    assert of_name["experts r / top_k, attention"] == experts / 2 + attention
    assert of_name["experts r / E, attention"] == experts / 8 + attention
    assert of_name["experts, attention, routers"] > experts + attention


def test_scalings_are_those_of_the_variants(base):
    data = study.read_data(base)
    for variant in KINDS.values():
        model = study.adapted(base, variant, data)
        expected = variant.alpha / variant.r
        if variant.rslora:
            expected = variant.alpha / variant.r**0.5
        scalings = {
            name: module.scaling["default"]
            for name, module in model.named_modules()
            if "default" in getattr(module, "lora_A", ())
        }
        assert scalings
        assert sorted(set(scalings.values())) == pytest.approx([expected]), variant


def test_the_table_takes_the_better_rate_by_the_mean_of_the_seeds():
    rows = [
        {"group": "g", "name": "n", "rate": rate, "parameters": 5, "new": new, "old": 3.0}
        for rate, new in ((0.1, 1.0), (0.1, 4.0), (0.2, 2.0), (0.2, 2.2))
    ]
    assert study.table(rows).splitlines()[2:] == ["| g | n | 5 | 0.2 | 2.100 (0.200) | 3.000 |"]


def test_the_page_has_the_results():
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    text = PAGE.read_text(encoding="utf-8")
    assert BEGIN + study.table(found["rows"]) + "\n" + END in text
    assert f"({found['date']})" in text
    before = found["before"]
    said = f"{before['new']:.2f} on the new text and {before['old']:.2f} on the old"
    assert said in text
    seeds = {row["seed"] for row in found["rows"]}
    assert f"with {len(seeds)} seeds" in text
    runs = {study.key_of(row) for row in found["rows"]}
    assert len(runs) == len(found["rows"]) == len(seeds) * len(study.VARIANTS)


def test_what_the_page_says_follows_from_the_results():
    """Its sentences, as comparisons of means at the better rate."""
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    losses: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        losses.setdefault(row["name"], {}).setdefault(row["rate"], []).append(row["new"])
    best = {
        name: min(statistics.mean(found) for found in rates.values())
        for name, rates in losses.items()
    }
    seeds = 0.06
    assert best["r = 1"] > best["r = 2"] > best["r = 4"] > best["r = 8"]
    assert max(best[f"r = {r}"] for r in (8, 16, 32)) - best["r = 32"] < seeds
    assert best["experts, attention"] == min(best.values())
    assert best["experts"] < best["attention"]
    for r in (1, 2, 4, 8, 16):
        rates = losses[f"r = {r}"]
        assert min(rates, key=lambda rate: statistics.mean(rates[rate])) == 0.01
    divided = [row for row in rows if row["name"] == "experts r / top_k, attention"]
    whole = [row for row in rows if row["name"] == "experts, attention"]
    assert best["experts r / top_k, attention"] - best["experts, attention"] < seeds
    assert round(100 * divided[0]["parameters"] / whole[0]["parameters"]) == 57
    before = json.loads(RESULTS.read_text(encoding="utf-8"))["before"]["old"]
    assert all(row["old"] > before for row in rows)

"""benchmarks/published.py: time and error of each route, and other projects' where measured."""

import layer
from published import NOT_MEASURED, published, published_table, read_peers
from report import markdown_table
from roofline import Ceilings

PEERS = {
    "machine": "a card",
    "date": "2026-01-02",
    "rows": [
        {
            "peer": "theirs",
            "version": "1.2",
            "config": "small",
            "T": 64,
            "r": 16,
            "step": 3.456,
            "err": 0.004,
            "edx": 0.005,
        }
    ],
}


def row(**changes) -> dict:
    """A row of the layer benchmark."""
    usual = {
        "config": "small",
        "T": 64,
        "r": 16,
        "peer": "moe_lora",
        "dtype": "bfloat16",
        "skew": 0.0,
        "roof": 1.0,
        "step": 2.344,
        "errors": {"out": 1e-3, "d x": 2e-3},
        "failed": None,
    }
    return usual | changes


def test_each_route_has_its_time_and_its_largest_error():
    rows = [
        row(),
        row(peer="peft", step=9.0, errors={"out": 3e-3}),
        row(r=32),
        row(peer="peft", r=32, step=None, failed="wrong out"),
        row(T=128),
    ]
    ours = "2.34 (2.0e-03)"
    theirs = "3.46 (5.0e-03), 1.2"
    assert published_table(rows, PEERS) == markdown_table(
        ["shape", "T", "r", "roof", "moe_lora", "peft", "theirs"],
        [
            ["small", "64", "16", "1.00", ours, "9.00 (3.0e-03)", theirs],
            ["small", "64", "32", "1.00", ours, "failed: wrong out", NOT_MEASURED],
            ["small", "128", "16", "1.00", ours, NOT_MEASURED, NOT_MEASURED],
        ],
    )


def test_others_are_not_put_beside_another_dtype_or_routing():
    for changes in ({"dtype": "float32"}, {"skew": 0.9}):
        assert "3.46" not in published_table([row(**changes)], PEERS)


def test_the_file_of_others_has_one_newest_number_for_each_case():
    peers = read_peers()
    assert {row["peer"] for row in peers["rows"]} == {"axolotl", "unsloth_zoo"}
    keys = [(row["peer"], row["config"], row["T"], row["r"]) for row in peers["rows"]]
    assert len(set(keys)) == len(keys)
    assert ("unsloth_zoo", "qwen3-30b", 8192, 16) in keys
    text = published("A title", [row(config="qwen3-30b", T=8192)])
    assert text.startswith("A title.\n")
    assert peers["date"] in text
    assert "| 6.75 (6.4e-03), 2026.10.9 |" in text
    assert "| 8.98 (5.2e-03), 2026-07 |" in text


def test_the_layer_benchmark_writes_the_table(monkeypatch, tmp_path):
    monkeypatch.setattr(layer, "measure_ceilings", lambda timer, probe: Ceilings(1e11, 1e10))
    path = tmp_path / "layer.md"
    words = "--device cpu --shapes 6,64,32,2 --tokens 40 --rank 4 --repeat 2 --routes torch"
    assert layer.main([*words.split(), "--markdown", str(path)]) == 0
    *_, last = path.read_text().splitlines()
    assert last.startswith("| 6,64,32,2 | 40 | 4 | ")
    assert last.endswith(f"e-07) | {NOT_MEASURED} | {NOT_MEASURED} |")

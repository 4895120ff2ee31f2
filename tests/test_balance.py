"""The claim of docs/balance.md on one of its sets, and that the page's table is of the orders that the example has."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from diffprune.choosing import choose

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def balance():
    spec = importlib.util.spec_from_file_location("balance", ROOT / "examples/balance.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.FINE, module.ROUNDS = 60, 10
    return module


def test_equal_shares_raise_the_rarer_classes_without_labels(balance):
    points, labels, table, _ = balance.skewed_set(0)
    assert "label" not in table.column_names
    assert np.bincount(labels).max() == 500 and np.bincount(labels).min() == 50
    count = round(0.1 * len(labels))

    def rarer(order: str, **arguments) -> float:
        rows = [choose(table, order, count, seed=seed, embeddings=points, **arguments) for seed in range(4)]
        return float(np.mean([balance.shares(labels[found])[0] for found in rows]))

    random = rarer("random")
    assert rarer("equal", within="random") > random + 0.01
    assert rarer("balanced", within="random") > random + 0.01
    assert rarer("cluster-random") < rarer("equal", within="random")


def test_the_page_says_how_far_runs_lie_apart(balance, monkeypatch, capsys):
    """One clustering of each set gave another table with every change of k-means' start."""
    monkeypatch.setattr(balance, "ORDERS", {"random": {"order": "random"}})
    one = balance.skewed_set(0)
    monkeypatch.setattr(balance, "skewed_set", lambda rotation, seed: one)
    balance.main()
    page = (ROOT / "docs/balance.md").read_text().splitlines()
    header, line, _, random = capsys.readouterr().out.splitlines()
    assert header in page and line in page
    assert random.count("±") == 3 and random.endswith("| 25 |")
    assert all(row.count("±") == 3 for row in page if row.startswith(("| equal", "| two levels")))


def test_the_page_holds_a_row_per_order(balance):
    lines = (ROOT / "docs/balance.md").read_text().splitlines()
    rows = [line.split("|")[1].strip() for line in lines if line.startswith("| ") and "kept by" not in line]
    assert rows == ["all samples", *balance.ORDERS]

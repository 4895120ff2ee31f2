"""``select_rows``: of arrays, against ``select`` on tables of the same values, and against plain Python."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch

import diffprune
from diffprune import InputError, select_rows
from diffprune.choosing import choose

N, D, K = 240, 12, 5
RNG = np.random.default_rng(3)
POINTS = RNG.standard_normal((N, D)).astype(np.float32)
POINTS[200:] = POINTS[:40] * 1.5  # the same directions again
CLUSTER = (POINTS[:, 0] > 0).astype(np.int64) * 2 + (POINTS[:, 1] > 0) + 7  # copies lie with theirs
COLUMNS = {
    "grand": RNG.integers(0, 30, N) / 4,
    "el2n": RNG.random(N),
    "cluster": CLUSTER,
    "distance": RNG.random(N),
    "label": RNG.integers(0, 3, N),
}
KEYS = [f"{number:05d}" for number in RNG.permutation(N)]

ORDERS = [
    {"by": "grand", "prune": 0.5},
    {"order": "lowest", "by": "grand + -el2n", "keep": 0.3},
    {"order": "middle", "by": "grand & label", "count": 33},
    {"order": "random", "seed": 5, "count": 60},
    {"order": "random", "per": "label", "quota": {"0": 5, "*": 7}},
    {"order": "cluster-nearest", "prune": 0.75},
    {"order": "balanced", "within": "highest:el2n", "count": 40},
    {"order": "equal", "count": 99},
    {"order": "drop-clusters", "count": 70},
    {"order": "equal", "per": "label", "shares": "equal", "count": 60},
]
DIVERSE = [
    {"order": "k-center", "count": 25},
    {"order": "herding", "count": 25},
    {"order": "cluster-herding", "count": 25},
    {"dedup": 0.05},
    {"dedup": 0.05, "dedup_keep": "nearest", "order": "equal", "count": 50},
]


@pytest.mark.parametrize("keys", [None, KEYS])
@pytest.mark.parametrize("asked", ORDERS + DIVERSE, ids=str)
def test_arrays_and_tables_are_chosen_from_alike(asked, keys):
    names = keys or [f"{row:012d}" for row in range(N)]
    table = pa.table({"key": names, "status": ["ok"] * N} | COLUMNS)
    points = POINTS if asked in DIVERSE else None
    rows = select_rows(COLUMNS, keys=keys, embeddings=points, **asked)
    told = {name: value for name, value in asked.items() if name not in ("keep", "prune", "count")}
    fraction = asked.get("keep", 1 - asked.get("prune", 1))
    count = asked.get("count", round(N * fraction) or None)
    assert rows.tolist() == choose(table, told.pop("order", "highest"), count, embeddings=points, **told).tolist()
    assert rows.dtype == np.int64


def test_highest_keeps_what_sorting_does_and_ties_go_to_the_earlier_row():
    expected = sorted(sorted(range(N), key=lambda row: (-COLUMNS["grand"][row], row))[:50])
    assert select_rows(COLUMNS, by="grand", count=50).tolist() == expected


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_near_duplicates_are_those_of_all_pairs(dtype):
    points = POINTS.astype(dtype)
    fitted = diffprune.KMeans(K, metric="cosine").fit(points)
    columns = {"cluster": fitted.assignment_, "distance": fitted.distance_}
    unit = points.astype(np.float64) / np.linalg.norm(points.astype(np.float64), axis=1, keepdims=True)
    kept = []
    for row in range(N):
        earlier = [
            other
            for other in np.flatnonzero(fitted.assignment_ == fitted.assignment_[row])
            if (-fitted.distance_[other], other) < (-fitted.distance_[row], row)
        ]
        if not (unit[earlier] @ unit[row] > 0.95).any():
            kept.append(row)
    assert select_rows(columns, embeddings=points, dedup=0.05).tolist() == kept and len(kept) <= 200


def test_k_center_covers_as_farthest_first_does():
    rows = select_rows(embeddings=POINTS, order="k-center", count=30)
    gaps = np.linalg.norm(POINTS[:, None] - POINTS[rows], axis=2).min(axis=1)
    for first in range(N):  # the traversal from one of the rows
        chosen = [first]
        while len(chosen) < 30:
            chosen.append(int(np.linalg.norm(POINTS[:, None] - POINTS[chosen], axis=2).min(axis=1).argmax()))
        if sorted(chosen) == rows.tolist():
            break
    else:
        pytest.fail("no farthest-first traversal has these rows")
    assert gaps.max() <= np.linalg.norm(POINTS[rows][:, None] - POINTS[rows], axis=2)[np.triu_indices(30, 1)].min()


def test_torch_lists_and_other_dtypes_are_the_same_values():
    expected = select_rows(COLUMNS, by="grand & label", count=40)
    for change in (
        torch.from_numpy,
        list,
        lambda values: torch.from_numpy(values).requires_grad_(values.dtype == float),
    ):
        assert np.array_equal(
            select_rows({n: change(v) for n, v in COLUMNS.items()}, by="grand & label", count=40), expected
        )
    half = COLUMNS["grand"].astype(np.float16)  # holds them exactly
    bfloat = torch.from_numpy(COLUMNS["grand"]).bfloat16()
    for grand in (half, bfloat, COLUMNS["grand"].astype(">f8")):
        assert np.array_equal(select_rows(COLUMNS | {"grand": grand}, by="grand & label", count=40), expected)
    bits = torch.from_numpy(POINTS).bfloat16()
    chosen = select_rows(embeddings=bits, order="k-center", count=9)
    assert np.array_equal(chosen, select_rows(embeddings=bits.float().numpy(), order="k-center", count=9))


def test_keys_that_end_in_a_nul_stay_apart():
    assert select_rows({"a": [1.0, 2.0]}, keys=["x", "x\0"], by="a", count=1).tolist() == [1]


def test_the_rows_of_a_key_do_not_depend_on_their_place():
    shuffled = np.random.default_rng(0).permutation(N)
    for asked in ORDERS:
        rows = select_rows(COLUMNS, keys=KEYS, **asked)
        moved = {name: values[shuffled] for name, values in COLUMNS.items()}
        other = select_rows(moved, keys=[KEYS[row] for row in shuffled], **asked)
        assert sorted(shuffled[other].tolist()) == rows.tolist(), asked


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "with a row for each sample, got none"),
        ({"columns": {"a": [1, 2], "b": [1.0]}, "by": "a"}, "got a 2, b 1"),
        ({"columns": {"a": np.zeros((2, 1))}, "by": "a"}, r"column 'a': expected \[2\]"),
        ({"columns": {"a": [1.0, np.nan]}, "by": "a"}, "1 of 2 samples .* first key '000000000001'"),
        ({"columns": {"a": [1.0, 2.0]}, "by": "b"}, "no score column 'b'"),
        ({"columns": {"a": [1.0, 2.0]}, "by": "a", "keys": ["x", "x"]}, "keys: 'x' stands in them twice"),
        ({"columns": {"a": [1.0, 2.0]}, "by": "a", "keys": [1, 2]}, "keys: expected texts, got int64"),
        ({"columns": {"size": [1.0, 2.0]}, "by": "size"}, "column 'size': the name has a meaning"),
        ({"columns": {"cluster": [0.5, 1.0]}, "order": "drop-clusters"}, "whole numbers, found 0.5"),
        ({"columns": {"a": []}, "by": "a"}, "arrays of length 0"),
        ({"columns": {"a": np.ma.array([1.0, 2.0], mask=[0, 1])}, "by": "a"}, "column 'a': expected an array without"),
        ({"columns": {"a": torch.zeros(2).to_sparse()}, "by": "a"}, "column 'a': expected an array: .*[Ss]parse"),
        ({"columns": {"a": [1, 2]}, "by": "a", "keys": ["x", "\ud800"]}, "keys: expected numbers or texts"),
        ({"columns": {"a": [1, 2]}, "by": "a", "keys": ["x", None]}, "keys: expected texts, got string with 1 missing"),
        (
            {"embeddings": np.ones((2, 3), np.complex64), "order": "herding"},
            "embeddings: expected numbers, got complex64",
        ),
        ({"columns": {"a": [{}, 1]}, "by": "a"}, "column 'a': expected numbers or texts"),
        ({"keys": ["x", "y"], "order": "herding"}, r"herding: works on embeddings: give embeddings=\[2, D\]"),
        ({"embeddings": np.zeros((2, 3)), "order": "random"}, "works on no embeddings"),
        ({"embeddings": np.array([[1.0, np.inf], [0, 1]]), "order": "herding"}, "1 rows hold NaN or infinity"),
        ({"embeddings": np.zeros(2), "order": "herding"}, r"embeddings: expected \[2, D\]"),
    ],
)
def test_what_does_not_fit_is_told(given, message):
    with pytest.raises(InputError, match=message):
        select_rows(**given, count=1)

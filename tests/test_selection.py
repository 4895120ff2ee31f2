from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffprune import diversity, orders
from diffprune.arrays import write_array
from diffprune.choosing import choose
from diffprune.errors import InputError
from diffprune.files import write_json
from diffprune.requests import ORDERS
from diffprune.selection import select
from diffprune.tables import base_table, table_metadata, write_table


def random_table(rng: np.random.Generator, size: int = 60, clusters: int = 4, failed: int = 5) -> pa.Table:
    """Rows in random key order; scores from few values, so that there are ties; failed rows have no scores."""
    status = rng.permutation(["failed"] * failed + ["ok"] * (size - failed)).tolist()
    ok = [s == "ok" for s in status]

    def column(values, kind):
        return pa.array([v if use else None for v, use in zip(values.tolist(), ok, strict=True)], kind)

    return pa.table(
        {
            "key": rng.permutation([f"k{i:04d}" for i in range(size)]).tolist(),
            "status": status,
            "loss": column(rng.integers(0, 12, size) / 4, pa.float64()),
            "cluster": column(
                rng.choice([3, 7, 8, 20][:clusters], size, p=[0.1, 0.2, 0.3, 0.4][:clusters]), pa.int32()
            ),
            "distance": column(rng.integers(0, 6, size) / 8, pa.float64()),
        }
    )


def ok_rows(table: pa.Table) -> list[dict]:
    return [{**row, "row": i} for i, row in enumerate(table.to_pylist()) if row["status"] == "ok"]


def keys_of(table: pa.Table, rows: np.ndarray) -> list[str]:
    return sorted(table["key"].take(pa.array(rows)).to_pylist())


@pytest.fixture
def table() -> pa.Table:
    return random_table(np.random.default_rng(0))


# --- rankings, against Python's sorted -------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 7, 54, 55])
def test_rankings_equal_a_sort_with_ties_by_key(table, count):
    rows = ok_rows(table)
    up = sorted(rows, key=lambda r: (r["loss"], r["key"]))
    down = sorted(rows, key=lambda r: (-r["loss"], r["key"]))
    start = (len(rows) - count) // 2
    for order, ranking in (("lowest", up[:count]), ("highest", down[:count]), ("middle", up[start : start + count])):
        got = choose(table, order, count, by="loss")
        assert got.dtype == np.int64
        assert got.tolist() == sorted(r["row"] for r in ranking)


# nanoseconds, hashes
@pytest.mark.parametrize("kind, least", [(np.int64, 2**63 - 99), (np.uint64, 2**63 - 99), (np.uint64, 2**64 - 99)])
def test_whole_numbers_that_float64_does_not_hold(table, kind, least):
    values = np.array(np.random.default_rng(3).integers(0, 50, table.num_rows), kind) + kind(least)
    table = table.append_column("stamp", pa.array(values))
    rows = ok_rows(table)
    up = sorted(rows, key=lambda r: (r["stamp"], r["key"]))
    assert set(keys_of(table, choose(table, "lowest", 20, by="stamp"))) == {row["key"] for row in up[:20]}
    down = sorted(rows, key=lambda r: (-r["stamp"], r["key"]))
    assert set(keys_of(table, choose(table, "highest", 20, by="stamp"))) == {row["key"] for row in down[:20]}
    of_each = choose(table, "random", per="stamp", quota={"*": 1})
    assert sorted(values[of_each].tolist()) == sorted({row["stamp"] for row in rows})
    missing = [None if i == rows[0]["row"] else value for i, value in enumerate(values.tolist())]
    holed = table.drop_columns(["stamp"]).append_column("stamp", pa.array(missing, pa.from_numpy_dtype(kind)))
    with pytest.raises(InputError, match="'stamp': 1 of 55 samples that did not fail have no score"):
        choose(holed, "lowest", 20, by="stamp")


def test_middle_drops_one_more_at_the_top():
    np.testing.assert_array_equal(orders.middle(np.array([5.0, 1.0, 4.0, 2.0, 3.0]), 2), [3, 4])


@pytest.mark.parametrize("order", ["random", "cluster-random", "drop-clusters"])
def test_random_choices_depend_on_seed_and_key_alone(table, order):
    kept = keys_of(table, choose(table, order, 20, seed=3))
    assert len(set(kept)) == 20
    shuffled = table.take(pa.array(np.random.default_rng(1).permutation(len(table))))
    assert keys_of(shuffled, choose(shuffled, order, 20, seed=3)) == kept
    others = [keys_of(table, choose(table, order, 20, seed=seed)) for seed in range(4, 12)]
    assert any(other != kept for other in others)


def test_random_is_the_highest_of_the_random_score(table):
    from diffprune.scores.random import random_scores

    column = random_scores(table["key"].to_pylist(), 5).numpy()
    scored = table.append_column("random", pa.array(column))
    assert choose(scored, "highest", 9, by="random").tolist() == choose(table, "random", 9, seed=5).tolist()


def test_random_is_uniform_and_nested(table):
    counts = {row["key"]: 0 for row in ok_rows(table)}
    for seed in range(200):
        fewer, more = (set(keys_of(table, choose(table, "random", n, seed=seed))) for n in (11, 22))
        assert fewer < more
        for key in fewer:
            counts[key] += 1
    assert sum(counts.values()) == 200 * 11
    spread = np.array(list(counts.values())) - 200 * 11 / 55
    assert np.abs(spread).max() < 5 * np.sqrt(200 * 0.2 * 0.8)


# --- clusters --------------------------------------------------------------------------------------------------


def quotas_by_largest_remainder(sizes: dict[int, int], count: int) -> dict[int, int]:
    total = sum(sizes.values())
    exact = {c: Fraction(n * count, total) for c, n in sizes.items()}
    quotas = {c: int(x) for c, x in exact.items()}
    for c in sorted(exact, key=lambda c: (-(exact[c] - quotas[c]), c))[: count - sum(quotas.values())]:
        quotas[c] += 1
    return quotas


def sizes_of(table: pa.Table) -> dict[int, int]:
    sizes: dict[int, int] = {}
    for row in ok_rows(table):
        sizes[row["cluster"]] = sizes.get(row["cluster"], 0) + 1
    return sizes


def ranked_in_clusters(table: pa.Table, quotas: dict[int, int], part: str, column: str) -> list[int]:
    rows = []
    for cluster, quota in quotas.items():
        members = [r for r in ok_rows(table) if r["cluster"] == cluster]
        sign = -1 if part in ("farthest", "highest") else 1
        members.sort(key=lambda r: (sign * r[column], r["key"]))
        start = (len(members) - quota) // 2 if part == "middle" else 0
        rows += [r["row"] for r in members[start : start + quota]]
    return sorted(rows)


@pytest.mark.parametrize("part", ["nearest", "farthest", "middle"])
@pytest.mark.parametrize("count", [1, 13, 40, 55])
def test_cluster_orders_give_each_cluster_its_share(table, part, count):
    quotas = quotas_by_largest_remainder(sizes_of(table), count)
    got = choose(table, f"cluster-{part}", count)
    assert got.tolist() == ranked_in_clusters(table, quotas, part, "distance")


def test_cluster_random_gives_each_cluster_its_share_and_needs_no_distance(table):
    table = table.drop_columns(["distance"])
    got = choose(table, "cluster-random", 21, seed=1)
    kept = dict.fromkeys(sizes_of(table), 0)
    for row in got.tolist():
        kept[table["cluster"][row].as_py()] += 1
    assert kept == quotas_by_largest_remainder(sizes_of(table), 21)


@pytest.mark.parametrize(
    ("within", "part", "column"),
    [
        ("nearest", "nearest", "distance"),
        ("farthest", "farthest", "distance"),
        ("middle", "middle", "distance"),
        ("highest:loss", "highest", "loss"),
        ("lowest:loss", "lowest", "loss"),
    ],
)
def test_balanced_and_equal_rank_inside_clusters(table, within, part, column):
    sizes = sizes_of(table)
    assert min(sizes.values()) >= 3
    by_size = sorted(sizes, key=lambda c: (-sizes[c], c))
    quotas = {c: 2 + (c in by_size[:3]) for c in sizes}
    for order in ("balanced", "equal"):
        got = choose(table, order, 11, within=within)
        assert got.tolist() == ranked_in_clusters(table, quotas, part, column)


def test_balanced_refuses_more_than_the_smallest_cluster_allows(table):
    most = len(sizes_of(table)) * min(sizes_of(table).values())
    assert len(choose(table, "balanced", most)) == most
    with pytest.raises(InputError, match=rf"at most {most}; ask for fewer, or use 'equal'"):
        choose(table, "balanced", most + 1)
    assert len(choose(table, "equal", most + 1)) == most + 1


@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), st.data())
@settings(max_examples=150, deadline=None)
def test_quotas_are_exact_and_fair(sizes, data):
    count = data.draw(st.integers(1, sum(sizes)))
    sizes = np.array(sizes)

    quotas = orders.equal_quotas(sizes, count)
    assert quotas.sum() == count
    assert (quotas <= sizes).all()
    poured = np.zeros_like(sizes)  # one at a time to the emptiest that has room; the last round: largest first
    level = 0
    while poured.sum() + (poured < sizes).sum() <= count and (poured < sizes).any():
        poured += poured < sizes
        level += 1
    for cluster in sorted(range(len(sizes)), key=lambda c: (-sizes[c], c))[: count - poured.sum()]:
        poured[cluster] += 1
    np.testing.assert_array_equal(quotas, poured)

    expected = quotas_by_largest_remainder(dict(enumerate(sizes.tolist())), count)
    np.testing.assert_array_equal(orders.proportional_quotas(sizes, count), list(expected.values()))

    if count <= len(sizes) * sizes.min():
        quotas = orders.balanced_quotas(sizes, count)
        assert quotas.sum() == count
        assert quotas.max() - quotas.min() <= 1
        assert (quotas <= sizes).all()


def test_equal_pours_what_small_clusters_lack_into_the_others():
    np.testing.assert_array_equal(orders.equal_quotas(np.array([2, 10, 9, 1]), 14), [2, 6, 5, 1])
    np.testing.assert_array_equal(orders.equal_quotas(np.array([2, 10, 9, 1]), 22), [2, 10, 9, 1])
    first = np.array([0.9, 0.1, 0.2, 0.8])  # the first and the last have no more to give
    np.testing.assert_array_equal(orders.equal_quotas(np.array([2, 10, 9, 1]), 14, first), [2, 5, 6, 1])


@pytest.mark.parametrize("count", [1, 20, 41, 55])
def test_drop_clusters_keeps_whole_clusters_and_one_in_part(table, count):
    for seed in range(6):
        got = choose(table, "drop-clusters", count, seed=seed)
        assert len(set(got.tolist())) == count
        kept: dict[int, int] = {}
        for row in got.tolist():
            assert table["status"][row].as_py() == "ok"
            kept[table["cluster"][row].as_py()] = kept.get(table["cluster"][row].as_py(), 0) + 1
        partial = [c for c, n in kept.items() if n < sizes_of(table)[c]]
        assert len(partial) <= 1


def test_drop_clusters_drops_other_clusters_for_other_seeds(table):
    kept = [
        frozenset(table["cluster"].take(pa.array(choose(table, "drop-clusters", 8, seed=s))).to_pylist())
        for s in range(20)
    ]
    assert set().union(*kept) == set(sizes_of(table))


# --- k-center and herding --------------------------------------------------------------------------------------


def test_k_center_takes_the_farthest_each_time():
    rng = np.random.default_rng(0)
    points = (rng.normal(size=(83, 5)) + 40).astype(np.float32)
    chosen = diversity.k_center(torch.from_numpy(points), 30, 7)
    assert chosen[0] == 7
    assert len(set(chosen.tolist())) == 30
    exact = points.astype(np.float64)
    distances = np.linalg.norm(exact[:, None] - exact[None], axis=2)
    for step in range(1, 30):
        gap = distances[:, chosen[:step]].min(axis=1)
        assert gap[chosen[step]] >= gap.max() * (1 - 1e-5)


def test_k_center_of_copies_takes_each_row_once():
    assert sorted(diversity.k_center(torch.ones(5, 3), 5, 2)) == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(diversity.k_center(torch.ones(4, 2), 3, 2), [2, 0, 1])


def test_herding_follows_its_equations():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(41, 6)).astype(np.float32)
    exact = features.astype(np.float64)
    mean = exact.mean(axis=0)
    weight, left, expected = mean.copy(), list(range(41)), []
    for _ in range(41):
        best = max(left, key=lambda row: weight @ exact[row])
        left.remove(best)
        expected.append(best)
        weight += mean - exact[best]
    np.testing.assert_array_equal(diversity.herding(torch.from_numpy(features), 41), expected)


def test_fourier_features_approximate_the_gaussian_kernel():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(20, 3)).astype(np.float32)
    directions, phases = torch.from_numpy(rng.normal(size=(20000, 3))), torch.from_numpy(rng.uniform(size=20000))
    features = diversity.fourier_features(torch.from_numpy(points), directions, phases, 1.7).numpy()
    squares = np.square(points[:, None] - points[None]).sum(axis=2)
    np.testing.assert_allclose(features @ features.T, np.exp(-squares / (2 * 1.7**2)), atol=0.04)


def test_median_distance_ignores_copies_and_offsets():
    points = np.array([[0, 0], [3, 4], [3, 4], [0, 0]], np.float32)
    for offset in (0, 1000):
        moved = torch.from_numpy(points + np.float32(offset))
        assert diversity.median_distance(moved, np.arange(4)) == pytest.approx(5, rel=1e-6)
    assert diversity.median_distance(torch.full((3, 2), 7.0), np.arange(3)) == 1


def mean_discrepancy(points: np.ndarray, rows: np.ndarray, bandwidth: float) -> float:
    """MMD² between a subset and the whole under the exact Gaussian kernel."""
    points = points.astype(np.float64)
    kernel = np.exp(-np.square(points[:, None] - points[None]).sum(axis=2) / (2 * bandwidth**2))
    return kernel.mean() - 2 * kernel[rows].mean() + kernel[np.ix_(rows, rows)].mean()


def test_herding_matches_the_mean_better_than_random_choices(table):
    rng = np.random.default_rng(0)
    table = random_table(rng, size=200, failed=0)
    points = np.concatenate([rng.normal(size=(150, 4)), rng.normal(size=(50, 4)) * 0.2 + 3]).astype(np.float32)
    herded = mean_discrepancy(points, choose(table, "herding", 20, embeddings=points), 3.0)
    random = [mean_discrepancy(points, choose(table, "random", 20, seed=seed), 3.0) for seed in range(20)]
    assert herded < min(random)


def test_herding_inside_clusters_is_herding_of_each_cluster():
    rng = np.random.default_rng(0)
    table = random_table(rng, size=120, failed=10)
    points = rng.normal(size=(120, 4)).astype(np.float32)
    points[[row["status"] == "failed" for row in table.to_pylist()]] = np.nan
    got = choose(table, "equal", 32, within="herding", embeddings=points)
    clusters = np.array(table["cluster"].take(pa.array(got)).to_pylist())
    assert {c: int((clusters == c).sum()) for c in set(clusters)} == dict.fromkeys(sizes_of(table), 8)
    for cluster in sizes_of(table):
        members = np.array([r["row"] for r in ok_rows(table) if r["cluster"] == cluster])
        inside = np.searchsorted(members, got[clusters == cluster])
        herded = mean_discrepancy(points[members], inside, 2.5)
        random = [mean_discrepancy(points[members], rng.choice(len(members), 8, replace=False), 2.5) for _ in range(20)]
        assert herded < np.median(random)


def test_k_center_begins_with_a_random_sample_of_the_seed(table):
    points = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
    firsts = {seed: choose(table, "k-center", 1, seed=seed, embeddings=points).tolist() for seed in range(8)}
    assert firsts == {seed: choose(table, "random", 1, seed=seed).tolist() for seed in range(8)}
    assert len({tuple(first) for first in firsts.values()}) > 4


@pytest.mark.parametrize("order", ["k-center", "herding"])
def test_embedding_orders_depend_on_keys_not_on_row_order(table, order):
    rng = np.random.default_rng(0)
    points = rng.normal(size=(60, 3)).astype(np.float32)
    kept = keys_of(table, choose(table, order, 17, embeddings=points))
    assert len(set(kept)) == 17
    rows = rng.permutation(60)
    shuffled = table.take(pa.array(rows))
    assert keys_of(shuffled, choose(shuffled, order, 17, embeddings=points[rows])) == kept


# --- every order -----------------------------------------------------------------------------------------------


def arguments_of(order: str, points: np.ndarray) -> dict:
    if order in ("highest", "lowest", "middle"):
        return {"by": "loss"}
    return {"embeddings": points} if order in ("k-center", "herding", "cluster-herding") else {}


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_hits_every_count_exactly_and_never_takes_failed_rows(table, order):
    points = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
    most = len(sizes_of(table)) * min(sizes_of(table).values()) if order == "balanced" else 55
    for count in {1, 2, 9, most - 1, most}:
        got = choose(table, order, count, **arguments_of(order, points))
        assert len(got) == count
        assert (np.diff(got) > 0).all()
        assert all(table["status"][row].as_py() == "ok" for row in got.tolist())
    for count in (0, -1, 56):
        with pytest.raises(InputError, match=r"count: expected 1 to 55|at most"):
            choose(table, order, count, **arguments_of(order, points))


def test_a_table_of_one_row_and_one_cluster():
    table = pa.table({"key": ["a"], "status": ["ok"], "loss": [1.0], "cluster": [5], "distance": [0.0]})
    for order in ORDERS:
        assert choose(table, order, 1, **arguments_of(order, np.ones((1, 2), np.float32))).tolist() == [0]


@pytest.mark.parametrize(
    ("order", "arguments", "message"),
    [
        ("best", {}, "order: expected one of highest, lowest"),
        ("highest", {}, "one of loss, cluster, distance"),
        ("highest", {"by": "grand"}, "no score column 'grand'; the tables have loss, cluster, distance"),
        ("highest", {"by": "key"}, "no score column 'key'"),
        ("random", {"by": "loss"}, "takes no score column"),
        ("random", {"seed": -1}, "seed"),
        ("random", {"seed": 2**32}, "seed"),
        ("balanced", {"within": "closest"}, "within: expected nearest"),
        ("equal", {"within": "middle:loss"}, "within: expected nearest"),
        ("equal", {"within": "highest:grand"}, "no score column 'grand'"),
        ("k-center", {}, "diffprune embed"),
        ("balanced", {"within": "herding"}, "diffprune embed"),
        ("herding", {"embeddings": np.zeros((3, 2))}, r"expected \[60, D\]"),
        ("herding", {"embeddings": np.full((60, 2), np.nan)}, "55 rows hold NaN"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(table, order, arguments, message):
    with pytest.raises(InputError, match=message):
        choose(table, order, 5, **arguments)


def test_missing_cluster_columns_say_what_to_run(table):
    for lost, names in [
        ("cluster", ["cluster-random", "balanced", "drop-clusters"]),
        ("distance", ["cluster-nearest", "equal"]),
    ]:
        for order in names:
            with pytest.raises(InputError, match=rf"'{lost}'.*run `diffprune cluster` and pass its folder too"):
                choose(table.drop_columns([lost]), order, 5)


@pytest.mark.parametrize(
    "cluster, message",
    [(0.5, "whole numbers, found 0.5"), (float("inf"), "whole numbers, found inf"), ("a", "numbers")],
)
def test_clusters_are_whole_numbers(table, cluster, message):
    table = table.drop_columns(["cluster"]).append_column("cluster", pa.array([cluster] * len(table)))
    with pytest.raises(InputError, match=f"'cluster': expected {message}"):
        choose(table, "drop-clusters", 5)


def test_a_text_column_cannot_be_ranked(table):
    table = table.append_column("caption", pa.array(["x"] * len(table)))
    with pytest.raises(InputError, match="'caption': expected numbers"):
        choose(table, "highest", 5, by="caption")


@pytest.mark.parametrize("hole", [None, float("nan")])
@pytest.mark.parametrize("column", ["loss", "cluster"])
def test_missing_scores_are_refused_with_count_and_key(table, hole, column):
    if column == "cluster" and hole is not None:
        table = table.set_column(3, "cluster", table["cluster"].cast(pa.float64()))
    rows = ok_rows(table)[3:5]
    values = table[column].to_pylist()
    for row in rows:
        values[row["row"]] = hole
    broken = table.set_column(table.column_names.index(column), column, pa.array(values, table[column].type))
    first = min(row["key"] for row in rows)
    arguments = {"by": "loss"} if column == "loss" else {}
    with pytest.raises(InputError, match=rf"'{column}': 2 of 55 .*first key '{first}'"):
        choose(broken, "lowest" if column == "loss" else "drop-clusters", 5, **arguments)
    assert len(choose(broken, "random", 5)) == 5, "a column that is not used may have holes"


# --- select: from folders to a file ----------------------------------------------------------------------------


class FakeSample:
    def __init__(self, key: str, index: int, offset: int) -> None:
        self.key, self.index, self.offset, self.size = key, index, offset, 2048


def write_scores(folder, columns: dict[str, np.ndarray], *, failed=(), offset=0, rename=None, keep=None):
    """A score folder of three shards with 7, 1 and 12 samples; key k<i> is row i."""
    sizes, start = [7, 1, 12], 0
    for number, size in enumerate(sizes):
        rows = range(start, start + size)
        keys = [f"k{(i * 7) % 20:02d}" if rename is None else rename(i) for i in rows]
        base = base_table(
            f"s-{number}.tar",
            [FakeSample(key, i, i * 2048 + offset) for i, key in enumerate(keys)],
            [0] * size,
            [None] * size,
            ["broken" if i in failed else None for i in rows],
        )
        for name, values in columns.items():
            row_values = [None if i in failed else v for i, v in zip(rows, values[start:][:size].tolist(), strict=True)]
            array = pa.array(row_values, pa.from_numpy_dtype(values.dtype))
            base = base.append_column(pa.field(name, array.type, metadata={"keep": keep} if keep else None), array)
        write_table(folder / f"s-{number}.parquet", base, {"stage": "score"})
        start += size
    write_json(
        folder / "stage.json", {"stage": "score", "fingerprint": folder.name, "shards": [f"s-{n}" for n in range(3)]}
    )


@pytest.fixture
def scores(tmp_path):
    rng = np.random.default_rng(0)
    write_scores(tmp_path / "loss", {"loss": rng.normal(size=20)}, failed=(2, 9), keep="lowest")
    write_scores(tmp_path / "cluster", {"cluster": np.arange(20) % 3, "distance": rng.normal(size=20)}, failed=(9, 11))
    return tmp_path


def test_select_writes_the_kept_samples_sorted_by_place(scores):
    folders = [scores / "loss", scores / "cluster"]
    result = select(folders, scores / "kept.parquet", by="loss", order="lowest", keep=0.5)
    assert (result["count"], result["total"], result["failed"]) == (9, 17, 3)
    assert result["column_keeps"] == "lowest"
    assert json.loads(json.dumps(result)) == result
    kept = pq.read_table(scores / "kept.parquet")
    assert kept.column_names == ["key", "shard", "offset", "size"]
    rows = kept.to_pylist()
    assert rows == sorted(rows, key=lambda row: (row["shard"], row["offset"]))

    values = np.random.default_rng(0).normal(size=20)
    ok = [i for i in range(20) if i not in (2, 9, 11)]
    expected = sorted(sorted(ok, key=lambda i: values[i])[:9])
    assert [row["key"] for row in rows] == [f"k{i * 7 % 20:02d}" for i in expected]
    places = [(0, i) if i < 7 else (1, 0) if i == 7 else (2, i - 8) for i in expected]
    assert [(row["shard"], row["offset"], row["size"]) for row in rows] == [
        (f"s-{s}.tar", i * 2048, 2048) for s, i in places
    ]

    about = table_metadata(scores / "kept.parquet")
    for name in ("order", "by", "count", "total", "seed", "fingerprint"):
        assert about[name] == result[name]
    assert about["order"] == "lowest"


def test_select_twice_gives_the_same_bytes_and_other_inputs_another_fingerprint(scores):
    prints = set()
    for order in ("cluster-nearest", "balanced", "random"):
        results = [
            select([scores / "loss", scores / "cluster"], scores / f"{i}.parquet", order=order, count=6) for i in (0, 1)
        ]
        assert (scores / "0.parquet").read_bytes() == (scores / "1.parquet").read_bytes()
        assert results[0]["fingerprint"] == results[1]["fingerprint"]
        prints.add(results[0]["fingerprint"])
    prints.add(select(scores / "cluster", scores / "0.parquet", order="random", count=6)["fingerprint"])
    write_scores(scores / "rescored", {"cluster": np.arange(20) % 4}, failed=(9, 11))
    prints.add(select(scores / "rescored", scores / "0.parquet", order="random", count=6)["fingerprint"])
    prints.add(select(scores / "cluster", scores / "0.parquet", order="random", count=6, seed=1)["fingerprint"])
    assert len(prints) == 6


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ({"keep": 0.1}, 2),  # 1.7
        ({"keep": 0.5}, 9),  # 8.5
        ({"prune": 0.5}, 9),
        ({"prune": 0.9}, 2),
        ({"keep": 1.0}, 17),
        ({"prune": 0}, 17),
        ({"keep": 1}, 17),
        ({"count": 17}, 17),
        ({"count": 1}, 1),
    ],
)
def test_counts_round_half_up(scores, arguments, count):
    result = select([scores / "loss", scores / "cluster"], scores / "kept.parquet", order="random", **arguments)
    assert result["count"] == count == pq.read_table(scores / "kept.parquet").num_rows


def test_counts_are_exact_in_decimal(tmp_path):
    write_scores(tmp_path / "s", {"loss": np.zeros(20)}, failed=range(15))
    for arguments in ({"keep": 0.1}, {"prune": 0.9}):  # half of one: in binary 1 - 0.9 is a little less than a tenth
        assert select(tmp_path / "s", tmp_path / "kept.parquet", order="random", **arguments)["count"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of keep, prune and count, got none"),
        ({"keep": 0.1, "count": 3}, "got keep, count"),
        ({"keep": 10}, "keep: expected a fraction"),
        ({"prune": -0.1}, "prune: expected a fraction"),
        ({"keep": float("nan")}, "keep: expected a fraction"),
        ({"keep": 0.01}, "means 0 samples, expected 1 to 18"),
        ({"prune": 1.0}, "means 0 samples"),
        ({"count": 19}, "means 19 samples, expected 1 to 18"),
        ({"count": 0}, "expected 1 to 18"),
    ],
)
def test_amounts_that_cannot_be_kept_are_refused(scores, arguments, message):
    with pytest.raises(InputError, match=message):
        select(scores / "loss", scores / "kept.parquet", order="random", **arguments)
    assert not (scores / "kept.parquet").exists()


def test_dry_run_counts_and_writes_nothing(scores):
    result = select(scores / "loss", scores / "kept.parquet", by="loss", keep=0.5, dry_run=True)
    assert (result["count"], result["total"], result["dry_run"]) == (9, 18, True)
    assert not (scores / "kept.parquet").exists()


def test_select_joins_by_key_not_by_position(scores):
    """The cluster table's rows in another order within a shard make no difference."""
    folders = [scores / "loss", scores / "cluster"]
    before = select(folders, scores / "a.parquet", order="cluster-nearest", count=7)
    table = pq.read_table(scores / "cluster/s-2.parquet")
    write_table(scores / "cluster/s-2.parquet", table.take(pa.array(range(11, -1, -1))), {"stage": "score"})
    assert select(folders, scores / "b.parquet", order="cluster-nearest", count=7)["count"] == before["count"]
    assert (scores / "a.parquet").read_bytes() == (scores / "b.parquet").read_bytes()


def test_tables_of_different_data_sets_are_refused(scores):
    write_scores(scores / "moved", {"x": np.zeros(20)}, offset=512)
    write_scores(scores / "renamed", {"x": np.zeros(20)}, rename=lambda i: f"other{i}")
    for folder in ("moved", "renamed"):
        with pytest.raises(InputError, match="another data set"):
            select([scores / "loss", scores / folder], scores / "kept.parquet", by="loss", count=3)


def test_nan_scores_are_refused_and_nothing_is_written(scores):
    values = np.zeros(20)
    values[[4, 5]] = np.nan
    write_scores(scores / "bad", {"grand": values})
    with pytest.raises(InputError, match=r"'grand': 2 of 20 .*first key 'k08'"):
        select(scores / "bad", scores / "kept.parquet", by="grand", count=3)
    assert not (scores / "kept.parquet").exists()


def test_an_out_that_is_no_selection_is_not_overwritten(scores):
    table = scores / "loss/s-0.parquet"
    before = table.read_bytes()
    with pytest.raises(InputError, match="no selection"):
        select(scores / "loss", table, by="loss", count=3)
    assert table.read_bytes() == before
    with pytest.raises(InputError, match="found a folder"):
        select(scores / "loss", scores, by="loss", count=3)


# --- select with embeddings ------------------------------------------------------------------------------------


def write_embeddings(folder, points: np.ndarray, **about) -> None:
    write_scores(folder, {}, failed=(9,), **about)
    stage = {"stage": "embed", "fingerprint": "e", "shards": ["s-0", "s-1", "s-2"], "metadata": {"kind": "embeddings"}}
    write_json(folder / "stage.json", stage)
    for number, (start, stop) in enumerate([(0, 7), (7, 8), (8, 20)]):  # last row first: rows are found by key
        write_array(folder / f"s-{number}.npy", points[start:stop][::-1])
        table = pq.read_table(folder / f"s-{number}.parquet")
        write_table(folder / f"s-{number}.parquet", table.take(pa.array(range(len(table) - 1, -1, -1))), stage)


def test_k_center_and_herding_work_on_an_embeddings_folder(scores):
    points = np.random.default_rng(3).normal(size=(20, 4)).astype(np.float16).astype(np.float32)
    points[9] = np.nan
    write_embeddings(scores / "embeddings", points)
    table = pa.table(
        {
            "key": [f"k{i * 7 % 20:02d}" for i in range(20)],
            "status": ["failed" if i in (2, 9) else "ok" for i in range(20)],
        }
    )
    for order in ("k-center", "herding"):
        select(scores / "loss", scores / "kept.parquet", order=order, count=6, embeddings=scores / "embeddings")
        expected = keys_of(table, choose(table, order, 6, embeddings=points))
        assert sorted(pq.read_table(scores / "kept.parquet")["key"].to_pylist()) == expected
    result = select(
        [scores / "loss", scores / "cluster"],
        scores / "kept.parquet",
        order="equal",
        count=6,
        within="herding",
        embeddings=scores / "embeddings",
    )
    assert result["within"] == "herding"


def test_a_shard_without_samples_takes_part_in_an_embeddings_folder(scores):
    points = np.random.default_rng(3).normal(size=(20, 4)).astype(np.float16)
    write_embeddings(scores / "embeddings", points)
    given = {"order": "k-center", "count": 6, "embeddings": scores / "embeddings"}
    select(scores / "loss", scores / "kept.parquet", **given)
    expected = pq.read_table(scores / "kept.parquet")["key"].to_pylist()
    stage = json.loads((scores / "embeddings/stage.json").read_text())
    stage["shards"].insert(1, "empty")
    write_json(scores / "embeddings/stage.json", stage)
    write_array(scores / "embeddings/empty.npy", np.zeros((0, 4)))
    write_table(scores / "embeddings/empty.parquet", base_table("empty.tar", [], [], [], []), stage)
    select(scores / "loss", scores / "kept.parquet", **given)
    assert pq.read_table(scores / "kept.parquet")["key"].to_pylist() == expected


def test_embeddings_of_another_data_set_are_refused(scores):
    points = np.ones((20, 4), np.float32)
    write_embeddings(scores / "renamed", points, rename=lambda i: f"other{i}")
    with pytest.raises(InputError, match="no embedding for 18 of 20 samples, first key 'k00'"):
        select(scores / "loss", scores / "kept.parquet", order="herding", count=6, embeddings=scores / "renamed")
    write_embeddings(scores / "moved", points, offset=512)
    with pytest.raises(InputError, match="another data set than the scores: key 'k00' has another offset"):
        select(scores / "loss", scores / "kept.parquet", order="herding", count=6, embeddings=scores / "moved")


def test_embeddings_are_asked_for_where_needed_and_nowhere_else(scores):
    write_embeddings(scores / "embeddings", np.ones((20, 4), np.float32))
    with pytest.raises(InputError, match="k-center: works on embeddings: give the folder"):
        select(scores / "loss", scores / "kept.parquet", order="k-center", count=6)
    with pytest.raises(InputError, match="leave `embeddings` out"):
        select(scores / "loss", scores / "kept.parquet", order="random", count=6, embeddings=scores / "embeddings")
    with pytest.raises(InputError, match="expected embeddings"):
        select(scores / "loss", scores / "kept.parquet", order="herding", count=6, embeddings=scores / "cluster")

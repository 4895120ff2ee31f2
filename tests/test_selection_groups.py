"""Groups, quotas, sums of ranks, near-duplicates, and the diversity orders against brute force."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy.stats import rankdata

from diffprune import diversity, orders
from diffprune.choosing import choose
from diffprune.errors import InputError
from diffprune.expressions import By, Term, mean_ranks, parse_by
from diffprune.files import write_json
from diffprune.reporting import report as report_of
from diffprune.selection import select
from diffprune.tables import base_table, kept_keys, table_metadata, write_table

LABELS = [0, 1, 2, 7]


def make_table(seed: int = 0, size: int = 90) -> pa.Table:
    rng = np.random.default_rng(seed)
    return pa.table(
        {
            "key": rng.permutation([f"k{i:03d}" for i in range(size)]).tolist(),
            "status": ["failed" if i in (3, 50) else "ok" for i in range(size)],
            "label": pa.array(rng.choice(LABELS, size, p=[0.1, 0.2, 0.3, 0.4]), pa.int64()),
            "tag": rng.choice(["cat", "ant"], size).tolist(),
            "grand": (rng.integers(0, 9, size) / 4).tolist(),
            "el2n": rng.normal(size=size).tolist(),
            "cluster": pa.array(rng.choice([2, 5, 9], size), pa.int32()),
            "distance": rng.random(size).tolist(),
        }
    )


@pytest.fixture
def table() -> pa.Table:
    return make_table()


def rows_of(table: pa.Table) -> list[dict]:
    return [{**row, "row": i} for i, row in enumerate(table.to_pylist()) if row["status"] == "ok"]


def sizes_of(table: pa.Table, column: str) -> dict:
    values = [row[column] for row in rows_of(table)]
    return {value: values.count(value) for value in sorted(set(values))}


def best_of_each(table: pa.Table, column: str, quotas: dict, score, reverse: bool = True) -> list[int]:
    sign = -1 if reverse else 1
    found = []
    for value, quota in quotas.items():
        members = [row for row in rows_of(table) if row[column] == value]
        members.sort(key=lambda row: (sign * score(row), row["key"]))
        found += [row["row"] for row in members[:quota]]
    return sorted(found)


# --- by: the grammar -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "terms", "group"),
    [
        ("grand", [("grand", 1, False)], None),
        (" grand+el2n ", [("grand", 1, False), ("el2n", 1, False)], None),
        ("2 * grand + 0.5*-el2n", [("grand", 2, False), ("el2n", 0.5, True)], None),
        ("-distance & label", [("distance", 1, True)], "label"),
        ("grand & `my class`", [("grand", 1, False)], "my class"),
        ("`a+b` + clip-score:v1.5", [("a+b", 1, False), ("clip-score:v1.5", 1, False)], None),
    ],
)
def test_by_is_parsed(text, terms, group):
    assert parse_by(text) == By(tuple(Term(*term) for term in terms), group)


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("", 1, "expected a column at character 1, found the end"),
        ("grand +", 8, "expected a column at character 8, found the end"),
        ("grand el2n", 7, r"expected '\+', '&' or the end at character 7, found 'el2n'"),
        ("grand & & label", 9, "expected a column to group by at character 9, found '&'"),
        ("grand & a & b", 11, "one grouping is all there is at character 11"),
        ("grand $ el2n", 7, "at character 7, found '\\$'"),
        ("2grand", 1, "at character 1, found '2grand'"),
        ("2 * & a", 5, "expected a column at character 5, found '&'"),
        ("grand & ``", 10, "expected a column to group by"),
    ],
)
def test_by_says_where_it_cannot_be_read(text, place, message):
    with pytest.raises(InputError, match=message) as caught:
        parse_by(text)
    assert str(caught.value).splitlines()[1:] == [f"  {text}", " " * (place + 1) + "^"]


def test_weights_and_columns_that_mean_nothing_are_refused():
    with pytest.raises(InputError, match="weight above 0, got 0"):
        parse_by("0*grand")
    with pytest.raises(InputError, match=r"'grand' stands in it twice.*2\*grand"):
        parse_by("grand + grand")


def test_ranks_share_ties():
    values = np.array([3.0, 1.0, 3.0, np.inf, 1.0, 1.0, -np.inf])
    np.testing.assert_array_equal(mean_ranks(values), rankdata(values) - 1)
    rng = np.random.default_rng(0)
    for size in (1, 2, 50):
        values = rng.integers(0, 7, size).astype(float)
        np.testing.assert_array_equal(mean_ranks(values), rankdata(values) - 1)


@pytest.mark.parametrize("order", ["highest", "lowest"])
def test_a_sum_of_ranks_counts_neither_scale_nor_order_of_ties(table, order):
    rows = rows_of(table)
    grand, el2n = (rankdata([row[name] for row in rows]) for name in ("grand", "el2n"))
    total = dict(zip((row["row"] for row in rows), 2 * grand - el2n, strict=True))
    sign = -1 if order == "highest" else 1
    expected = sorted(sorted(rows, key=lambda r: (sign * total[r["row"]], r["key"]))[:20], key=lambda r: r["row"])
    assert choose(table, order, 20, by="2*grand + -el2n").tolist() == [row["row"] for row in expected]
    values = np.exp(np.array(table["el2n"].to_pylist()))
    stretched = table.set_column(table.column_names.index("el2n"), "el2n", pa.array(values))
    assert choose(stretched, order, 20, by="2*grand + -el2n").tolist() == [row["row"] for row in expected]


def test_a_minus_turns_a_column_round(table):
    assert choose(table, "highest", 9, by="-grand").tolist() == choose(table, "lowest", 9, by="grand").tolist()


# --- groups and quotas -----------------------------------------------------------------------------------------


def test_by_with_a_group_ranks_inside_it_in_proportion(table):
    sizes = sizes_of(table, "cluster")
    quotas = dict(zip(sizes, orders.proportional_quotas(np.array(list(sizes.values())), 30).tolist(), strict=True))
    expected = best_of_each(table, "cluster", quotas, lambda row: row["grand"])
    assert choose(table, "highest", 30, by="grand & cluster").tolist() == expected
    assert choose(table, "highest", 30, by="grand", per="cluster").tolist() == expected


@pytest.mark.parametrize("shares", ["proportional", "equal", "balanced"])
@pytest.mark.parametrize("column", ["label", "tag"])
def test_shares_per_class(table, shares, column):
    sizes = sizes_of(table, column)
    count = min(sizes.values()) * len(sizes) - 1
    quotas = getattr(orders, f"{shares}_quotas")(np.array(list(sizes.values())), count).tolist()
    expected = best_of_each(table, column, dict(zip(sizes, quotas, strict=True)), lambda row: row["el2n"], False)
    assert choose(table, "lowest", count, by="el2n", per=column, shares=shares).tolist() == expected
    assert len(expected) == count


@pytest.mark.parametrize(
    ("order", "arguments"),
    [
        ("random", {}),
        ("highest", {"by": "grand"}),
        ("middle", {"by": "el2n"}),
        ("cluster-nearest", {}),
        ("cluster-random", {}),
        ("equal", {}),
        ("drop-clusters", {}),
        ("k-center", {"embeddings": True}),
        ("herding", {"embeddings": True}),
        ("cluster-herding", {"embeddings": True}),
    ],
)
def test_a_quota_is_met_exactly_by_every_order(table, order, arguments):
    points = np.random.default_rng(1).normal(size=(90, 5)).astype(np.float16)
    arguments = {**arguments, "embeddings": points} if arguments.get("embeddings") else arguments
    quota = {"0": 2, "7": 11, "1": 0, "2": 5}
    got = choose(table, order, per="label", quota=quota, **arguments)
    labels = [table["label"][row].as_py() for row in got.tolist()]
    assert {str(label): labels.count(label) for label in LABELS} == quota
    assert all(table["status"][row].as_py() == "ok" for row in got.tolist())
    for label in (0, 2, 7):  # each class's choice is that of the class alone
        alone = table.append_column("status2", table["status"]).to_pylist()
        status = ["ok" if row["status"] == "ok" and row["label"] == label else "failed" for row in alone]
        only = table.set_column(1, "status", pa.array(status))
        if order not in ("herding", "cluster-herding"):  # whose kernel is as wide as all samples' distances
            expected = choose(only, order, quota[str(label)], **arguments)
            assert [row for row in got.tolist() if table["label"][row].as_py() == label] == expected.tolist()


def test_a_star_stands_for_the_groups_not_named(table):
    got = choose(table, "random", per="label", quota={"*": 3, "7": 1})
    labels = [table["label"][row].as_py() for row in got.tolist()]
    assert [labels.count(label) for label in LABELS] == [3, 3, 3, 1]
    got = choose(table, "random", per="tag", quota={"ant": 4})
    assert [table["tag"][row].as_py() for row in got.tolist()] == ["ant"] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"per": "label", "quota": {"0": 1000}}, r"quota: 1000 samples asked for of label 0, which has \d+; ask for"),
        ({"per": "label", "quota": {"*": 30}}, r"of label 0, which has \d+ \(and too many of \d others\)"),
        ({"per": "label", "quota": {"5": 1}}, "no label '5' among the samples; there are 4: 0, 1, 2, 7"),
        ({"per": "label", "quota": {"*": 0}}, "0 samples asked for in all"),
        ({"per": "label", "shares": "fair"}, "shares: expected one of proportional, balanced, equal"),
        ({"per": "label", "shares": "equal", "quota": {"0": 1}}, "expected quota or shares"),
        ({"per": "class"}, "per: no column 'class'; the tables have label"),
        ({"per": "grand"}, "expected a column of whole numbers or text to group by, found double"),
        ({"shares": "equal"}, "quota and shares are of groups: give `per`"),
        ({"per": "label", "shares": "balanced", "count": 80}, r"4 groups whose smallest has \d+ give at most \d+"),
    ],
)
def test_groups_that_cannot_be_met_are_refused(table, arguments, message):
    with pytest.raises(InputError, match=message):
        choose(table, "random", **{"count": None if "quota" in arguments else 10, **arguments})


def test_two_groupings_are_refused(table):
    with pytest.raises(InputError, match="groups by 'cluster', but per is 'label'"):
        choose(table, "highest", 10, by="grand & cluster", per="label")


def test_a_sample_without_a_class_is_named(table):
    labels = table["label"].to_pylist()
    labels[7] = None
    broken = table.set_column(2, "label", pa.array(labels, pa.int64()))
    with pytest.raises(InputError, match=f"per 'label': 1 of 88 samples have none, first key '{table['key'][7]}'"):
        choose(broken, "random", 10, per="label")


# --- near-duplicates -------------------------------------------------------------------------------------------


def semdedup(points: np.ndarray, cluster: np.ndarray, ranking: list[int], eps: float) -> set[int]:
    """Algorithm 1 of arXiv 2303.09540 as written: all pairs of a cluster, in float64."""
    unit = points.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    removed = set()
    for value in set(cluster.tolist()):
        members = [row for row in ranking if cluster[row] == value]
        for place, row in enumerate(members):
            if any(unit[row] @ unit[other] > 1 - eps for other in members[:place]):
                removed.add(row)
    return removed


@pytest.mark.parametrize("keep", ["farthest", "nearest", "random"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_dedup_is_semdedup(table, keep, dtype):
    rng = np.random.default_rng(2)
    points = rng.normal(size=(90, 6))
    points[40:80] = points[:40] * 2 + rng.normal(size=(40, 6)) * 0.3 * rng.random((40, 1))
    points = points.astype(dtype)
    points[3] = np.nan  # failed
    rows = rows_of(table)
    if keep == "random":
        by_chance = choose(table, "random", 88, seed=4)  # only for the values
        assert len(by_chance) == 88
        from diffprune.draws import uniform

        values = {row["row"]: -float(uniform(4, [row["key"]], "random")[0]) for row in rows}
    else:
        values = {row["row"]: row["distance"] * (-1 if keep == "farthest" else 1) for row in rows}
    ranking = [row["row"] for row in sorted(rows, key=lambda row: (values[row["row"]], row["key"]))]
    cluster = np.array(table["cluster"].to_pylist())
    for eps in (0.01, 0.1):
        left = choose(table, "random", dedup=eps, dedup_keep=keep, seed=4, embeddings=points)
        expected = semdedup(points, cluster, ranking, eps)
        assert 3 < len(expected) < 60
        assert left.tolist() == sorted(set(ranking) - expected)


def test_dedup_by_tiles_and_at_the_threshold_itself(monkeypatch):
    """Copies and pairs right at the threshold are decided in float64, whatever the tiles."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(300, 8)).astype(np.float32)
    points[100:200] = points[:100]
    points[200:210] = points[:10] * 3
    cluster, values = np.zeros(300, dtype=np.int64), rng.permutation(300).astype(float)
    unit = points.astype(np.float64) / np.linalg.norm(points.astype(np.float64), axis=1, keepdims=True)
    pair = float(unit[0] @ unit[1])  # a threshold that one pair meets to the last bits
    for eps in (1e-9, 1e-3, 0.4, 1 - pair):
        expected = semdedup(points, cluster, np.argsort(-values).tolist(), eps)
        found = diversity.near_duplicates(torch.from_numpy(points), cluster, values, eps)
        if eps != 1 - pair:
            assert set(np.flatnonzero(found).tolist()) == expected
        shuffled = rng.permutation(300)
        again = diversity.near_duplicates(torch.from_numpy(points[shuffled]), cluster, values[shuffled], eps)
        np.testing.assert_array_equal(again, found[shuffled])
        monkeypatch.setattr(diversity, "_SIDE", 64)
        np.testing.assert_array_equal(diversity.near_duplicates(torch.from_numpy(points), cluster, values, eps), found)
        monkeypatch.undo()


def test_dedup_alone_needs_no_order(table, small_run, tmp_path):
    """Nothing is ranked then, and no score asked for."""
    points = np.random.default_rng(2).normal(size=(90, 3)).astype(np.float32)
    left = choose(table, "random", dedup=0.1, embeddings=points)
    assert choose(table, "highest", dedup=0.1, embeddings=points).tolist() == left.tolist()
    for count, quota in ((5, None), (None, {"*": 1})):
        with pytest.raises(InputError, match="give `by`"):
            choose(table, "highest", count, per="label", quota=quota, dedup=0.1, embeddings=points)
    options = {"dedup": 0.02, "embeddings": small_run.embeddings}
    report = select(small_run.clusters, tmp_path / "kept.parquet", **options)
    any_order = select(small_run.clusters, tmp_path / "random.parquet", order="random", **options)
    assert report["order"] is None and 1 < report["count"] == any_order["count"] < 120
    assert kept_keys(tmp_path / "kept.parquet") == kept_keys(tmp_path / "random.parquet")
    page = tmp_path / "page.html"
    report_of(page, scores=[small_run.scores], selections={"these": tmp_path / "kept.parquet"})
    assert "all but near-duplicates" in page.read_text()
    shown = select(small_run.clusters, tmp_path / "none.parquet", **options, dry_run=True)
    assert shown["count"] is None and not (tmp_path / "none.parquet").exists()
    with pytest.raises(InputError, match="give `by`"):
        select(small_run.clusters, tmp_path / "kept.parquet", keep=0.1, **options)


def test_dedup_comes_before_the_order_and_can_leave_too_few(table):
    points = np.random.default_rng(2).normal(size=(90, 3)).astype(np.float32)
    points[10:] = points[10]
    left = choose(table, "random", dedup=0.001, embeddings=points)
    assert len(left) < 20
    got = choose(table, "highest", 5, by="el2n", dedup=0.001, embeddings=points)
    values = np.array(table["el2n"].to_pylist())
    assert sorted(values[got]) == sorted(values[left])[-5:]
    with pytest.raises(InputError, match=rf"expected 1 to {len(left)} \(.* near-duplicates \({88 - len(left)} are\)"):
        choose(table, "highest", 50, by="el2n", dedup=0.001, embeddings=points)
    with pytest.raises(InputError, match="dedup: expected a cosine distance above 0"):
        choose(table, "random", dedup=0.0, embeddings=points)
    with pytest.raises(InputError, match="dedup_keep: expected one of"):
        choose(table, "random", dedup=0.1, dedup_keep="best", embeddings=points)
    points[20] = 0
    with pytest.raises(InputError, match=f"1 embeddings have length 0.*first key '{table['key'][20]}'"):
        choose(table, "random", dedup=0.1, embeddings=points)


# --- diversity by tiles ----------------------------------------------------------------------------------------


def farthest_first(points: np.ndarray, count: int, first: int) -> list[int]:
    exact = points.astype(np.float64)
    chosen, gap = [first], np.full(len(points), np.inf)
    while len(chosen) < count:
        gap = np.minimum(gap, np.square(exact - exact[chosen[-1]]).sum(axis=1))
        gap[chosen] = -1
        chosen.append(int(np.argmax(gap)))
    return chosen


@pytest.mark.parametrize("pool", [1, 7, 64, 1000])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_k_center_does_not_depend_on_its_pool(monkeypatch, pool, dtype):
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(6, 4)) * 20
    points = (centers[rng.integers(0, 6, 300)] + rng.normal(size=(300, 4))).astype(dtype)
    expected = farthest_first(points, 120, 5)
    monkeypatch.setattr(diversity, "_POOL", pool)
    told: list[int] = []
    assert diversity.k_center(torch.from_numpy(points), 120, 5, told.append).tolist() == expected
    assert sum(told) == 120


def test_k_center_of_ties_and_copies_goes_by_row(monkeypatch):
    grid = np.stack(np.meshgrid(np.arange(5.0), np.arange(5.0)), axis=-1).reshape(-1, 2).astype(np.float32)
    points = np.concatenate([grid, grid])  # every distance is exact, most are tied
    expected = farthest_first(points, 50, 12)
    for pool in (1, 5, 49, 100):
        monkeypatch.setattr(diversity, "_POOL", pool)
        assert diversity.k_center(torch.from_numpy(points), 50, 12).tolist() == expected


def test_k_center_covers_better_than_chance():
    rng = np.random.default_rng(3)
    points = rng.normal(size=(2000, 3)).astype(np.float32)
    points[:1500] *= 0.1

    def radius(rows: np.ndarray) -> float:
        return float(torch.cdist(torch.from_numpy(points), torch.from_numpy(points[rows])).min(dim=1).values.max())

    chosen = radius(diversity.k_center(torch.from_numpy(points), 50, 0))
    assert chosen < 0.5 * min(radius(rng.choice(2000, 50, replace=False)) for _ in range(20))


def test_features_by_tiles_are_those_of_the_whole(monkeypatch):
    rng = np.random.default_rng(0)
    points = torch.from_numpy(rng.normal(size=(100, 5)).astype(np.float16))
    directions, phases = torch.from_numpy(rng.normal(size=(33, 5))), torch.from_numpy(rng.random(33))
    whole = diversity.fourier_features(points, directions, phases, 2.0)
    monkeypatch.setattr(diversity, "_TILE", 37)
    torch.testing.assert_close(diversity.fourier_features(points, directions, phases, 2.0), whole)
    assert diversity.herding(whole, 30).tolist() == diversity.herding(whole.clone(), 30).tolist()


def test_k_center_inside_clusters(table):
    points = np.random.default_rng(1).normal(size=(90, 4)).astype(np.float32)
    got = choose(table, "equal", 12, within="k-center", embeddings=points)
    for cluster in (2, 5, 9):
        members = sorted((row for row in rows_of(table) if row["cluster"] == cluster), key=lambda row: row["key"])
        mine = [row for row in got.tolist() if table["cluster"][row].as_py() == cluster]
        rows = np.array([row["row"] for row in members])
        first = [int(np.flatnonzero(rows == row)[0]) for row in mine]
        possible = [sorted(farthest_first(points[rows], 4, start)) for start in first]
        assert sorted(first) in possible


# --- select ----------------------------------------------------------------------------------------------------


class FakeSample:
    def __init__(self, key: str, index: int) -> None:
        self.key, self.index, self.offset, self.size = key, index, index * 2048, 2048


def write_scores(folder, uids: bool) -> None:
    rng = np.random.default_rng(0)
    for shard in range(2):
        keys = [f"k{shard}{i:02d}" for i in range(20)]
        samples = [FakeSample(key, i) for i, key in enumerate(keys)]
        given = [f"{shard:016x}{i:016x}" for i in range(20)] if uids else [None] * 20
        table = base_table(f"s-{shard}.tar", samples, [i % 3 for i in range(20)], given, [None] * 20)
        for name, keep in (("grand", "highest"), ("distance", "lowest")):
            field = pa.field(name, pa.float64(), metadata={"keep": keep})
            table = table.append_column(field, pa.array(rng.normal(size=20)))
        write_table(folder / f"s-{shard}.parquet", table, {"stage": "score"})
    write_json(folder / "stage.json", {"stage": "score", "fingerprint": "f", "shards": ["s-0", "s-1"]})


def test_select_takes_quotas_as_text_and_files_and_says_how_it_chose(tmp_path):
    write_scores(tmp_path / "s", uids=True)
    kept = tmp_path / "kept.parquet"
    (tmp_path / "quota.json").write_text(json.dumps({"0": 5, "1": 2, "*": 1}))
    for quota in ("0=5, 1=2,*=1", {"0": 5, "1": 2, "*": 1}, tmp_path / "quota.json", str(tmp_path / "quota.json")):
        result = select(tmp_path / "s", kept, by="grand & label", quota=quota)
        assert (result["count"], result["per"], result["column_keeps"]) == (8, "label", "highest")
    (tmp_path / "twice.json").write_text('{"0": 5, "1": 2, "0": 1}')
    with pytest.raises(InputError, match=r"twice.json: '0' stands in it twice"):
        select(tmp_path / "s", kept, by="grand & label", quota=tmp_path / "twice.json")
    about = table_metadata(kept)
    assert (about["quota"], about["by"], about["count"]) == ({"0": 5, "1": 2, "*": 1}, "grand & label", 8)
    table = pq.read_table(kept)
    assert table.column_names == ["key", "shard", "offset", "size", "uid"]
    for row in table.to_pylist():
        assert row["uid"] == f"{int(row['key'][1]):016x}{int(row['key'][2:]):016x}"
    write_scores(tmp_path / "s", uids=False)
    select(tmp_path / "s", kept, order="random", count=3)
    assert pq.read_table(kept).column_names == ["key", "shard", "offset", "size"]


@pytest.mark.parametrize(
    ("quota", "message"),
    [
        ("0=five", "group '0': expected a number of samples, 0 or more, got 'five'"),
        ("0=-1", "got '-1'"),
        ("0=1,0=2", "group '0' stands in it twice"),
        ({}, "expected numbers by group, such as 0=100"),
        ({"0": True}, "got True"),
        ("nothing.json", "no such file"),
    ],
)
def test_quotas_that_cannot_be_read_are_refused(tmp_path, quota, message):
    write_scores(tmp_path / "s", uids=False)
    with pytest.raises(InputError, match=message):
        select(tmp_path / "s", tmp_path / "kept.parquet", order="random", per="label", quota=quota)


def test_a_quota_and_a_count_do_not_go_together(tmp_path):
    write_scores(tmp_path / "s", uids=False)
    with pytest.raises(InputError, match="got keep too: leave it out"):
        select(tmp_path / "s", tmp_path / "k.parquet", order="random", per="label", quota="0=1", keep=0.5)


@pytest.mark.parametrize(
    ("by", "keeps"),
    [
        ("grand", "highest"),
        ("-distance", "highest"),
        ("distance", "lowest"),
        ("grand + -distance", "highest"),
        ("grand + distance", None),
    ],
)
def test_column_keeps_is_the_end_that_all_columns_mean(tmp_path, by, keeps):
    write_scores(tmp_path / "s", uids=False)
    assert select(tmp_path / "s", tmp_path / "k.parquet", by=by, count=5)["column_keeps"] == keeps


def test_an_empty_name_is_no_column_to_group_by(table):
    with pytest.raises(InputError, match="per: no column ''"):
        choose(table, "random", 30, per="")

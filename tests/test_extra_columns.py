"""`select` by columns that other programs wrote beside the shards."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import diffprune
from diffprune.cli.app import app
from diffprune.errors import InputError
from diffprune.tables import read_folder


@pytest.fixture
def keys(small_run) -> list[str]:
    return read_folder(small_run.scores)["key"].to_pylist()


@pytest.fixture
def crawl(tmp_path: Path, keys) -> Path:
    """As img2dataset writes it: a parquet a shard, rows of images that it could not fetch too."""
    folder = tmp_path / "crawl"
    folder.mkdir()
    for number, start in enumerate(range(0, len(keys), 50)):
        own = keys[start : start + 50][::-1]
        columns = {
            "url": ["http://x"] * (len(own) + 1),
            "key": [*own, f"gone-{number}"],
            "status": ["success"] * len(own) + ["failed_to_download"],
            "width": [*(keys.index(key) for key in own), None],
            "similarity": [*(-float(keys.index(key)) for key in own), None],
            "language": [*("en" if keys.index(key) % 3 else "de" for key in own), None],
        }
        pq.write_table(pa.table(columns), folder / f"{number:05d}.parquet")
    return folder


def kept(path: Path) -> list[str]:
    return sorted(pq.read_table(path)["key"].to_pylist())


def test_img2datasets_columns_are_ranked_and_grouped_by(small_run, tmp_path, crawl, keys):
    out = tmp_path / "kept.parquet"
    diffprune.select([small_run.scores, crawl], out, by="width", count=10)
    assert kept(out) == sorted(keys[-10:])
    whole = tmp_path / "all.parquet"
    pq.write_table(pq.read_table(crawl, columns=["key", "similarity", "language"]), whole)
    result = diffprune.select([small_run.scores, whole], out, by="similarity", per="language", shares="equal", count=20)
    assert kept(out) == sorted([key for i, key in enumerate(keys) if i % 3][:10] + keys[:30:3])
    diffprune.select(
        [small_run.scores, small_run.clusters, crawl], out, order="balanced", within="lowest:width", keep=0.2
    )
    arguments = ["select", str(whole), str(small_run.scores), "--by", "loss + similarity", "--count", "7"]
    assert CliRunner().invoke(app, [*arguments, "-o", str(out)]).exit_code == 0
    again = diffprune.select([small_run.scores, whole], out, by="similarity", per="language", shares="equal", count=20)
    assert again["fingerprint"] == result["fingerprint"]
    table = pq.read_table(whole)
    pq.write_table(table.set_column(1, "similarity", pa.array([1.0] * len(table))), whole)
    other = diffprune.select([small_run.scores, whole], out, by="similarity", per="language", shares="equal", count=20)
    assert other["fingerprint"] != result["fingerprint"]


def test_what_cannot_be_joined_is_refused(small_run, tmp_path, crawl, keys):
    def select(table: pa.Table | None, message: str, by: str = "width", also: tuple[Path, ...] = ()) -> None:
        path = tmp_path / "extra.parquet"
        if table is not None:
            pq.write_table(table, path)
        with pytest.raises(InputError, match=message):
            diffprune.select([small_run.scores, path, *also], tmp_path / "kept.parquet", by=by, count=10)

    whole = pq.read_table(crawl)
    select(whole.drop_columns(["key"]), "extra.parquet: expected a column key, of sample keys, found url, status")
    select(pa.concat_tables([whole, whole[:1]]), f"key '{whole['key'][0]}' stands in it twice")
    select(
        whole.filter(pa.compute.not_equal(whole["key"], keys[3])), f"no row for 1 of 120 samples, key '{keys[3]}' first"
    )
    select(whole, r"expected a column that is asked for \(loss\), found url, key, status", by="loss")
    select(whole, "column 'language': expected numbers to rank by", by="language")
    select(whole, "column 'width' is in the score tables too", also=(crawl,))
    select(whole.append_column("loss", whole["similarity"]), "column 'loss' is in the score tables too", by="loss")
    select(whole.set_column(1, "key", pa.array(range(len(whole)))), "key: expected strings, found int64")
    select(None, "no such folder", also=()) if not (tmp_path / "extra.parquet").unlink() else None
    with pytest.raises(InputError, match="at least one folder of score tables"):
        diffprune.select([crawl], tmp_path / "kept.parquet", by="width", count=10)

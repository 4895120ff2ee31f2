"""Tables are joined by key, of one data set, complete; stages resume, refuse other work, leave nothing half-written."""

from __future__ import annotations

import mmap

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffprune import engines, tables
from diffprune.engines import run_stage
from diffprune.errors import DiskFullError, InputError, ResumeError
from diffprune.files import atomic_dir, atomic_path, fingerprint, read_json, write_json
from diffprune.selection import select
from diffprune.shards import Member, Sample
from diffprune.tables import (
    BASE_SCHEMA,
    base_table,
    kept_keys,
    read_folder,
    read_table,
    read_tables,
    score_columns,
    table_metadata,
    write_table,
)


def make_table(stem: str, keys: list[str], **columns: list) -> pa.Table:
    samples = [Sample(k, i, (Member(f"{k}.png", "png", 512 * i, 512 * i + 512, 9),)) for i, k in enumerate(keys)]
    table = base_table(f"{stem}.tar", samples, [0] * len(keys), [None] * len(keys), [None] * len(keys))
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values, pa.float64()))
    return table


def stage(out, tables: dict[str, pa.Table], config: dict | None = None, **options) -> dict:
    rows = sum(table.num_rows for table in tables.values())
    return run_stage(
        "score", out, config or {"method": "x"}, list(tables), lambda stem, bar: tables[stem], total=rows, **options
    )


def test_folders_are_joined_by_key_whatever_their_order(tmp_path):
    stage(
        tmp_path / "a",
        {"s0": make_table("s0", ["k0", "k1"], loss=[1.0, 2.0]), "s1": make_table("s1", ["k2"], loss=[3.0])},
    )
    reordered = make_table("s0", ["k0", "k1"], grand=[10.0, 20.0]).take([1, 0])
    stage(tmp_path / "b", {"s1": make_table("s1", ["k2"], grand=[30.0]), "s0": reordered})
    table = read_tables([tmp_path / "a", tmp_path / "b"])
    assert table["key"].to_pylist() == ["k0", "k1", "k2"]
    assert table["loss"].to_pylist() == [1.0, 2.0, 3.0]
    assert table["grand"].to_pylist() == [10.0, 20.0, 30.0]
    assert score_columns(table) == ["loss", "grand"]
    assert score_columns(read_tables([tmp_path / "a", tmp_path / "b"], ["grand"])) == ["grand"]


def test_only_columns_that_are_asked_for_are_read(tmp_path, monkeypatch):
    stage(tmp_path / "a", {"s": make_table("s", ["k0", "k1"], loss=[1.0, 2.0], el2n=[3.0, 4.0])})
    stage(tmp_path / "b", {"s": make_table("s", ["k0", "k1"], grand=[5.0, 6.0])})
    read, files = [], tables.read_table
    monkeypatch.setattr(tables, "read_table", lambda path, names, **kw: read.extend(names) or files(path, names, **kw))
    select([tmp_path / "a", tmp_path / "b"], tmp_path / "kept.parquet", by="loss", count=1)
    assert "loss" in read and not {"el2n", "grand"} & set(read)


def test_a_row_that_failed_anywhere_is_failed(tmp_path):
    bad = make_table("s", ["k0", "k1"], grand=[1.0, 2.0])
    bad = bad.set_column(7, "status", pa.array(["ok", "failed"])).set_column(8, "error", pa.array([None, "NaN loss"]))
    stage(tmp_path / "a", {"s": make_table("s", ["k0", "k1"], loss=[1.0, 2.0])})
    assert stage(tmp_path / "b", {"s": bad})["first_error"] == {"shard": "s", "key": "k1", "error": "NaN loss"}
    table = read_tables([tmp_path / "a", tmp_path / "b"])
    assert table["status"].to_pylist() == ["ok", "failed"]
    assert table["error"].to_pylist() == [None, "NaN loss"]


@pytest.mark.parametrize("folder", ["run:1/scores", "2026-12-01T10:30", "~/scores", "~nobody"])
def test_relative_names_are_names_and_no_urls_or_homes(tmp_path, monkeypatch, folder):
    """As pyarrow takes them for, which failed, or wrote the tables into somebody's home beside nothing else."""
    (tmp_path / "home" / "scores").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    stage(folder, {"s": make_table("s", ["k0", "k1"], loss=[1.0, 2.0])})
    assert read_folder(folder)["loss"].to_pylist() == [1.0, 2.0]
    assert (tmp_path / "here" / folder / "s.parquet").is_file()
    assert not [path for path in (tmp_path / "home").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        (make_table("s", ["k0", "kX"], grand=[1.0, 2.0]), "another data set.*'k1' is only"),
        (make_table("s", ["k0", "k1", "k2"], grand=[1.0, 2.0, 3.0]), "another data set"),
        (make_table("t", ["k0", "k1"], grand=[1.0, 2.0]), "'k0' has another shard"),
        (make_table("s", ["k1", "k0"], grand=[1.0, 2.0]), "'k0' has another offset"),
        (make_table("s", ["k0", "k1"], loss=[1.0, 2.0]), "column 'loss' is in"),
    ],
)
def test_tables_of_another_data_set_are_refused(tmp_path, other, complaint):
    stage(tmp_path / "a", {"s": make_table("s", ["k0", "k1"], loss=[1.0, 2.0])})
    stage(tmp_path / "b", {"s": other})
    with pytest.raises(InputError, match=complaint):
        read_tables([tmp_path / "a", tmp_path / "b"])


def test_incomplete_foreign_and_malformed_folders_name_themselves(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        read_folder(tmp_path / "none")
    (tmp_path / "foreign").mkdir()
    with pytest.raises(InputError, match=r"stage\.json"):
        read_folder(tmp_path / "foreign")
    stage(tmp_path / "a", {"s0": make_table("s0", ["k0"]), "s1": make_table("s1", ["k1"])})
    (tmp_path / "a" / "s1.parquet").unlink()
    with pytest.raises(InputError, match="1 of 2 shards are done, s1 is not"):
        read_folder(tmp_path / "a")
    (tmp_path / "a" / "s1.parquet").write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(InputError, match=r"s1\.parquet: not a readable parquet"):
        read_folder(tmp_path / "a")
    (tmp_path / "a" / "stage.json").write_text('{"shards": ["../../etc/passwd"]}')
    with pytest.raises(InputError, match="list of shard names"):
        read_folder(tmp_path / "a")
    stage(tmp_path / "d", {"s0": make_table("s0", ["k0"]), "s1": make_table("s1", ["k0"])})
    with pytest.raises(InputError, match="twice"):
        read_folder(tmp_path / "d")


def test_columns_and_metadata_that_are_missing_are_named(tmp_path):
    stage(tmp_path / "a", {"s": make_table("s", ["k0"], loss=[1.0])})
    with pytest.raises(InputError, match=r"no column 'grand'; there are loss"):
        read_tables(tmp_path / "a", ["grand"])
    with pytest.raises(InputError, match=r"no column 'grand'; it has key, shard"):
        read_table(tmp_path / "a" / "s.parquet", ["grand"])
    pq.write_table(pa.table({"key": ["a"]}), tmp_path / "plain.parquet")
    with pytest.raises(InputError, match="not a table of diffprune"):
        table_metadata(tmp_path / "plain.parquet")
    assert kept_keys(tmp_path / "plain.parquet") == {"a"}
    assert table_metadata(tmp_path / "a" / "s.parquet")["config"] == {"method": "x"}


def test_a_stage_does_only_what_is_not_done(tmp_path):
    tables = {f"s{i}": make_table(f"s{i}", [f"k{i}"]) for i in range(4)}
    done: list[str] = []
    interrupts = iter([True])

    def work(stem, bar):
        if stem == "s2" and next(interrupts, False):
            raise KeyboardInterrupt
        done.append(stem)
        return tables[stem]

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run_stage("score", out, {"seed": 1}, list(tables), work, total=4)
    assert sorted(path.name for path in out.iterdir()) == ["s0.parquet", "s1.parquet", "stage.json"]
    (out / ".tmp-s2.parquet").write_bytes(b"half of a table")  # as a SIGKILL would leave it
    result = run_stage("score", out, {"seed": 1}, list(tables), work, total=4)
    assert done == ["s0", "s1", "s2", "s3"]
    assert (result["shards_done_before"], result["samples"], result["failed"]) == (2, 4, 0)
    assert not list(out.glob(".tmp-*"))
    run_stage("score", tmp_path / "undisturbed", {"seed": 1}, list(tables), lambda s, b: tables[s], total=4)
    for stem in tables:
        assert (out / f"{stem}.parquet").read_bytes() == (tmp_path / "undisturbed" / f"{stem}.parquet").read_bytes()


def test_a_resume_with_another_config_says_what_differs(tmp_path):
    tables = {"s": make_table("s", ["k"])}
    stage(tmp_path / "out", tables, {"seed": 1, "inputs": {"a.tar": 5}})
    with pytest.raises(ResumeError, match=r"inputs\.a\.tar was 5, is now 6; seed was 1, is now 2"):
        stage(tmp_path / "out", tables, {"seed": 2, "inputs": {"a.tar": 6}})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(ResumeError, match="holds other files"):
        stage(tmp_path / "mine", tables)


def test_dry_run_writes_nothing(tmp_path):
    plan = stage(tmp_path / "out", {"s": make_table("s", ["k"])}, dry_run=True)
    assert plan["dry_run"] and plan["shards"] == 1
    assert not (tmp_path / "out").exists()


def test_a_failing_write_leaves_nothing_and_keeps_what_was(tmp_path, monkeypatch):
    target = tmp_path / "f.json"
    write_json(target, {"a": 1})
    with pytest.raises(OSError, match="No space"), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")
    with pytest.raises(ValueError, match="JSON"):
        write_json(target, {"a": float("nan")})
    with pytest.raises(RuntimeError), atomic_dir(tmp_path / "checkpoint") as temporary:
        (temporary / "x").write_text("half")
        raise RuntimeError
    assert read_json(target) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["f.json"]

    def broken(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(engines, "write_table", broken)
    with pytest.raises(DiskFullError, match="0 of 1 shards are finished and kept; free some space"):
        stage(tmp_path / "out", {"s": make_table("s", ["k"])})
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["stage.json"]


def test_fingerprints_tell_values_apart():
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert len({fingerprint(v) for v in ({"a": 1}, {"a": 2}, {"b": 1}, [1], 1, "1", None)}) == 7


def test_text_is_wide_in_memory_and_plain_in_files(tmp_path):
    """A ``string`` column overflows at 2 GiB, which the keys and shards of 100 million samples have."""
    table = make_table("s", ["k0", "k1"], loss=[1.0, 2.0]).replace_schema_metadata()
    path = tmp_path / "t.parquet"
    write_table(path, table, {"stage": "score"})
    found = read_table(path)
    assert found.schema.field("key").type == found.schema.field("status").type == pa.large_string()
    assert table.schema.names == found.schema.names and table.schema.types == found.schema.types
    assert found.to_pydict() == table.to_pydict()
    write_table(tmp_path / "again.parquet", found, {"stage": "score"})
    assert (tmp_path / "again.parquet").read_bytes() == path.read_bytes()
    with pq.ParquetFile(path) as file:
        assert file.schema_arrow.remove_metadata() == BASE_SCHEMA.append(pa.field("loss", pa.float64()))


def test_text_that_lies_beyond_2_gibibytes_is_written(tmp_path, monkeypatch):
    """As the keys that a large selection took lie; here few of them, at the end of memory that nobody touches."""
    monkeypatch.setattr("diffprune.tables._ROWS_AT_ONCE", 3)
    keys = [f"k{i}" for i in range(10)]
    text = "".join(keys).encode()
    far = (2 << 30) - 7  # the first keys are on this side of it
    room = mmap.mmap(-1, far + len(text))
    room[far:] = text
    ends = far + np.cumsum([0, *map(len, keys)])
    column = pa.LargeStringArray.from_buffers(10, pa.py_buffer(ends), pa.py_buffer(room))
    write_table(tmp_path / "t.parquet", pa.table({"key": column, "loss": pa.array(range(10))}), {"stage": "score"})
    assert read_table(tmp_path / "t.parquet").to_pydict() == {"key": keys, "loss": list(range(10))}

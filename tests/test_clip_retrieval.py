"""Embedding folders of clip-retrieval are read as they are, and bound to shards by key."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from small_run import contents

import diffprune
from diffprune.arrays import ArrayFolder
from diffprune.errors import InputError, ResumeError, StoppedError
from diffprune.shards import index_shards
from diffprune.tables import read_folder

PARTS = ((0, 40), (40, 57), (57, 60))  # rows of each file, by number, not by name
WIDTH = 24


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def write(folder: Path, rows: np.ndarray, keys: list[str], column: str = "image_path", **more: list) -> Path:
    for number, (start, stop) in zip(("2", "10", "11"), PARTS, strict=True):
        (folder / "img_emb").mkdir(parents=True, exist_ok=True)
        (folder / "metadata").mkdir(exist_ok=True)
        np.save(folder / "img_emb" / f"img_emb_{number}.npy", rows[start:stop])
        columns = {column: keys[start:stop], "caption": ["a picture"] * (stop - start)}
        columns |= {name: values[start:stop] for name, values in more.items()}
        pq.write_table(pa.table(columns), folder / "metadata" / f"metadata_{number}.parquet")
    return folder


@pytest.fixture(scope="module")
def small_set(tmp_path_factory):
    """(shards of 60 images, their keys, random embeddings [60, 24] float64 of length 1)"""
    root = tmp_path_factory.mktemp("set")
    for i in range(60):
        path = root / "images" / str(i % 3) / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (i, 2 * i, 3 * i)).save(path)
    diffprune.pack(root / "images", root / "shards", shard_size=25)
    keys = [sample.key for index in index_shards(root / "shards") for sample in index.samples]
    return root / "shards", keys, unit(np.random.default_rng(0).normal(size=(60, WIDTH)))


def test_normalised_float16_is_read_as_it_is(small_set, tmp_path):
    _, keys, rows = small_set
    folder = ArrayFolder(write(tmp_path / "emb", rows.astype(np.float16), keys), kind="embeddings")
    assert folder.stems == ["img_emb_2", "img_emb_10", "img_emb_11"] and folder.metadata["shape"] == [WIDTH]
    array = folder.array("img_emb_10")
    assert isinstance(array, np.memmap) and array.dtype == np.float16
    table, values = folder.load()
    assert table["key"].to_pylist() == keys and values.dtype == np.float32
    assert np.array_equal(values, rows.astype(np.float16).astype(np.float32))
    same = ArrayFolder(write(tmp_path / "again", rows.astype(np.float16), keys))
    assert folder.fingerprint == same.fingerprint
    other = rows.astype(np.float16)
    other[59, 23] += np.float16(0.001)
    assert ArrayFolder(write(tmp_path / "other", other, keys)).fingerprint != folder.fingerprint


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_what_is_not_normalised_gets_normalised(small_set, tmp_path, dtype):
    _, keys, rows = small_set
    lengths = np.random.default_rng(1).uniform(0.5, 20, size=(60, 1))
    folder = ArrayFolder(write(tmp_path / "emb", (rows * lengths).astype(dtype), keys))
    values = folder.load()[1]
    assert np.allclose(np.linalg.norm(values, axis=1), 1, atol=1e-3 if dtype == np.float16 else 1e-6)
    assert np.abs(values - rows).max() < (1e-3 if dtype == np.float16 else 1e-6)
    assert np.array_equal(values[40:57], folder.array("img_emb_10"))


def test_its_new_files_join_and_changed_ones_are_refused(small_set, tmp_path):
    """Else a part that was embedded again kept the clusters of what it was."""
    _, keys, rows = small_set
    source, late = write(tmp_path / "emb", rows.astype(np.float16), keys), tmp_path / "late"
    later = [source / "img_emb" / "img_emb_11.npy", source / "metadata" / "metadata_11.parquet"]
    late.mkdir()
    for path in later:
        path.rename(late / path.name)
    diffprune.cluster(source, tmp_path / "k", k=4)
    assert diffprune.cluster(source, tmp_path / "out", like=tmp_path / "k")["samples"] == 57
    for path in later:
        (late / path.name).rename(path)
    grown = diffprune.cluster(source, tmp_path / "out", like=tmp_path / "k")
    assert (grown["shards_done_before"], grown["samples"]) == (2, 60)
    diffprune.cluster(source, tmp_path / "at_once", like=tmp_path / "k")
    assert read_folder(tmp_path / "out").equals(read_folder(tmp_path / "at_once"), check_metadata=True)
    np.save(source / "img_emb" / "img_emb_2.npy", rows[20:60].astype(np.float16))
    with pytest.raises(ResumeError, match=r"img_emb_2 \(now with other values\)"):
        diffprune.cluster(source, tmp_path / "out", like=tmp_path / "k")


def test_cluster_reads_it_and_finds_the_same_clusters_as_in_a_bound_folder(small_set, tmp_path):
    shards, keys, rows = small_set
    source = write(tmp_path / "emb", rows.astype(np.float16), keys)
    direct = diffprune.cluster(source, tmp_path / "direct", k=4)
    bound = diffprune.embed(shards, tmp_path / "bound", model=f"clip-retrieval:{source}")
    assert (direct["samples"], bound["samples"], bound["failed"]) == (60, 60, 0)
    diffprune.cluster(tmp_path / "bound", tmp_path / "clusters", k=4)
    a, b = (read_folder(tmp_path / name).sort_by("key") for name in ("direct", "clusters"))
    for name in ("key", "cluster", "distance"):
        assert a[name].to_pylist() == b[name].to_pylist()
    assert a["shard"].null_count == 60 and b["shard"].null_count == 0
    # selections of a bound folder can be pruned: it says where each sample lies
    diffprune.select(tmp_path / "clusters", tmp_path / "kept.parquet", order="cluster-nearest", keep=0.5)
    assert diffprune.prune(tmp_path / "kept.parquet", shards, tmp_path / "pruned")["count"] == 30


def test_selections_of_it_as_it_is_have_keys_alone_and_prune_says_to_bind_it(small_set, tmp_path):
    shards, keys, rows = small_set
    source, kept = write(tmp_path / "emb", rows.astype(np.float16), keys), tmp_path / "kept.parquet"
    diffprune.cluster(source, tmp_path / "clusters", k=4)
    diffprune.select(tmp_path / "clusters", kept, order="equal", keep=0.1)
    diffprune.embed(shards, tmp_path / "bound", model=f"clip-retrieval:{source}")
    diffprune.cluster(tmp_path / "bound", tmp_path / "bound-clusters", k=4)
    diffprune.select(tmp_path / "bound-clusters", tmp_path / "bound.parquet", order="equal", keep=0.1)
    found = pq.read_table(kept)
    assert sorted(found["key"].to_pylist()) == sorted(pq.read_table(tmp_path / "bound.parquet")["key"].to_pylist())
    assert found["key"].to_pylist() == [key for key in keys if key in set(found["key"].to_pylist())]
    assert found["shard"].null_count == 6
    told = "6 of 6 rows have no shard, offset and size.*`diffprune embed SHARDS --model clip-retrieval:FOLDER"
    with pytest.raises(InputError, match=told):
        diffprune.prune(kept, shards, tmp_path / "pruned")
    assert diffprune.export(kept, tmp_path / "keys.txt", format="keys")["count"] == 6


def test_select_reads_it_as_it_is(small_set, tmp_path):
    _, keys, rows = small_set
    source, kept = write(tmp_path / "emb", rows.astype(np.float16), keys), tmp_path / "kept.parquet"
    chosen = diffprune.select(source, kept, order="k-center", count=5, embeddings=source)
    assert len(pq.read_table(kept)) == 5
    diffprune.cluster(source, tmp_path / "clusters", k=4)
    joined = {"order": "equal", "within": "herding", "count": 8, "embeddings": source}
    assert diffprune.select([source, tmp_path / "clusters"], kept, **joined)["count"] == 8
    rows[3] = rows[4]
    write(source, rows.astype(np.float16), keys)
    again = diffprune.select(source, kept, order="k-center", count=5, embeddings=source)
    assert again["fingerprint"] != chosen["fingerprint"]


def test_a_part_without_rows_takes_part(small_set, tmp_path):
    _, keys, rows = small_set
    source = write(tmp_path / "emb", rows.astype(np.float16), keys)
    np.save(source / "img_emb" / "img_emb_3.npy", np.zeros((0, WIDTH), np.float16))
    empty = pa.table({"image_path": pa.array([], pa.string())})
    pq.write_table(empty, source / "metadata" / "metadata_3.parquet")
    kept = tmp_path / "kept.parquet"
    assert diffprune.select(source, kept, order="k-center", count=5, embeddings=source)["count"] == 5
    assert diffprune.cluster(source, tmp_path / "clusters", k=4)["samples"] == 60
    assert diffprune.evaluate(source, source, tmp_path / "metrics.json")["metrics"]["frechet_distance"] < 1e-6


def test_binding_goes_by_key_and_tells_what_is_missing(small_set, tmp_path):
    shards, keys, rows = small_set
    shuffled = np.random.default_rng(2).permutation(60)
    renamed = [f"/data/{keys[i]}.tar.png" if i != 7 else "elsewhere.png" for i in shuffled]
    inner = [keys[i] if i != 7 else "elsewhere" for i in shuffled]
    stored = rows[shuffled].astype(np.float32)
    stored[list(shuffled).index(9)] = np.inf
    source = write(tmp_path / "emb", stored, renamed, key=inner)  # key goes before image_path
    result = diffprune.embed(shards, tmp_path / "bound", model=f"clip-retrieval:{source}")
    assert (result["failed"], result["first_error"]["key"]) == (2, keys[7])
    table = read_folder(tmp_path / "bound")
    assert "no embedding of this key" in table["error"][7].as_py() and "NaN or infinite" in table["error"][9].as_py()
    ok, values = ArrayFolder(tmp_path / "bound").load()
    assert ok["key"].to_pylist() == [key for i, key in enumerate(keys) if i not in (7, 9)]
    assert np.abs(values - np.delete(rows, (7, 9), axis=0)).max() < 6e-4
    assert None not in ok["label"].to_pylist() and None not in ok["uid"].to_pylist()
    other = write(tmp_path / "other", stored, [f"x{i}" for i in range(60)])
    with pytest.raises(InputError, match=r"none of its keys, such as 'x0', is in the shards, .* such as '"):
        diffprune.embed(shards, tmp_path / "no", model=f"clip-retrieval:{other}")
    assert not (tmp_path / "no").exists()


def test_a_bound_folder_takes_new_shards_and_refuses_other_embeddings_of_those_that_are_done(small_set, tmp_path):
    shards, keys, rows = small_set
    first, *others = sorted(shards.glob("*.tar"))
    bind = {"model": f"clip-retrieval:{tmp_path / 'emb'}"}
    write(tmp_path / "emb", rows.astype(np.float16), keys)
    for late in ("10", "11"):
        (tmp_path / "emb" / "img_emb" / f"img_emb_{late}.npy").unlink()
        (tmp_path / "emb" / "metadata" / f"metadata_{late}.parquet").unlink()
    assert diffprune.embed(first, tmp_path / "grown", **bind)["samples"] == 25
    write(tmp_path / "emb", rows.astype(np.float16), keys)
    grown = diffprune.embed([first, *others], tmp_path / "grown", **bind)
    assert (grown["shards_done_before"], grown["samples"], grown["failed"]) == (1, 60, 0)
    diffprune.embed(shards, tmp_path / "at_once", **bind)
    assert contents(tmp_path / "grown") == contents(tmp_path / "at_once")
    last = others[-1].stem
    for changed in (np.flip(rows[50:], axis=1), np.full((10, WIDTH), np.nan)):
        write(tmp_path / "emb", np.concatenate([rows[:50], changed]).astype(np.float16), keys)
        with pytest.raises(ResumeError, match=rf": {last} \(now with other embeddings\)\. Give another"):
            diffprune.embed(shards, tmp_path / "grown", **bind)
    write(tmp_path / "emb", rows.astype(np.float16), [*keys[:59], "elsewhere"])
    with pytest.raises(ResumeError, match=rf": {last} \(now with other embeddings\)\. Give another"):
        diffprune.embed(shards, tmp_path / "grown", **bind)


def test_missing_embeddings_do_not_stop_the_run_and_bad_ones_do(small_set, tmp_path):
    shards, keys, rows = small_set
    stored = rows.astype(np.float32)
    stored[10:20] = np.nan
    others = [key if i < 20 else f"x{i}" for i, key in enumerate(keys)]
    source = write(tmp_path / "emb", stored, others)
    bind = {"model": f"clip-retrieval:{source}"}
    with pytest.raises(StoppedError, match=f"10 samples in a row failed, such as key '{keys[10]}'.*NaN"):
        diffprune.embed(shards, tmp_path / "stopped", **bind, max_failures=10)
    assert diffprune.embed(shards, tmp_path / "bound", **bind, max_failures=11)["failed"] == 50
    assert diffprune.embed(shards, tmp_path / "any", **bind, max_failures=0)["failed"] == 50
    next((tmp_path / "any").glob("*.npy")).unlink()
    with pytest.raises(ResumeError, match="npy: lost, but the table"):
        diffprune.embed(shards, tmp_path / "any", **bind, max_failures=0)
    with pytest.raises(InputError, match="max_failures: expected 0 or more"):
        diffprune.embed(shards, tmp_path / "no", **bind, max_failures=-1)
    for given in ({"precision": "bf16"}, {"max_pixels": 10}, {"strict_decode": False}):
        with pytest.raises(InputError, match=f"clip-retrieval: no image is read.*{next(iter(given))}"):
            diffprune.embed(shards, tmp_path / "no", **bind, **given)
    assert not (tmp_path / "no").exists()


def test_paths_become_keys_up_to_the_first_dot_of_their_last_part(small_set, tmp_path):
    _, _, rows = small_set
    names = [f"v1.2/img{i}.v3.jpg" for i in range(60)]
    uids = [f"{i:032x}" if i % 2 else f"{i:032X}" if i else "none" for i in range(60)]
    folder = ArrayFolder(write(tmp_path / "emb", rows.astype(np.float16), names, uid=uids))
    table = folder.load()[0]
    assert table["key"].to_pylist() == [f"v1.2/img{i}" for i in range(60)]
    assert table["uid"].to_pylist() == [None, *uids[1:]]
    assert pickle.loads(pickle.dumps(folder)).load()[0].equals(table)


def broken(folder: Path, what: str) -> None:
    embeddings, metadata = folder / "img_emb" / "img_emb_10.npy", folder / "metadata" / "metadata_10.parquet"
    rows = np.load(embeddings)
    if what == "row mismatch":
        np.save(embeddings, rows[:-1])
    elif what == "no metadata":
        metadata.unlink()
    elif what == "no keys":
        pq.write_table(pa.table({"caption": ["a"] * len(rows)}), metadata)
    elif what == "null key":
        keys = pq.read_table(metadata)["image_path"].to_pylist()
        pq.write_table(pa.table({"image_path": [*keys[:3], None, *keys[4:]]}), metadata)
    elif what == "keys of lists":
        pq.write_table(pa.table({"key": [["a"]] * len(rows)}), metadata)
    elif what == "twice":
        keys = pq.read_table(metadata)["image_path"].to_pylist()
        pq.write_table(pa.table({"image_path": [keys[1], *keys[1:]]}), metadata)
    elif what == "width":
        np.save(embeddings, rows[:, :-1])
    elif what == "pickle":
        np.save(embeddings, np.array([{"a": 1}]), allow_pickle=True)
    elif what == "integers":
        np.save(embeddings, rows.astype(np.int32))
    elif what == "empty":
        for path in (folder / "img_emb").iterdir():
            path.unlink()
    else:
        rows[5] = np.nan if what == "nan" else 0
        np.save(embeddings, rows)


@pytest.mark.parametrize(
    ("what", "complaint"),
    [
        ("row mismatch", r"img_emb_10.npy: 16 embeddings, but metadata_10.parquet has 17 rows"),
        ("no metadata", r"metadata_10.parquet: no such file: it has the keys"),
        ("no keys", r"metadata_10.parquet: no column 'key'; it has caption"),
        ("keys of lists", r"metadata_10.parquet: key: expected strings, found list"),
        ("null key", "image_path: row 3 has no key"),
        ("twice", "stands in it twice"),
        ("width", "embeddings of 23 dimensions, but img_emb_2.npy has 24: they are of two models"),
        ("pickle", r"img_emb_10.npy: not a readable .npy file"),
        ("integers", r"expected \[n, D\] float16 or float32, found \[17, 24\] int32"),
        ("empty", r"expected img_emb_0.npy"),
        ("nan", "NaN.*{key}"),
        ("zero", "1 embeddings are all zero, key '{key}' first"),
    ],
)
def test_a_folder_that_does_not_hold_together_is_told(small_set, tmp_path, what, complaint):
    _, keys, rows = small_set
    source = write(tmp_path / "emb", rows.astype(np.float16), keys)
    broken(source, what)
    with pytest.raises(InputError, match=complaint.format(key=keys[45])):
        diffprune.cluster(source, tmp_path / "clusters", k=2)
    assert not (tmp_path / "clusters").exists()
    with pytest.raises(InputError, match="expected latents, found embeddings"):
        ArrayFolder(source, kind="latents")

"""Each export is read back by the tool that it is for, where that tool installs."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffprune.errors import InputError
from diffprune.exporting import export
from diffprune.pruning import prune
from diffprune.shards import index_shard, list_shards
from diffprune.tables import write_table

SIZES = [4, 3, 5]
KEPT = [0, 2, 8, 10, 11]  # nothing of the second shard; keys with a folder and braces among them


def key_of(number: int) -> str:
    return {2: "a/b{1,2}c", 3: "a/d{x}", 5: "e,f"}.get(number, f"k{number:02d}")


def png(number: int) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (number, 2 * number, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def data(tmp_path) -> Path:
    """12 samples in three shards under in/, and kept.parquet with five of them."""
    rows, start = [], 0
    (tmp_path / "in").mkdir()
    for shard, size in enumerate(SIZES):
        path = tmp_path / f"in/t-{shard:04d}.tar"
        with tarfile.open(path, "w") as tar:
            for number in range(start, start + size):
                members = {"png": png(number), "cls": b"%d" % number, "json": json.dumps({"n": number}).encode()}
                for extension, content in members.items():
                    info = tarfile.TarInfo(f"{key_of(number)}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        rows += [(path.name, sample) for sample in index_shard(path).samples]
        start += size
    kept = [rows[number] for number in KEPT]
    columns = {
        "key": [sample.key for _, sample in kept],
        "shard": [name for name, _ in kept],
        "offset": [sample.offset for _, sample in kept],
        "size": [sample.size for _, sample in kept],
        "uid": [hashlib.md5(sample.key.encode()).hexdigest() for _, sample in kept],
    }
    write_table(tmp_path / "kept.parquet", pa.table(columns), {"stage": "select"})
    return tmp_path


@pytest.fixture
def pruned(data) -> Path:
    prune(data / "kept.parquet", data / "in", data / "pruned", shard_size=3)
    return data / "pruned"


def test_keys_are_one_a_line(data):
    report = export(data / "kept.parquet", data / "keys.txt", format="keys")
    assert (data / "keys.txt").read_text().splitlines() == [key_of(number) for number in KEPT]
    assert (report["count"], report["format"]) == (5, "keys")


def test_a_key_with_a_line_break_is_no_line_of_a_list(data):
    table = pq.read_table(data / "kept.parquet")
    keys = ["a\nb", *table["key"].to_pylist()[1:]]
    pq.write_table(table.set_column(table.column_names.index("key"), "key", pa.array(keys)), data / "odd.parquet")
    with pytest.raises(InputError, match=r"odd.parquet: key 'a\\nb' has a line break"):
        export(data / "odd.parquet", data / "keys.txt", format="keys")
    assert not (data / "keys.txt").exists()


def test_datacomp_finds_each_uid_by_bisection(data):
    """As DataComp's resharder does: memory-mapped, sorted, one lookup per uid."""
    export(data / "kept.parquet", data / "subset.npy", format="datacomp")
    subset = np.load(data / "subset.npy", mmap_mode="r", allow_pickle=False)
    assert subset.dtype == np.dtype("u8,u8") and subset.shape == (5,)
    assert (np.sort(subset) == subset).all()
    for number in range(12):
        uid = hashlib.md5(key_of(number).encode()).hexdigest()
        wanted = np.array([(int(uid[:16], 16), int(uid[16:32], 16))], dtype="u8,u8")
        place = int(np.searchsorted(subset, wanted)[0])
        assert (place < 5 and subset[place] == wanted[0]) == (number in KEPT)


@pytest.mark.parametrize(
    ("uids", "message"),
    [
        (["0" * 32, None], "key 'k01': expected a uid of 32 hex digits, found None"),
        (["0" * 32, "xyz"], "found 'xyz'"),
        (["0" * 31 + "a", "0" * 31 + "A"], f"1 uids stand in it twice, first {'0' * 31}a"),
    ],
)
def test_datacomp_needs_a_uid_of_each_sample(tmp_path, uids, message):
    write_table(tmp_path / "kept.parquet", pa.table({"key": ["k00", "k01"], "uid": uids}), {"stage": "select"})
    with pytest.raises(InputError, match=message):
        export(tmp_path / "kept.parquet", tmp_path / "x.npy", format="datacomp")
    write_table(tmp_path / "kept.parquet", pa.table({"key": ["k00"]}), {"stage": "select"})
    with pytest.raises(InputError, match="no column 'uid'"):
        export(tmp_path / "kept.parquet", tmp_path / "x.npy", format="datacomp")
    assert not (tmp_path / "x.npy").exists()


def test_energon_loads_what_is_kept_of_the_whole_shards(data):
    energon = pytest.importorskip("megatron.energon")
    from megatron.energon.tools.prepare import command

    arguments = ["--non-interactive", "--num-workers", "1", "--split-parts", "train:t-{0000..0002}.tar"]
    arguments += ["--sample-type", "ImageSample", "--field-map", '{"image": "png"}', str(data / "in")]
    command.main(arguments, standalone_mode=False)
    split = data / "in/.nv-meta/split.yaml"
    export(data / "kept.parquet", split, format="energon", shards=data / "in")
    assert "t-0001.tar" in split.read_text()
    dataset = energon.get_train_dataset(
        str(data / "in"),
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=None,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        repeat=False,
    )
    found = [sample.__key__ for sample in energon.get_loader(dataset)]
    assert sorted(found) == sorted(key_of(number) for number in KEPT)


def test_wids_reads_each_kept_sample_by_number(pruned):
    wids = pytest.importorskip("wids")
    report = export(pruned.parent / "kept.parquet", pruned / "index.json", format="wids", shards=pruned)
    assert report["shards"] == 2
    dataset = wids.ShardListDataset(str(pruned / "index.json"), transformations=[])
    assert len(dataset) == 5
    assert [dataset[i]["__key__"] for i in range(5)] == [key_of(number) for number in KEPT]
    shards = json.loads((pruned / "index.json").read_text())["shardlist"]
    for shard, path in zip(shards, list_shards(pruned), strict=True):
        content = path.read_bytes()
        assert shard["md5sum"] == hashlib.md5(content).hexdigest() and shard["filesize"] == len(content)


def test_timm_s_rules_find_every_shard_and_length(pruned):
    """timm's reader (timm/data/readers/reader_wds.py): splits.<split> with name, num_samples, filenames, shard_lengths;
    file names are joined to the folder of _info.json and read by webdataset."""
    wds = pytest.importorskip("webdataset")
    export(pruned.parent / "kept.parquet", pruned / "_info.json", format="timm", shards=pruned, split="train")
    info = json.loads((pruned / "_info.json").read_text())["splits"]["train"]
    assert info["name"] == "train" and info["num_samples"] == 5
    for name, length in zip(info["filenames"], info["shard_lengths"], strict=True):
        samples = list(wds.WebDataset(str(pruned / name), shardshuffle=False))
        assert len(samples) == length
        assert all(sample["png"] and int(sample["cls"]) in KEPT for sample in samples)
    assert sum(info["shard_lengths"]) == 5


def test_hugging_face_datasets_reads_the_pruned_shards(pruned, tmp_path):
    datasets = pytest.importorskip("datasets")
    files = [str(path) for path in list_shards(pruned)]
    found = datasets.load_dataset("webdataset", data_files={"train": files}, split="train", cache_dir=tmp_path / "hf")
    assert found["__key__"] == [key_of(number) for number in KEPT]
    assert [row["n"] for row in found["json"]] == KEPT
    assert found[1]["png"].getpixel((0, 0)) == (2, 4, 0)


def test_shards_that_do_not_fit_the_selection_are_refused(data, pruned):
    kept = data / "kept.parquet"
    for format in ("wids", "timm"):
        with pytest.raises(
            InputError, match=r"7 samples of the shards are not kept, 'k01' first; run `diffprune prune`"
        ):
            export(kept, data / "in/x.json", format=format, shards=data / "in")
    for format in ("wids", "energon"):
        with pytest.raises(InputError, match=r"2 of 5 keys, 'k10' first, are not in the shards given"):
            export(kept, data / "x.json", format=format, shards=list_shards(pruned)[0])
    with pytest.raises(InputError, match="timm looks for its shards beside this file"):
        export(kept, data / "_info.json", format="timm", shards=pruned)
    with pytest.raises(InputError, match="timm takes 'tarred' for file names"):
        export(kept, pruned / "_info.json", format="timm", shards=pruned, split="tarred")


def test_arguments_that_cannot_be_used_are_refused(data):
    kept = data / "kept.parquet"
    for arguments, message in [
        ({"format": "csv"}, "expected one of keys, datacomp, energon, wids, timm"),
        ({"format": "wids"}, "give those that `diffprune prune` wrote"),
        ({"format": "energon"}, "give those that the selection was made from"),
        ({"format": "keys", "shards": data / "in"}, "needs no shards"),
    ]:
        with pytest.raises(InputError, match=message):
            export(kept, data / "x", **arguments)
    with pytest.raises(InputError, match="found a folder"):
        export(kept, data / "in", format="keys")
    assert export(kept, data / "x", format="keys", dry_run=True)["count"] == 5
    assert not (data / "x").exists()


def test_pruning_goes_on_beside_what_export_wrote(data, pruned):
    for name, format in (("index.json", "wids"), ("_info.json", "timm"), (".nv-meta/split.yaml", "energon")):
        export(data / "kept.parquet", pruned / name, format=format, shards=pruned)
    assert prune(data / "kept.parquet", data / "in", pruned, shard_size=3)["present"] == 2


def test_shards_that_are_links_go_by_the_links_names(data, pruned):
    """As in Hugging Face's cache, where each file is a link to a blob; the folder may be one too."""
    blobs, linked = data / "blobs", data / "linked"
    for source, name in ((data / "in", "all"), (pruned, "few")):
        (linked / name).mkdir(parents=True)
        for number, path in enumerate(list_shards(source)):
            blob = blobs / name / f"{number:x}"
            blob.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(path.read_bytes())
            (linked / name / path.name).symlink_to(blob)
    (data / "short").symlink_to(linked / "all")
    kept = data / "kept.parquet"
    for out in (linked / "all/.nv-meta/split.yaml", data / "short/.nv-meta/split.yaml"):
        export(kept, out, format="energon", shards=data / "short")
        text = out.read_text()
        assert '- "t-0000.tar"' in text and '"t-0001.tar"' in text and "blobs" not in text
    export(kept, linked / "few/index.json", format="wids", shards=linked / "few")
    urls = [shard["url"] for shard in json.loads((linked / "few/index.json").read_text())["shardlist"]]
    assert urls == [path.name for path in list_shards(pruned)]
    export(kept, linked / "few/_info.json", format="timm", shards=linked / "few")
    info = json.loads((linked / "few/_info.json").read_text())["splits"]["train"]
    assert info["filenames"] == urls
    with pytest.raises(InputError, match="timm looks for its shards beside this file"):
        export(kept, blobs / "few/_info.json", format="timm", shards=linked / "few")

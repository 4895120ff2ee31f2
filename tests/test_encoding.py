"""Latents and embeddings are what the model gives, row-aligned with their keys, whatever the batch size."""

from __future__ import annotations

import shutil
import tracemalloc

import numpy as np
import pytest
import torch

import diffprune
from diffprune import image_maps
from diffprune.arrays import ArrayFolder, write_array
from diffprune.checkpoints import load_vqvae
from diffprune.decode import load_images
from diffprune.errors import InputError, ResumeError
from diffprune.image_maps import ImageMap, Network, Reading
from diffprune.models.vqvae import VQVAE
from diffprune.shards import index_found, index_shards
from diffprune.tables import read_folder


def damage_image(shard, key: bytes = b".png") -> str:
    """Flip a bit in the middle of the third image of a shard; returns its key."""
    from diffprune.shards import index_shard

    sample = index_shard(shard).samples[2]
    member = sample.images()[0]
    data = bytearray(shard.read_bytes())
    data[member.data_offset + member.size // 2] ^= 1
    shard.write_bytes(data)
    return sample.key


def test_latents_are_the_encoders_row_by_row(small_run):
    model, _ = load_vqvae(small_run.vqvae, torch.device("cpu"))
    table, images = load_images(small_run.shards, size=16, channels=1)
    folder = ArrayFolder(small_run.latents, kind="latents")
    rows, latents = folder.load()
    assert rows["key"].to_pylist() == table["key"].to_pylist()
    assert rows["label"].to_pylist() == table["label"].to_pylist()
    for row in (0, 1, 57, 119):
        with torch.inference_mode():
            expected = model.encode(torch.from_numpy(images[row : row + 1]).float() / 127.5 - 1)[0].numpy()
        assert np.abs(latents[row] - expected).max() < 2e-3 * max(1, np.abs(expected).max())
    assert folder.metadata["latent_scale"] == pytest.approx(float(model.latent_scale))
    assert abs(latents.std() - 1) < 0.2  # what latent_scale is for


def test_embeddings_are_unit_vectors_and_tell_digits_apart(small_run):
    _, embeddings = ArrayFolder(small_run.embeddings, kind="embeddings").load()
    assert np.allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-3)
    assert len({row.tobytes() for row in embeddings}) > 100
    with pytest.raises(InputError, match="expected latents, found embeddings"):
        ArrayFolder(small_run.embeddings, kind="latents")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch_size", [16, 23, 64])
def test_batch_size_and_threads_change_no_byte(small_run, tmp_path, batch_size, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        diffprune.encode(small_run.shards, small_run.vqvae, tmp_path / "a", batch_size=batch_size)
    finally:
        torch.set_num_threads(before)
    for stem in ArrayFolder(small_run.latents).stems:
        assert (tmp_path / "a" / f"{stem}.npy").read_bytes() == (small_run.latents / f"{stem}.npy").read_bytes()


@pytest.mark.parametrize(("fits", "tried"), [(24, [56, 32, 16, 16]), (32, [56, 32, 24, 32])])  # shards of 50
def test_where_memory_runs_out_fewer_images_go_at_once(small_run, tmp_path, monkeypatch, fits, tried):
    encode, seen = VQVAE.encode, []

    def short_of_memory(self, images):
        seen.append(len(images))
        if len(images) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(self, images)

    monkeypatch.setattr(VQVAE, "encode", short_of_memory)
    diffprune.encode(small_run.shards, small_run.vqvae, tmp_path / "a", batch_size=64)
    assert seen[1:5] == tried  # after a single blank image, for the shape
    for stem in ArrayFolder(small_run.latents).stems:
        assert (tmp_path / "a" / f"{stem}.npy").read_bytes() == (small_run.latents / f"{stem}.npy").read_bytes()


def test_a_small_batch_size_is_kept(small_run, tmp_path, monkeypatch):
    encode, seen = VQVAE.encode, []

    def counted(self, images):
        seen.append(len(images))
        return encode(self, images)

    monkeypatch.setattr(VQVAE, "encode", counted)
    diffprune.encode(small_run.shards, small_run.vqvae, tmp_path / "a", batch_size=3)
    assert set(seen[1:]) == {3}
    diffprune.encode(small_run.shards, small_run.vqvae, tmp_path / "b", batch_size=3)
    for stem in ArrayFolder(small_run.latents).stems:
        assert (tmp_path / "a" / f"{stem}.npy").read_bytes() == (tmp_path / "b" / f"{stem}.npy").read_bytes()
        a, b = ArrayFolder(tmp_path / "a").array(stem), ArrayFolder(small_run.latents).array(stem)
        assert np.abs(a.astype(np.float32) - b).max() <= 2e-3  # one float16 rounding step apart at most


def test_where_not_even_one_image_fits_it_says_so(small_run, tmp_path, monkeypatch):
    seen = []

    def short_of_memory(self, images):
        seen.append(len(images))
        if len(seen) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return torch.zeros(1, *self.latent_shape)

    monkeypatch.setattr(VQVAE, "encode", short_of_memory)
    with pytest.raises(InputError, match=r"out of memory with the smallest batch, 1 rows .*2 GiB.*smaller model"):
        diffprune.encode(small_run.shards, small_run.vqvae, tmp_path / "a", batch_size=64)
    assert seen[1:] == [56, 32, 16, 8, 4, 2, 1]
    assert not list((tmp_path / "a").glob("*.npy"))


@pytest.mark.parametrize("batch_size", [5, 64])
def test_networks_see_one_memory_layout(small_run, batch_size):
    """The decoder gives [H, W, C] in memory, in which a convolution would round otherwise."""
    seen = []

    def function(images):
        seen.append(images.is_contiguous())
        return images.float().mean(dim=(2, 3))

    network = Network(function, 16, 3, {"model": "mean"}, "", torch.device("cpu"))
    images = ImageMap(network, small_run.shards, batch_size, Reading())
    for stem in images.indexes:
        images.run(stem, images.batches(stem))
    assert len(seen) > 2 and all(seen)


def test_a_damaged_image_is_a_failed_row_and_the_rest_stands(small_run, tmp_path):
    shards = tmp_path / "shards"
    shutil.copytree(small_run.shards, shards)
    key = damage_image(sorted(shards.glob("*.tar"))[1])
    result = diffprune.encode(shards, small_run.vqvae, tmp_path / "latents")
    assert (result["samples"], result["failed"], result["first_error"]["key"]) == (120, 1, key)
    folder = ArrayFolder(tmp_path / "latents")
    table, latents = folder.load()
    assert len(latents) == 119 and key not in table["key"].to_pylist()
    full = read_folder(tmp_path / "latents")
    row = full["key"].to_pylist().index(key)
    assert full["status"][row].as_py() == "failed" and "damaged" in full["error"][row].as_py()
    stem = folder.stems[1]
    assert np.isnan(folder.array(stem)[2]).all() and np.isfinite(folder.array(stem)[:2]).all()
    # and it stays failed, not lost, down the road
    scores = diffprune.score(tmp_path / "latents", small_run.surrogate, tmp_path / "scores", methods=("loss",))
    assert (scores["samples"], scores["failed"]) == (120, 1)
    kept = diffprune.select(tmp_path / "scores", tmp_path / "kept.parquet", by="loss", keep=1.0)
    assert kept["count"] == 119


def test_another_vqvae_or_reading_is_refused(small_run, tmp_path):
    out = tmp_path / "latents"
    shutil.copytree(small_run.latents, out)
    checkpoints = sorted(small_run.vqvae.glob("step_*"))
    with pytest.raises(ResumeError, match="model_sha256"):
        diffprune.encode(small_run.shards, checkpoints[0], out)
    with pytest.raises(ResumeError, match="max_pixels"):
        diffprune.encode(small_run.shards, small_run.vqvae, out, max_pixels=10**7)


def repacked(path) -> None:
    """Without its last sample, of the same size."""
    samples = index_shards(path)[0].samples
    data = path.read_bytes()
    path.write_bytes(data[: samples[-1].offset] + bytes(len(data) - samples[-1].offset))


def test_parts_index_their_own_shards_only_and_make_the_same_folder(small_run, tmp_path, monkeypatch):
    shutil.copytree(small_run.shards, tmp_path / "shards")
    paths = sorted((tmp_path / "shards").glob("*.tar"))
    assert len(paths) == 3
    whole = paths[2].read_bytes()
    paths[2].write_bytes(b"x" + whole[1:])  # damaged, but not one of the first part's
    indexed = []
    monkeypatch.setattr(image_maps, "index_found", lambda own: indexed.append(list(own)) or index_found(own))
    out = tmp_path / "latents"
    for part, done in (("1/4", 0), ("2/4", 1), ("3/4", 1)):
        report = diffprune.encode(tmp_path / "shards", small_run.vqvae, out, part=part)
        assert (report["shards"], report["samples"]) == (done, 50 * done)
    with pytest.raises(InputError, match=f"{paths[2]}: at byte"):
        diffprune.encode(tmp_path / "shards", small_run.vqvae, out, part="4/4")
    paths[2].write_bytes(whole)
    diffprune.encode(tmp_path / "shards", small_run.vqvae, out, part="4/4")
    assert indexed == [[], [paths[0]], [paths[1]], [paths[2]], [paths[2]]]
    for file in sorted(small_run.latents.glob("*.*")):
        assert (out / file.name).read_bytes() == file.read_bytes(), file.name
    repacked(paths[1])
    with pytest.raises(ResumeError, match=rf"than there are now: {paths[1].stem} \(now with other names, sizes, times"):
        diffprune.encode(tmp_path / "shards", small_run.vqvae, out)
    paths[0].write_bytes(paths[0].read_bytes() + bytes(512))
    with pytest.raises(ResumeError, match=rf"than there are now: {paths[0].stem} \(now of another size\)"):
        diffprune.encode(tmp_path / "shards", small_run.vqvae, out, part="2/4")


def test_arrays_that_do_not_fit_their_table_are_refused(small_run, tmp_path):
    out = tmp_path / "latents"
    shutil.copytree(small_run.latents, out)
    stem = ArrayFolder(out).stems[0]
    write_array(out / f"{stem}.npy", np.zeros((3, 4)))
    with pytest.raises(InputError, match=r"expected float16 with 50 rows, found float16 \(3, 4\)"):
        ArrayFolder(out).load()
    np.save(out / f"{stem}.npy", np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(InputError, match="not a readable"):
        ArrayFolder(out).load()


def test_an_unknown_embedder_and_a_batch_of_nothing_are_told(small_run, tmp_path):
    with pytest.raises(InputError, match="vqvae:PATH"):
        diffprune.embed(small_run.shards, tmp_path / "e", model="inception")
    with pytest.raises(InputError, match="batch_size"):
        diffprune.encode(small_run.shards, small_run.vqvae, tmp_path / "e", batch_size=0)
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("end", [".npy", ".flip.npy"])
def test_a_table_whose_array_was_lost_is_not_done(small_run, tmp_path, end):
    given = [small_run.shards, small_run.vqvae, tmp_path / "latents"]
    diffprune.encode(*given, flip_twins=True)
    [first, *_] = sorted((tmp_path / "latents").glob("*.parquet"))
    lost = first.with_name(first.stem + end)
    content = lost.read_bytes()
    lost.unlink()
    for dry_run in (True, False):
        with pytest.raises(ResumeError, match=f"{lost.name}: lost, .*delete {first.name} and run the same command"):
            diffprune.encode(*given, flip_twins=True, dry_run=dry_run)
    first.unlink()
    assert diffprune.encode(*given, flip_twins=True)["shards_done_before"] == 2
    assert lost.read_bytes() == content


def test_latents_are_gathered_in_the_memory_that_they_take(small_run, monkeypatch):
    folder = ArrayFolder(small_run.latents)
    array, shape = folder.array, (64, 64, 64)
    monkeypatch.setattr(folder, "array", lambda stem: np.broadcast_to(np.float16(2), (len(array(stem)), *shape)))
    tracemalloc.start()
    try:
        _, values = folder.load(dtype=np.float16)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert values.shape == (120, *shape) and (values == 2).all()
    assert peak < 1.9 * values.nbytes  # with two shards on the way, of 50 of the 120 images each; not everything twice

"""The parts that sweeps brought: splits and long tails, the classifier's features, a reference that is held out."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import t

import diffprune
from diffprune.arrays import ArrayFolder
from diffprune.errors import InputError
from diffprune.evaluation import memorization
from diffprune.models.classifier import train_classifier
from diffprune.reporting.tables import METRICS
from diffprune.sweeping.differences import student_t
from diffprune.sweeping.groups import Group, against_random
from diffprune.sweeping.results import class_table, markdown
from diffprune.sweeping.splits import long_tail, split_samples
from diffprune.tables import kept_keys, read_folder


@pytest.fixture(scope="module")
def split(small_run, tmp_path_factory):
    """Shards of 90 and 30 digits."""
    root = tmp_path_factory.mktemp("split")
    split_samples(small_run.shards, root / "train.parquet", root / "held-out.parquet", share=0.25)
    for name in ("train", "held-out"):
        diffprune.prune(root / f"{name}.parquet", small_run.shards, root / name)
    return root


def labels_of(keys) -> Counter:
    return Counter(key.split("/")[0] for key in keys)


def test_a_share_of_each_class_is_held_out(split, small_run, tmp_path):
    train, held_out = (kept_keys(split / f"{name}.parquet") for name in ("train", "held-out"))
    assert not train & held_out and len(train | held_out) == 120
    assert set(labels_of(held_out).values()) == {3} and set(labels_of(train).values()) == {9}
    counts = split_samples(small_run.shards, tmp_path / "a", tmp_path / "b", share=0.25, seed=1)
    assert counts == (90, 30) and kept_keys(tmp_path / "b") != held_out


def test_a_long_tail(small_run, tmp_path):
    assert long_tail([400] * 10, 10.0) == [400, 310, 240, 186, 144, 111, 86, 67, 52, 40]
    assert long_tail([7, 5, 9], 1.0) == [7, 5, 9] and long_tail([7, 5, 9], 4.0) == [5, 3, 1]
    counts = split_samples(small_run.shards, tmp_path / "a", tmp_path / "b", share=0.25, skew=9.0)
    tail = labels_of(kept_keys(tmp_path / "a"))
    assert counts == (tail.total(), 30) and [tail[str(label)] for label in range(10)] == long_tail([9] * 10, 9.0)
    whole, held_out = tmp_path / "c", tmp_path / "d"
    split_samples(small_run.shards, whole, held_out, share=0.25)
    assert kept_keys(held_out) == kept_keys(tmp_path / "b") and kept_keys(tmp_path / "a") < kept_keys(whole)
    assert not (tmp_path / "f").exists()
    assert split_samples(small_run.shards, tmp_path / "e", tmp_path / "f", share=0.0) == (120, 0)
    assert not (tmp_path / "f").exists()


def test_a_classifiers_features(split, tmp_path):
    about = train_classifier(split / "train", tmp_path / "one", image_size=16, epochs=80)
    assert (about["images"], about["classes"], about["image_size"], about["channels"]) == (90, 10, 16, 1)
    assert about["accuracy"] > 0.3  # of 90 digits, in 72 steps; a tenth is chance
    again = train_classifier(split / "train", tmp_path / "two", image_size=16, epochs=80)
    assert again["accuracy"] == about["accuracy"]
    weights = [(tmp_path / name / "classifier.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]
    diffprune.embed(split / "held-out", tmp_path / "features", model=f"classifier:{tmp_path / 'one'}")
    folder = ArrayFolder(tmp_path / "features", "embeddings")
    _, values = folder.load()
    assert values.shape == (30, 64) and len(folder.metadata["model_sha256"]) == 64
    assert np.linalg.norm(values, axis=1).std() > 0.01  # their length means something


def test_a_classifier_that_cannot_be(split, small_run, tmp_path):
    with pytest.raises(InputError, match="squares of a multiple of 8, at most 64"):
        train_classifier(split / "train", tmp_path / "one", image_size=20)
    with pytest.raises(InputError, match=r"classifier\.json: no such file"):
        diffprune.embed(split / "train", tmp_path / "features", model=f"classifier:{tmp_path / 'none'}")
    train_classifier(split / "held-out", tmp_path / "good", image_size=16)
    (tmp_path / "good/classifier.safetensors").write_bytes(b"no tensors")
    with pytest.raises(InputError, match=r"classifier\.safetensors: not a readable"):
        diffprune.embed(split / "train", tmp_path / "features", model=f"classifier:{tmp_path / 'good'}")
    (tmp_path / "good/classifier.json").write_text(json.dumps({"image_size": 10**9, "channels": 1, "classes": 2}))
    with pytest.raises(InputError, match="expected image_size, channels and classes"):
        diffprune.embed(split / "train", tmp_path / "features", model=f"classifier:{tmp_path / 'good'}")


def test_a_reference_that_is_held_out(split, small_run, tmp_path):
    model = f"vqvae:{small_run.vqvae}"
    for name in ("train", "held-out"):
        diffprune.embed(split / name, tmp_path / name, model=model)
    diffprune.sample(small_run.surrogate, small_run.vqvae, tmp_path / "samples", count=20, steps=2)
    diffprune.embed(tmp_path / "samples", tmp_path / "made", model=model)
    kept = tmp_path / "kept.parquet"
    diffprune.select(tmp_path / "train", kept, order="random", count=40)
    files = {name: tmp_path / f"{name}.json" for name in ("kept", "all")}
    arguments = (tmp_path / "made", tmp_path / "held-out")
    found = {
        "kept": diffprune.evaluate(*arguments, files["kept"], training=tmp_path / "train", kept=kept),
        "all": diffprune.evaluate(*arguments, files["all"], training=tmp_path / "train"),
    }
    made, held_out = (torch.from_numpy(ArrayFolder(folder).load()[1]) for folder in arguments)
    table, values = ArrayFolder(tmp_path / "train").load()
    inside = np.isin(table["key"].to_pylist(), list(kept_keys(kept)))
    for name, rows in (("kept", inside), ("all", np.ones(90, bool))):
        expected = memorization(made, torch.from_numpy(values[rows]), held_out)
        nearness = found[name]["memorization"]
        assert nearness["baseline"] == "held-out" and nearness["baseline_count"] == 30
        assert (
            nearness["median_ratio"] == expected["median_ratio"] and nearness["baseline_p1"] == expected["baseline_p1"]
        )
        assert found[name]["context"]["training_images"] == rows.sum()
        assert {pair["training"] for pair in nearness["closest_pairs"]} <= set(np.array(table["key"].to_pylist())[rows])
    plain = diffprune.evaluate(*arguments, tmp_path / "plain.json")
    for metric in ("frechet_distance", "precision", "vendi_score", "class_kl_reference"):
        assert plain["metrics"][metric] == found["kept"]["metrics"][metric] == found["all"]["metrics"][metric]
    with pytest.raises(InputError, match=r"is in .* too; expected a reference that nothing was trained on"):
        diffprune.evaluate(tmp_path / "made", tmp_path / "train", tmp_path / "x.json", training=tmp_path / "train")


def test_the_latents_are_of_all_images(small_run):
    """`select` takes a latents folder as a table without scores: what `random` in a sweep is given."""
    table = read_folder(small_run.latents)
    assert table.num_rows == 120 and set(table.column_names) >= {"key", "shard", "offset", "size", "label"}


def test_a_class_that_no_reference_has_is_none_of_the_generated():
    group = Group("full", 0.0, 9, {}, {"0": [0.75, 0.5], "1": [0.25, 0.5]}, {"0": 0.6, "1": 0.3, "2": 0.1})
    lines = class_table([group]).splitlines()
    assert lines[-2:] == [
        "| full | 0% | trained on | 60.0\xa0% | 30.0\xa0% | 10.0\xa0% | 10.0\xa0% |",
        "| full | 0% | generated | 62.5\xa0% | 37.5\xa0% | 0\xa0% | 0\xa0% ± 0\xa0% |",
    ]


def grid(**seeds: dict[int, float]) -> list[Group]:
    """A group per method at 90%, with these Fréchet distances by seed."""
    none: dict[str, dict[int, float]] = {metric.key: {} for metric in METRICS}
    return [
        Group(name.replace("_", "-"), 0.9, 9, none | {"frechet_distance": by}, {}, {}) for name, by in seeds.items()
    ]


def test_a_difference_is_clear_beyond_the_interval_of_equal_seeds():
    values = {0: 100.0, 1: 140.0, 2: 120.0}
    groups = grid(
        random=values,
        better={seed: value - 30 + seed for seed, value in values.items()},  # what seeds share does not hide it
        same={seed: value + (-9, 8, 3)[seed] for seed, value in values.items()},
        one_seed={1: 100.0},
        other_seeds={7: 1.0, 8: 2.0},
        equal={seed: value - 5 for seed, value in values.items()},
    )
    found = {method: pairs.get("frechet_distance") for (method, _), pairs in against_random(groups).items()}
    better, one = found["better"], found["one-seed"]
    assert (better.mean, better.seeds, better.is_clear) == (pytest.approx(-29), 3, True)
    assert better.half_width == pytest.approx(4.302652729911275 / 3**0.5)
    assert (one.mean, one.error, one.half_width, one.is_clear) == (-40, None, None, False)
    assert not found["same"].is_clear and found["other-seeds"] is None
    assert not found["equal"].is_clear  # of numbers as coarse as counts no spread is seen
    text = markdown(groups, [])
    assert "| better | **−29.00 ± 2.48** |" in text and "| one-seed | −40.00 |" in text and "over 1 to 3 seeds" in text
    assert "| other-seeds | – |" in text
    assert "Difference" not in markdown(groups[1:], [])


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 10, 31, 200])
def test_students_t(freedom):
    assert student_t(freedom) == pytest.approx(t.ppf(0.975, freedom), rel=1e-9)

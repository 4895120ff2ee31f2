"""`evaluate`: which images go into which metric, what is written, and what it refuses."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from typer.testing import CliRunner

import diffprune
from diffprune.arrays import write_array
from diffprune.cli.app import app
from diffprune.engines import run_stage
from diffprune.errors import InputError
from diffprune.evaluation import (
    class_balance,
    frechet_distance,
    frechet_distance_infinity,
    kernel_distance,
    memorization,
    precision_recall,
    same_seed_similarity,
    vendi_score,
    vendi_scores,
)
from diffprune.shards import Member, Sample
from diffprune.tables import base_table, write_table


def write_embeddings(
    out: Path,
    values: np.ndarray,
    labels: list[int | None],
    *,
    prefix: str = "real",
    shard_size: int = 40,
    failed: tuple[int, ...] = (),
    kind: str = "embeddings",
    model_sha256: str = "a" * 64,
    sampled: dict[str, Any] | None = None,
    **config: Any,
) -> list[str]:
    """An embeddings folder of several shards; returns the keys. Rows in ``failed`` are NaN with status failed."""
    keys = [f"{prefix}/{i:05d}" for i in range(len(values))]
    stems = {
        f"{prefix}-{i:06d}": range(len(values))[i * shard_size :][:shard_size]
        for i in range(-(-len(values) // shard_size))
    }

    def work(stem: str, bar: Any) -> pa.Table:
        rows = list(stems[stem])
        array = values[rows].copy()
        array[[i for i, row in enumerate(rows) if row in failed]] = np.nan
        write_array(out / f"{stem}.npy", array)
        samples = [
            Sample(keys[row], i, (Member("x.png", "png", i * 1024, i * 1024 + 512, 100),)) for i, row in enumerate(rows)
        ]
        errors = ["truncated" if row in failed else None for row in rows]
        bar.advance(len(rows))
        return base_table(f"{stem}.tar", samples, [labels[row] for row in rows], [None] * len(rows), errors)

    head = {"kind": kind, "model": "vqvae", "model_sha256": model_sha256, "shape": list(values.shape[1:]), **config}
    about = {"model_path": "runs/vqvae", "sampled": sampled}
    run_stage("embed", out, head, list(stems), work, total=len(values), metadata=about)
    return keys


SAMPLED = {"steps": 60, "method": "heun", "guidance": 4.0, "seed": 5, "labels": [0, 1, 2], "model_sha256": "d" * 64}


def write_kept(path: Path, keys: list[str]) -> Path:
    write_table(path, pa.table({"key": pa.array(keys, pa.string())}), {"order": "highest"})
    return path


def unit_rows(n: int, d: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(n, d)) + 0.5
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


@pytest.fixture
def folders(tmp_path):
    real, made = unit_rows(130, 6, 0), unit_rows(90, 6, 1)
    keys = write_embeddings(tmp_path / "real", real, [i % 3 for i in range(130)], failed=(5,))
    write_embeddings(tmp_path / "made", made, [i % 3 for i in range(90)], prefix="made", sampled=SAMPLED)
    return tmp_path, torch.from_numpy(real).float(), torch.from_numpy(made).float(), keys


def test_evaluate_gives_each_metric_the_images_it_is_about(folders):
    root, real, made, keys = folders
    kept_rows = [i for i in range(130) if i % 4 == 0]
    kept = write_kept(root / "kept.parquet", [keys[i] for i in reversed(kept_rows)])
    result = diffprune.evaluate(root / "made", root / "real", root / "out" / "grand.json", kept=kept, device="cpu")

    ok = [i for i in range(130) if i != 5]
    held_out = [i for i in ok if i not in kept_rows]
    reference, labels = real[ok], torch.tensor(ok) % 3
    nearness = memorization(made, real[kept_rows], real[held_out])
    classes = class_balance(made, reference, labels, sample_labels=torch.arange(90) % 3)
    infinity = frechet_distance_infinity(made, reference)
    assert result["metrics"] == {
        "frechet_distance": pytest.approx(frechet_distance(made, reference), rel=1e-9),
        "frechet_distance_infinity": pytest.approx(infinity["distance"], rel=1e-9),
        "kernel_distance": kernel_distance(made, reference)["mean"],
        **precision_recall(made, reference, 3),
        "vendi_score": vendi_score(made),
        "memorization_ratio": nearness["median_ratio"],
        "memorized_share": nearness["share_below_p1"],
        "class_kl_uniform": classes["kl_uniform"],
        "class_kl_reference": classes["kl_reference"],
        "label_agreement": classes["label_agreement"],
        "same_seed_cosine": None,
    }
    assert result["vendi"]["orders"] == [0.1, 0.5, 1.0, 2.0, "inf"]
    orders = (0.1, 0.5, 1.0, 2.0, math.inf)
    assert result["vendi"]["samples"] == vendi_scores(made, orders)
    assert result["vendi"]["reference"] == pytest.approx(vendi_scores(reference, orders), rel=1e-9)
    assert result["frechet_infinity"]["sizes"] == infinity["sizes"]
    assert result["memorization"]["baseline"] == "held-out" and result["memorization"]["baseline_count"] == len(
        held_out
    )
    row, training_row, distance = nearness["closest_pairs"][0]
    assert result["memorization"]["closest_pairs"][0] == {
        "sample": f"made/{row:05d}",
        "training": keys[kept_rows[training_row]],
        "distance": distance,
    }
    context = result["context"]
    assert context["samples"]["count"] == 90 and context["reference"]["count"] == 129
    assert context["reference"]["vendi_score"] == pytest.approx(vendi_score(reference), rel=1e-9)
    assert context["reference"]["split"] == "real"
    told = {"steps": 60, "method": "heun", "guidance": 4.0, "seed": 5, "model_sha256": "d" * 64}
    assert context["sampling"] == told
    assert context["training_images"] == len(kept_rows)
    assert context["embedder"] == {"model": "vqvae", "model_sha256": "a" * 64, "dimensions": 6}
    assert context["samples"]["metadata"]["model_path"] == "runs/vqvae"
    assert result["name"] == "grand" and context["flags"] == [
        "1 of the reference images failed when they were embedded, and are left out",
        f"the memorization baseline rests on only {len(held_out)} held-out images",
    ]


def test_evaluate_writes_what_it_returns_and_the_same_bytes_again(folders):
    root, *_ = folders
    result = diffprune.evaluate(root / "made", root / "real", root / "a.json", name="all", device="cpu")
    assert json.loads((root / "a.json").read_text()) == {k: v for k, v in result.items() if k != "out"}
    diffprune.evaluate(root / "made", root / "real", root / "b.json", name="all", device="cpu")
    assert (root / "a.json").read_bytes() == (root / "b.json").read_bytes()
    assert result["out"] == str(root / "a.json")


def test_copies_and_near_duplicates_among_what_was_held_out_are_flagged(tmp_path):
    real = unit_rows(130, 6, 0)
    real[100:] = real[:30]
    keys = write_embeddings(tmp_path / "real", real, [0] * 130)
    write_embeddings(tmp_path / "made", real[:90], [0] * 90, prefix="made")
    table = pa.table({"key": keys[:100]})
    for name, about in (("plain", {}), ("dedup", {"dedup": 0.05})):
        write_table(tmp_path / f"{name}.parquet", table, {"stage": "select", **about})
        kept = tmp_path / f"{name}.parquet"
        result = diffprune.evaluate(tmp_path / "made", tmp_path / "real", tmp_path / "m.json", kept=kept)
        assert result["metrics"]["memorized_share"] is None
        assert json.loads((tmp_path / "m.json").read_text())["memorization"]["share_below_p1"] is None
        flags = " ".join(result["context"]["flags"])
        assert "no memorized share: 1% or more" in flags
        assert ("left out near-duplicates" in flags) == (name == "dedup")
    outside = {"kept": tmp_path / "dedup.parquet", "training": tmp_path / "real"}
    write_embeddings(tmp_path / "validation", unit_rows(130, 6, 3), [0] * 130, prefix="validation")
    result = diffprune.evaluate(tmp_path / "made", tmp_path / "validation", tmp_path / "m.json", **outside)
    flags = " ".join(result["context"]["flags"])
    assert result["metrics"]["memorized_share"] == 1 and "near-duplicates" not in flags and "no memorized" not in flags


def test_several_folders_are_as_one(tmp_path):
    """As for `cluster` and `select`, which take the folders that a data set grew in."""
    keys = write_embeddings(tmp_path / "real", unit_rows(130, 6, 2), [i % 3 for i in range(130)], failed=(5,))
    write_embeddings(tmp_path / "made", unit_rows(90, 6, 3), [i % 3 for i in range(90)], prefix="made")
    write_embeddings(tmp_path / "validation", unit_rows(60, 6, 4), [0] * 60, prefix="validation")
    kept = write_kept(tmp_path / "kept.parquet", keys[20:90])
    stage = json.loads((tmp_path / "real" / "stage.json").read_text())
    parts = [tmp_path / "first", tmp_path / "second"]
    for part, shards in zip(parts, (stage["shards"][:1], stage["shards"][1:]), strict=True):
        shutil.copytree(tmp_path / "real", part)
        (part / "stage.json").write_text(json.dumps({**stage, "shards": shards}))

    def told(reference: Any, **options: Any) -> dict[str, Any]:
        return diffprune.evaluate(tmp_path / "made", reference, tmp_path / "a.json", kept=kept, limit=50, **options)

    whole, both = told(tmp_path / "real"), told(parts)
    reference = both["context"].pop("reference")
    assert reference["path"] == f"{parts[0]}, {parts[1]}" and reference["split"] == "first, second"
    assert whole["context"].pop("reference")["vendi_score"] == reference["vendi_score"]
    assert both == whole
    whole, both = (told(tmp_path / "validation", training=some) for some in (tmp_path / "real", parts))
    assert both["context"].pop("training") == reference["path"] and whole["context"].pop("training")
    assert both == whole
    arguments = ["evaluate", tmp_path / "made", "--kept", kept, "-o", tmp_path / "b.json", "--limit", 50]
    arguments += ["--reference", tmp_path / "validation", "--training", parts[0], "--training", parts[1]]
    assert CliRunner().invoke(app, [*map(str, arguments)]).exit_code == 0
    assert json.loads((tmp_path / "b.json").read_text())["metrics"] == both["metrics"]
    with pytest.raises(InputError, match=r"shard 'real-000000' is in two of the folders"):
        told([tmp_path / "real", parts[0]])
    write_embeddings(tmp_path / "other", unit_rows(20, 6, 5), [0] * 20, prefix="other", image_size=32)
    with pytest.raises(InputError, match=r"first and .*other: embeddings of two kinds.*image_size is None and 32"):
        told([parts[0], tmp_path / "other"])
    write_embeddings(tmp_path / "rounded", unit_rows(20, 6, 5), [0] * 20, prefix="rounded", precision="bf16")
    mixed = told([*parts, tmp_path / "rounded"])["context"]["flags"]
    assert any("different precisions, None and None and bf16" in flag for flag in mixed)


def test_without_a_selection_the_baseline_is_leave_one_out(folders):
    root, real, made, _ = folders
    result = diffprune.evaluate(root / "made", root / "real", root / "a.json", device="cpu")
    reference = torch.cat([real[:5], real[6:]])
    assert result["memorization"]["baseline"] == "leave-one-out"
    assert result["memorization"]["baseline_median"] == memorization(made, reference)["baseline_median"]
    fewer = diffprune.evaluate(root / "made", root / "real", root / "b.json", device="cpu", limit=40)
    assert fewer["memorization"]["baseline_count"] == 40
    assert fewer["memorization"]["median_distance"] == result["memorization"]["median_distance"]  # to all of them
    own = torch.cat([reference[:40], reference[41:]])  # no image is its own neighbour
    assert fewer["memorization"]["baseline_p1"] > 0 and memorization(reference[40:41], own)["median_distance"] > 0
    assert any("no held-out images" in flag for flag in result["context"]["flags"])


def test_another_models_samples_of_the_same_seed(folders):
    root, _, made, _ = folders
    other = unit_rows(70, 6, 9)
    write_embeddings(root / "other", other[::-1], [i % 3 for i in range(70)], prefix="made", sampled=SAMPLED)
    result = diffprune.evaluate(root / "made", root / "real", root / "a.json", same_seed=root / "other", device="cpu")
    labels = torch.arange(70) % 3
    expected = same_seed_similarity(made[:70], torch.from_numpy(other[::-1].copy()).float(), labels)
    assert {name: result["same_seed"][name] for name in expected} == pytest.approx(expected)
    assert result["metrics"]["same_seed_cosine"] == result["same_seed"]["cosine"]
    assert result["same_seed"]["count"] == 70 and result["same_seed"]["sampling"]["seed"] == 5
    for changes, message in [
        ({"sampled": {**SAMPLED, "seed": 6}}, "drawn with another seed than .*made: 6 and 5"),
        ({"sampled": {**SAMPLED, "labels": [1]}}, "drawn with another labels"),
        ({"sampled": None}, "drawn with another seed"),
        ({"sampled": SAMPLED, "prefix": "unlike"}, "fewer than 2 of its keys"),
    ]:
        folder = root / f"bad{len(list(root.iterdir()))}"
        write_embeddings(folder, other, [0] * 70, **{"prefix": "made", **changes})
        refuse(root, message, same_seed=folder, out="b.json")


def test_limit_draws_a_subset_by_key_and_seed_and_says_so(folders):
    root, real, made, _ = folders
    run = {"device": "cpu", "limit": 50}
    first = diffprune.evaluate(root / "made", root / "real", root / "a.json", **run)
    again = diffprune.evaluate(root / "made", root / "real", root / "b.json", **run)
    other = diffprune.evaluate(root / "made", root / "real", root / "c.json", **run, seed=1)
    assert first["metrics"] == again["metrics"]
    assert first["metrics"]["precision"] != other["metrics"]["precision"]
    reference = torch.cat([real[:5], real[6:]])
    whole = frechet_distance(made, reference)
    assert first["metrics"]["frechet_distance"] == pytest.approx(whole, rel=1e-9)  # of all images
    assert [flag.split(", drawn")[0] for flag in first["context"]["flags"][:2]] == [
        "precision, recall and classes from 50 of 129 reference images",
        "precision, recall and classes from 50 of 90 samples",
    ]


def test_few_images_and_missing_labels_are_flagged(tmp_path):
    write_embeddings(tmp_path / "real", unit_rows(30, 64, 2), [None] * 30)
    write_embeddings(tmp_path / "made", unit_rows(20, 64, 3), [None] * 20, prefix="made")
    result = diffprune.evaluate(tmp_path / "made", tmp_path / "real", tmp_path / "a.json", device="cpu")
    flags = " / ".join(result["context"]["flags"])
    assert "fewer reference images (30) than embedding dimensions (64)" in flags
    assert "fewer samples (20) than embedding dimensions (64)" in flags
    assert "no labels" in flags and result["classes"] is None and result["metrics"]["class_kl_uniform"] is None


def test_samples_that_are_missing_are_flagged(tmp_path):
    write_embeddings(tmp_path / "real", unit_rows(30, 5, 2), [0] * 30, failed=(1, 7))
    told = []
    for name, count in (("whole", 25), ("cut", 50)):
        sampled = {**SAMPLED, "count": count}
        write_embeddings(tmp_path / name, unit_rows(25, 5, 3), [0] * 25, prefix="made", sampled=sampled, failed=(4,))
        result = diffprune.evaluate(tmp_path / name, tmp_path / "real", tmp_path / f"{name}.json", device="cpu")
        told.append(" / ".join(result["context"]["flags"]))
        assert "1 of the samples failed when they were embedded, and are left out" in told[-1]
        assert "2 of the reference images failed" in told[-1]
    assert "only 25 of the 50 samples that were to be drawn" in told[1] and "to be drawn" not in told[0]


def test_partly_labelled_reference_uses_the_labelled_part(tmp_path):
    real, made = unit_rows(60, 5, 4), unit_rows(40, 5, 5)
    labels = [None if i % 2 else i % 3 for i in range(60)]
    write_embeddings(tmp_path / "real", real, labels)
    write_embeddings(tmp_path / "made", made, [0] * 39 + [None], prefix="made")
    result = diffprune.evaluate(tmp_path / "made", tmp_path / "real", tmp_path / "a.json", device="cpu")
    x, y = torch.from_numpy(made).float(), torch.from_numpy(real[::2]).float()
    assert result["classes"] == class_balance(x, y, torch.tensor(labels[::2]))
    assert result["metrics"]["label_agreement"] is None


def test_dry_run_counts_and_writes_nothing(folders):
    root, *_, keys = folders
    kept = write_kept(root / "kept.parquet", keys[10:30])
    plan = diffprune.evaluate(root / "made", root / "real", root / "a.json", kept=kept, dry_run=True)
    assert (plan["samples"], plan["reference"], plan["training"], plan["held_out"]) == (90, 129, 20, 109)
    assert not (root / "a.json").exists()


def refuse(root: Path, match: str, *, out: str = "a.json", **arguments: Any) -> None:
    with pytest.raises(InputError, match=match):
        diffprune.evaluate(arguments.pop("samples", root / "made"), root / "real", root / out, **arguments)
    assert not (root / out).exists()


def test_evaluate_refuses_what_cannot_be_compared(folders):
    root, *_, keys = folders
    made = unit_rows(20, 6, 6)
    write_embeddings(root / "other", made, [0] * 20, prefix="made", model_sha256="b" * 64)
    refuse(root, "model_sha256 is 'bbbb", samples=root / "other")
    write_embeddings(root / "latents", made, [0] * 20, prefix="made", kind="latents")
    write_embeddings(root / "size", made, [0] * 20, prefix="made", image_size=32)
    refuse(root, "image_size is 32 and None", samples=root / "size")
    write_embeddings(root / "wide", unit_rows(20, 7, 6), [0] * 20, prefix="made")
    refuse(root, r"shape is \[7\] and \[6\]", samples=root / "wide")
    write_embeddings(root / "lost", made, [0] * 20, prefix="made", failed=tuple(range(20)))
    refuse(root, "no image in it is ok", samples=root / "lost")
    refuse(root, "k: expected at least 1, got 0", k=0)
    refuse(root, r"seed: expected 0 to 2\*\*32 - 1, got -1", seed=-1)
    refuse(root, "samples: expected at least 91 rows for k = 90, got 90", k=90)
    refuse(root, "samples: expected at least 4 rows for k = 3, got 3", limit=3)
    refuse(root, "vendi_orders: expected numbers from 0", vendi_orders=[-1])
    refuse(root, "vendi_orders: expected numbers from 0", vendi_orders=[2, math.nan])
    refuse(root, "expected embeddings, found latents", samples=root / "latents")
    refuse(root, "nowhere", samples=root / "nowhere")
    refuse(root, "'real/00005' is not in", kept=write_kept(root / "failed.parquet", keys[:9]))
    refuse(root, "'zebra' is not in", kept=write_kept(root / "alien.parquet", [*keys[10:20], "zebra"]))
    refuse(root, "empty selection", kept=write_kept(root / "none.parquet", []))
    write_embeddings(root / "tiny", made[:3], [0] * 3, prefix="made")
    refuse(root, "samples: expected at least 4 rows for k = 3, got 3", samples=root / "tiny")


def test_nan_embedding_is_named_by_its_key(folders):
    root, *_ = folders
    array = np.load(root / "made" / "made-000001.npy")
    array[7, 2] = np.nan
    write_array(root / "made" / "made-000001.npy", array)
    refuse(root, "made/00047")


def test_a_nan_in_the_reference_is_named_by_its_key_too(folders):
    root, *_ = folders
    array = np.load(root / "real" / "real-000000.npy")
    array[7, 2] = np.inf
    write_array(root / "real" / "real-000000.npy", array)
    refuse(root, "1 rows of real-000000 are NaN or infinite, key 'real/00007' first")


def test_what_cannot_be_compared_with_published_figures_is_flagged(tmp_path):
    inception = {"model": "inception", "image_size": 256}
    write_embeddings(tmp_path / "real", unit_rows(30, 20, 2), [0] * 30, **inception)
    sampled = {**SAMPLED, "image_size": 32}
    write_embeddings(tmp_path / "made", unit_rows(25, 20, 3), [0] * 25, prefix="made", sampled=sampled, **inception)
    write_embeddings(tmp_path / "unknown", unit_rows(25, 20, 3), [0] * 25, prefix="made", **inception, precision="bf16")
    told = []
    for name in ("made", "unknown"):
        result = diffprune.evaluate(
            tmp_path / name, tmp_path / "real", tmp_path / f"{name}.json", split="validation", device="cpu"
        )
        assert result["context"]["reference"]["split"] == "validation"
        assert result["metrics"]["frechet_distance_infinity"] is None and result["frechet_infinity"] is None
        told.append(" / ".join(result["context"]["flags"]))
    assert "no Fréchet distance at infinity: it needs 42 samples of 20 dimensions" in told[0]
    assert "samples are 32 pixels wide and were resized to 256" in told[0] and "not recorded" not in told[0]
    assert "how the samples were drawn (steps, guidance, seed) is not recorded" in told[1]
    assert "embedded in different precisions, bf16 and None" in told[1] and "precisions" not in told[0]

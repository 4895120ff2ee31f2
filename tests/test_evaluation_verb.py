"""`evaluate`: which images go into which metric, what is written, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

import diffprune
from diffprune.arrays import write_array
from diffprune.engines import run_stage
from diffprune.errors import InputError
from diffprune.evaluation import class_balance, frechet_distance, memorization, precision_recall, vendi_score
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

    config = {"kind": kind, "model": "vqvae", "model_sha256": model_sha256, "shape": list(values.shape[1:])}
    run_stage("embed", out, config, list(stems), work, total=len(values), metadata={"model_path": "runs/vqvae"})
    return keys


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
    write_embeddings(tmp_path / "made", made, [i % 3 for i in range(90)], prefix="made")
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
    assert result["metrics"] == {
        "frechet_distance": frechet_distance(made, reference),
        **precision_recall(made, reference, 3),
        "vendi_score": vendi_score(made),
        "memorization_ratio": nearness["median_ratio"],
        "memorized_share": nearness["share_below_p1"],
        "class_kl_uniform": classes["kl_uniform"],
        "class_kl_reference": classes["kl_reference"],
        "label_agreement": classes["label_agreement"],
    }
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
    assert context["reference"]["vendi_score"] == vendi_score(reference)
    assert context["training_images"] == len(kept_rows)
    assert context["embedder"] == {"model": "vqvae", "model_sha256": "a" * 64, "dimensions": 6}
    assert context["samples"]["metadata"]["model_path"] == "runs/vqvae"
    assert result["name"] == "grand" and context["flags"] == [
        f"the memorization baseline rests on only {len(held_out)} held-out images"
    ]


def test_evaluate_writes_what_it_returns_and_the_same_bytes_again(folders):
    root, *_ = folders
    result = diffprune.evaluate(root / "made", root / "real", root / "a.json", name="all", device="cpu")
    assert json.loads((root / "a.json").read_text()) == {k: v for k, v in result.items() if k != "out"}
    diffprune.evaluate(root / "made", root / "real", root / "b.json", name="all", device="cpu")
    assert (root / "a.json").read_bytes() == (root / "b.json").read_bytes()
    assert result["out"] == str(root / "a.json")


def test_without_a_selection_the_baseline_is_leave_one_out(folders):
    root, real, made, _ = folders
    result = diffprune.evaluate(root / "made", root / "real", root / "a.json", device="cpu")
    reference = torch.cat([real[:5], real[6:]])
    assert result["memorization"]["baseline"] == "leave-one-out"
    assert result["memorization"]["baseline_median"] == memorization(made, reference)["baseline_median"]
    assert any("no held-out images" in flag for flag in result["context"]["flags"])


def test_limit_draws_a_subset_by_key_and_seed_and_says_so(folders):
    root, real, made, _ = folders
    run = {"device": "cpu", "limit": 50}
    first = diffprune.evaluate(root / "made", root / "real", root / "a.json", **run)
    again = diffprune.evaluate(root / "made", root / "real", root / "b.json", **run)
    other = diffprune.evaluate(root / "made", root / "real", root / "c.json", **run, seed=1)
    assert first["metrics"] == again["metrics"]
    assert first["metrics"]["precision"] != other["metrics"]["precision"]
    reference = torch.cat([real[:5], real[6:]])
    assert first["metrics"]["frechet_distance"] == frechet_distance(made, reference)  # of all images
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


def refuse(root: Path, match: str, **arguments: Any) -> None:
    with pytest.raises(InputError, match=match):
        diffprune.evaluate(arguments.pop("samples", root / "made"), root / "real", root / "a.json", **arguments)
    assert not (root / "a.json").exists()


def test_evaluate_refuses_what_cannot_be_compared(folders):
    root, *_, keys = folders
    made = unit_rows(20, 6, 6)
    write_embeddings(root / "other", made, [0] * 20, prefix="made", model_sha256="b" * 64)
    refuse(root, "model_sha256 is 'bbbb", samples=root / "other")
    write_embeddings(root / "latents", made, [0] * 20, prefix="made", kind="latents")
    refuse(root, "expected embeddings, found latents", samples=root / "latents")
    refuse(root, "nowhere", samples=root / "nowhere")
    refuse(root, "'real/00005' is not in", kept=write_kept(root / "failed.parquet", keys[:9]))
    refuse(root, "'zebra' is not in", kept=write_kept(root / "alien.parquet", [*keys[10:20], "zebra"]))
    refuse(root, "empty selection", kept=write_kept(root / "none.parquet", []))
    write_embeddings(root / "tiny", made[:3], [0] * 3, prefix="made")
    refuse(root, "samples: expected at least 4 rows, got 3", samples=root / "tiny")


def test_nan_embedding_is_named_by_its_key(folders):
    root, *_ = folders
    array = np.load(root / "made" / "made-000001.npy")
    array[7, 2] = np.nan
    write_array(root / "made" / "made-000001.npy", array)
    refuse(root, "made/00047")

"""Tables, selections, arrays and checkpoints from strangers: no pickle is ever loaded, and what is malformed is told.

Each verb reads files that were changed in every way that parquet, JSON and safetensors allow. It may work, where the
change means nothing to it, or raise a DiffpruneError that names the file; anything else is a bug.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

import diffprune
from diffprune.errors import DiffpruneError

SOURCE = Path(diffprune.__file__).parent
# Who may import pickle, and for what: the names of its errors; and exceptions between processes of one run.
PICKLE_ALLOWED = {
    "weight_files.py": {"UnpicklingError"},
    "local_workers.py": {"loads", "dumps"},
}


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call of a dotted name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            with contextlib.suppress(Exception):
                yield ast.unparse(node.func), node


def test_no_code_loads_a_pickle():
    seen = set()
    for path in sorted(SOURCE.rglob("*.py")):
        name, tree = path.relative_to(SOURCE).as_posix(), ast.parse(path.read_text())
        for called, node in calls(tree):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            where = f"{name}:{node.lineno}: {ast.unparse(node)}"
            if called == "torch.load":
                assert given.get("weights_only") == "True", where
                seen.add(called)
            if called in ("np.load", "numpy.load", "np.lib.format.read_array"):
                assert given.get("allow_pickle") == "False", where
            seen.add(called)
            assert called not in ("eval", "exec", "os.system", "yaml.load", "joblib.load", "marshal.loads"), where
            assert given.get("shell") != "True" and given.get("trust_remote_code") != "True", where
        for node in ast.walk(tree):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            hostile = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}.intersection(imported)
            assert not hostile or (hostile == {"pickle"} and name in PICKLE_ALLOWED), f"{name}: imports {hostile}"
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
                assert node.attr in PICKLE_ALLOWED[name], f"{name}:{node.lineno}: pickle.{node.attr}"
    assert {"torch.load", "np.lib.format.open_memmap"} <= seen  # it does look


class Payload:
    """What a hostile pickle would run."""

    def __reduce__(self):
        return os.mkdir, (os.environ["DIFFPRUNE_TEST_PAYLOAD"],)


def test_pickles_in_the_place_of_everything_that_is_read_are_refused(small_run, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFPRUNE_TEST_PAYLOAD", str(tmp_path / "owned"))
    plain = pickle.dumps(Payload())
    array = tmp_path / "array.npy"
    np.save(array, np.array([Payload()], dtype=object), allow_pickle=True)
    torch.save({"a": Payload()}, tmp_path / "model.pt")
    hostile = {"pickle": plain, "npy": array.read_bytes(), "pt": (tmp_path / "model.pt").read_bytes()}
    tried = 0
    for kind, content in hostile.items():
        for folder, pattern, read in (
            ("latents", "*1.npy", lambda at: diffprune.score(at, small_run.surrogate, tmp_path / "s", methods="loss")),
            ("latents", "*1.parquet", lambda at: diffprune.score(at, small_run.surrogate, tmp_path / "s")),
            ("embeddings", "*1.npy", lambda at: diffprune.cluster(at, tmp_path / "c", k=3)),
            ("scores", "*1.parquet", lambda at: diffprune.select(at, tmp_path / "k.parquet", by="loss", keep=0.5)),
            ("scores", "stage.json", lambda at: diffprune.select(at, tmp_path / "k.parquet", by="loss", keep=0.5)),
            (
                "surrogate",
                "step_*6/model.safetensors",
                lambda at: diffprune.score(small_run.latents, at, tmp_path / "s"),
            ),
            ("surrogate", "step_*6/state.json", lambda at: diffprune.score(small_run.latents, at, tmp_path / "s")),
            ("vqvae", "step_*6/model.safetensors", lambda at: diffprune.encode(small_run.shards, at, tmp_path / "l")),
        ):
            copy = tmp_path / f"{kind}-{tried}"
            shutil.copytree(small_run.root / folder, copy)
            (found,) = copy.glob(pattern)
            found.write_bytes(content)
            with pytest.raises(DiffpruneError):
                read(copy)
            tried += 1
            for name in ("s", "c", "l"):
                shutil.rmtree(tmp_path / name, ignore_errors=True)
    assert tried == 24 and not (tmp_path / "owned").exists()


def retyped(name: str, dtype: pa.DataType) -> Callable[[pa.Table], pa.Table]:
    """The column with nulls of another type."""

    def change(table: pa.Table) -> pa.Table:
        return table.set_column(table.column_names.index(name), name, pa.nulls(table.num_rows, dtype))

    return change


def filled(name: str, value: object, dtype: pa.DataType | None = None) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        column = pa.array([value] * table.num_rows, dtype)
        return table.set_column(table.column_names.index(name), name, column)

    return change


def described(metadata: dict[bytes, bytes] | None) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.replace_schema_metadata(metadata)


TABLES: dict[str, Callable[[pa.Table], pa.Table]] = {
    "keys that are numbers": filled("key", 7, pa.int64()),
    "keys that are null": retyped("key", pa.string()),
    "keys that are lists": filled("key", ["a"], pa.list_(pa.string())),
    "keys with newlines and HTML": lambda table: table.set_column(
        0, "key", pa.array([f"<script>\n{i}\x00\u202e{'k' * 10_000 if i == 0 else ''}" for i in range(table.num_rows)])
    ),
    "shards that are numbers": filled("shard", 3, pa.int64()),
    "a shard that is a path": filled("shard", "../../etc/passwd", pa.string()),
    "offsets that are text": filled("offset", "12", pa.string()),
    "offsets below zero": filled("offset", -512, pa.int64()),
    "offsets beyond all bounds": filled("offset", 2**63 - 1, pa.int64()),
    "sizes that are null": retyped("size", pa.int64()),
    "a status that is unknown": filled("status", "maybe", pa.string()),
    "a status that is a number": filled("status", 1, pa.int8()),
    "labels that are text": filled("label", "dog", pa.string()),
    "labels beyond all bounds": filled("label", 2**62, pa.int64()),
    "an error that is a number": filled("error", 5, pa.int32()),
    "no rows": lambda table: table.slice(0, 0),
    "a row too few": lambda table: table.slice(1),
    "every row twice": lambda table: pa.concat_tables([table, table]),
    "a column twice": lambda table: table.append_column(table.field(0), table.column(0)),
    "no metadata": described(None),
    "metadata that is no JSON": described({b"diffprune": b"{"}),
    "metadata that is a list": described({b"diffprune": b"[1]"}),
    "metadata that is not text": described({b"diffprune": b"\xff\xfe\x00"}),
    "metadata that is deep": described({b"diffprune": b"[" * 100_000 + b"]" * 100_000}),
    "metadata with HTML": described(
        {b"diffprune": json.dumps({"order": "<b>x</b>\n", "config": "</script>"}).encode()}
    ),
}


def reads(small_run, at: Path, out: Path) -> dict[str, Callable[[], object]]:
    """What reads the tables in copies of the stages' folders."""
    kept = at / "kept.parquet"
    return {
        "select": lambda: diffprune.select(at / "scores", out / "k.parquet", by="loss", keep=0.5),
        "select two": lambda: diffprune.select(
            [at / "scores", at / "clusters"], out / "k.parquet", order="balanced", keep=0.2
        ),
        "select per label": lambda: diffprune.select(
            at / "scores", out / "k.parquet", by="loss", per="label", keep=0.5
        ),
        "score": lambda: diffprune.score(at / "latents", small_run.surrogate, out / "s", methods="loss"),
        "cluster": lambda: diffprune.cluster(at / "embeddings", out / "c", k=3),
        "prune": lambda: diffprune.prune(kept, small_run.shards, out / "pruned"),
        "export keys": lambda: diffprune.export(kept, out / "keys.txt", format="keys"),
        "export datacomp": lambda: diffprune.export(kept, out / "subset.npy", format="datacomp"),
        "export energon": lambda: diffprune.export(
            kept, out / "split.yaml", format="energon", shards=[str(small_run.shards)]
        ),
        "report": lambda: diffprune.report(
            out / "report.html", scores=[at / "scores"], selections={"a": kept}, shards=small_run.shards
        ),
    }


@pytest.mark.parametrize("change", TABLES)
def test_changed_tables_are_told_or_do_no_harm(small_run, tmp_path, change):
    diffprune.select(small_run.scores, tmp_path / "kept.parquet", by="loss", keep=0.5)
    for name in ("scores", "clusters", "latents", "embeddings"):
        shutil.copytree(small_run.root / name, tmp_path / name)
    changed = 0
    for path in [tmp_path / "kept.parquet", *tmp_path.glob("*/*1.parquet")]:
        table = pq.ParquetFile(path).read()
        with contextlib.suppress(ValueError):  # a selection has fewer columns
            pq.write_table(TABLES[change](table), path)
            changed += 1
    assert changed >= 4
    out, broken = tmp_path / "out", []
    out.mkdir()
    for name, read in reads(small_run, tmp_path, out).items():
        try:
            read()
        except DiffpruneError as error:
            if len(str(error)) > 3000:
                broken.append(f"{name}: a message of {len(str(error))} characters")
        except Exception as error:
            broken.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
    assert not broken, "\n".join(broken)
    page = out / "report.html"
    if page.exists():
        assert "<script>\n0" not in page.read_text() and "<b>x</b>" not in page.read_text()


HEAD = {"shards": ["images-000000"], "fingerprint": "x", "stage": "encode"}
STAGES = {
    "a list": [1, 2],
    "no shards": {"fingerprint": "x", "stage": "encode"},
    "shards that are numbers": {"shards": [1]},
    "a shard that is a path": {"shards": ["../x"]},
    "no fingerprint": {"shards": ["images-000000"]},
    "a config that is a list": {**HEAD, "config": [1]},
    "metadata that is text": {**HEAD, "metadata": "y"},
    "a shape that is text": {
        "shards": ["images-000000"],
        "fingerprint": "x",
        "config": {"kind": "latents", "shape": "x"},
    },
    "no shape": {**HEAD, "config": {"kind": "latents"}},
    "no shards at all": {"shards": [], "fingerprint": "x", "config": {"kind": "latents", "shape": [4, 4, 4]}},
}


@pytest.mark.parametrize("change", STAGES)
def test_changed_stage_files_are_told(small_run, tmp_path, change):
    for name in ("scores", "clusters", "latents", "embeddings"):
        shutil.copytree(small_run.root / name, tmp_path / name)
        (tmp_path / name / "stage.json").write_text(json.dumps(STAGES[change]))
    out = tmp_path / "out"
    out.mkdir()
    broken = []
    for name, read in (
        ("select", lambda: diffprune.select(tmp_path / "scores", out / "k.parquet", by="loss", keep=0.5)),
        ("score", lambda: diffprune.score(tmp_path / "latents", small_run.surrogate, out / "s", methods="loss")),
        ("cluster", lambda: diffprune.cluster(tmp_path / "embeddings", out / "c", k=3)),
        ("encode", lambda: diffprune.encode(small_run.shards, small_run.vqvae, tmp_path / "latents")),
    ):
        try:
            read()
        except DiffpruneError:
            pass
        except Exception as error:
            broken.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
    assert not broken, "\n".join(broken)


def test_an_array_of_a_length_below_zero_is_told(small_run, tmp_path):
    shutil.copytree(small_run.latents, tmp_path / "latents")
    path = tmp_path / "latents" / "images-000001.npy"
    path.write_bytes(path.read_bytes().replace(b"(50, ", b"(-5, "))
    with pytest.raises(DiffpruneError, match=r"images-000001\.npy: not a readable \.npy file"):
        diffprune.score(tmp_path / "latents", small_run.surrogate, tmp_path / "out", methods="loss")


@pytest.mark.parametrize("about", ["true", "[1]", '{"plan": 5}', '{"plan": {"rtol": NaN}}', "{"])
def test_a_changed_sample_json_is_told(small_run, tmp_path, about):
    shutil.copytree(small_run.shards, tmp_path / "shards")
    (tmp_path / "shards" / "sample.json").write_text(about)
    with pytest.raises(DiffpruneError, match=r"sample\.json: "):
        diffprune.embed(tmp_path / "shards", tmp_path / "out", model=f"vqvae:{small_run.vqvae}")
    assert not (tmp_path / "out").exists()


WHAT = ["nothing in it", "no metadata", "another shape", "a cut header", "NaN", "a list", "a number", "bfloat16"]


@pytest.mark.parametrize("what", [*WHAT, "float8"])
def test_changed_centroids_and_partial_results_are_told(small_run, tmp_path, what):
    out = tmp_path / "clusters"
    shutil.copytree(small_run.clusters, out)
    path = out / "centroids.safetensors"
    (out / "images-000001.parquet").unlink()  # so that they are read
    if what == "a cut header":
        path.write_bytes(path.read_bytes()[:20])
    elif what == "a list":
        path.write_bytes(b"[1, 2]")
    else:
        centroids = {
            "nothing in it": {},
            "no metadata": {"centroids": torch.zeros(6, 3)},
            "another shape": {"centroids": torch.zeros(2, 2, 2)},
            "NaN": {"centroids": torch.full((6, 64), torch.nan)},
            "a number": {"centroids": torch.zeros(())},
            "bfloat16": {"centroids": torch.zeros(6, 64, dtype=torch.bfloat16)},
            "float8": {"centroids": torch.zeros(6, 64).to(torch.float8_e4m3fn)},
        }[what]
        save_file(centroids, path, metadata=None if what == "no metadata" else {"fit": "{}"})
    with pytest.raises(DiffpruneError):
        diffprune.cluster(small_run.embeddings, out, k=6)
    with pytest.raises(DiffpruneError):
        diffprune.cluster(small_run.embeddings, tmp_path / "like", like=out)


def test_a_number_that_no_float_holds_is_told(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text('{"metrics": {"precision": 1%s}}' % (400 * "0"))
    with pytest.raises(DiffpruneError, match=r"metrics\.json: not valid JSON \(it holds a number of 401 digits\)"):
        diffprune.report(tmp_path / "report.html", metrics=[path])

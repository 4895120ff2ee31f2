"""Too many failures in a row, over the samples in shard order, end a stage; what is finished is kept."""

from __future__ import annotations

import random

import numpy as np
import pyarrow as pa
import pytest
from test_tables import make_table

import diffprune
from diffprune import errors
from diffprune.engines import Engine, run_stage
from diffprune.errors import StoppedError
from diffprune.failures import Streaks, Tally


def table(stem: str, status: str) -> pa.Table:
    """A table whose samples failed where the text has an x."""
    made = make_table(stem, [f"{stem}-{i}" for i in range(len(status))])
    words = pa.array(["failed" if letter == "x" else "ok" for letter in status], pa.string())
    errors = pa.array(["broken" if letter == "x" else None for letter in status], pa.string())
    return made.set_column(7, "status", words).set_column(8, "error", errors)


def test_a_tally_counts_rows_of_failures():
    assert Tally.of(table("s", "xx.xxx.x")) == Tally(8, 6, 2, 1, 3, "s-0", "broken")
    assert Tally.of(table("s", "...")) == Tally(3, 0, 0, 0, 0)
    assert Tally.of(table("s", "xx")) == Tally(2, 2, 2, 2, 2, "s-0", "broken")
    assert Tally.of(table("s", "")).all_failed  # it does not end a row
    # Rows that do not count are as if they were not there.
    assert Tally.of(table("s", "x.xx"), [False, False, True, True]) == Tally(2, 2, 2, 2, 2, "s-2", "broken")
    assert Tally.of(table("s", "x.x."), [True, False, True, True]) == Tally(3, 2, 2, 0, 2, "s-0", "broken")


def longest_run(text: str) -> int:
    return max(map(len, text.split(".")), default=0)


def test_streaks_count_as_over_all_samples_in_shard_order_whatever_the_order_of_shards():
    rng = random.Random(0)
    stopped = 0
    for _ in range(400):
        statuses = {f"s{i}": "".join(rng.choices("x.", [4, 1], k=rng.randint(0, 4))) for i in range(6)}
        order = list(statuses)
        rng.shuffle(order)
        streaks, done = Streaks(list(statuses), 5), set()
        for stem in order:
            done.add(stem)
            # Shards that are not there yet may hold anything: they end a row.
            seen = "".join(statuses[s] if s in done else "." for s in statuses)
            if (
                longest_run(seen) >= 5
                and longest_run("".join(statuses[s] if s in done - {stem} else "." for s in statuses)) < 5
            ):
                with pytest.raises(StoppedError, match=r"shard s\d: \d+ samples in a row failed, such as key"):
                    streaks.add(stem, Tally.of(table(stem, statuses[stem])))
                stopped += 1
                break
            streaks.add(stem, Tally.of(table(stem, statuses[stem])))
    assert 100 < stopped < 390


def stage(out, statuses: dict[str, str], limit: int) -> dict:
    tables = {stem: table(stem, status) for stem, status in statuses.items()}
    engine = Engine(max_failures=limit)
    return run_stage("embed", out, {"x": 1}, list(tables), lambda stem, bar: tables[stem], total=1, engine=engine)


def test_a_stage_stops_before_it_writes_the_shard_that_is_too_much(tmp_path):
    statuses = {"a": "..x.", "b": ".xxx", "c": "xx..", "d": "...."}
    with pytest.raises(StoppedError, match="shard c: 5 samples in a row failed, such as key 'c-0': broken"):
        stage(tmp_path / "out", statuses, 5)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.parquet", "b.parquet", "stage.json"]
    mended = {**statuses, "c": "...."}
    assert stage(tmp_path / "out", mended, 5)["failed"] == 4
    assert stage(tmp_path / "other", statuses, 6)["failed"] == 6
    assert stage(tmp_path / "any", {"a": "x" * 300}, 0)["failed"] == 300
    with pytest.raises(StoppedError):
        stage(tmp_path / "default", {"a": "x" * 100}, Engine().max_failures)


def test_a_model_that_gives_nan_ends_embed_at_once(small_run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "nan_model.py").write_text(
        "import torch\n\ndef embed(images):\n    return torch.full((len(images), 4), float('nan'))\n"
        "embed.image_size = 8\n"
    )
    out = tmp_path / "embeddings"
    with pytest.raises(StoppedError, match=r"50 samples in a row failed.*gave NaN"):
        diffprune.embed(small_run.shards, out, model="nan_model:embed", max_failures=30)
    assert not list(out.glob("*.parquet"))
    assert diffprune.embed(small_run.shards, out, model="nan_model:embed", max_failures=0)["failed"] == 120


def test_samples_that_failed_before_do_not_stop_score(small_run, tmp_path):
    from diffprune.arrays import ArrayFolder
    from diffprune.scoring import score

    folder = ArrayFolder(small_run.latents)

    class Half:
        """The latents, the samples of the first shard failed."""

        def __init__(self) -> None:
            self.metadata, self.fingerprint, self.stems = folder.metadata, "half", folder.stems
            self.array = folder.array

        def table(self, stem: str) -> pa.Table:
            found = folder.table(stem)
            if stem != self.stems[0]:
                return found
            failed = pa.array(["failed"] * found.num_rows, pa.string())
            return found.set_column(found.column_names.index("status"), "status", failed)

    result = score(Half(), small_run.surrogate, tmp_path / "scores", methods="loss", max_failures=10)
    assert (result["failed"], result["failed_in_scoring"]) == (50, 0)

    class Poisoned(Half):
        def table(self, stem: str) -> pa.Table:
            return folder.table(stem)

        def array(self, stem: str) -> np.ndarray:
            return np.full_like(folder.array(stem), np.nan) if stem == self.stems[1] else folder.array(stem)

        def __init__(self) -> None:
            self.metadata, self.fingerprint, self.stems = folder.metadata, "poisoned", folder.stems

    with pytest.raises(StoppedError, match=r"50 samples in a row failed.*not finite"):
        score(Poisoned(), small_run.surrogate, tmp_path / "poisoned", methods="loss", max_failures=10)
    assert [path.stem for path in (tmp_path / "poisoned").glob("*.parquet")] == folder.stems[:1]


def test_every_error_is_caught_by_a_public_name() -> None:
    raised = {name: value for name, value in vars(errors).items() if isinstance(value, type)}
    assert {name: getattr(diffprune, name, None) for name in raised} == raised

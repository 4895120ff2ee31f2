"""The passes of `score` over a source of latents: mean gradients, visits to checkpoints, and what they add up to.

Checkpoint by checkpoint, so that each is loaded once: MoSo's first pass, then a visit to every shard, whose findings
are kept in a folder of partial results. The last checkpoint's visit makes a shard's scores, unless these need all
shards' findings. All of it is per shard, folded in shard order, and each piece is a file that is there whole or not at
all: a run that is stopped anywhere goes on from its last piece to the same bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from diffprune.draws import hash_keys
from diffprune.engines import Engine
from diffprune.errors import InputError
from diffprune.files import read_json, write_json
from diffprune.local_workers import Task
from diffprune.memory import BatchSize, find_batch_size, free_bytes, resident_bytes, rows_that_fit
from diffprune.prefetch import Prefetch
from diffprune.progress import progress
from diffprune.scores.batches import Draws, Samples
from diffprune.scores.mean_gradients import GradientSum, Mean, MeanGradient
from diffprune.scores.monotonicity import monotonicity
from diffprune.scores.moso import SUM_ROWS, gradient_sum, group_products, in_group, moso, whole_set
from diffprune.scores.normalise import normalised, strata, strata_count, stratum_sums
from diffprune.scores.random import random_scores
from diffprune.scores.support import Support
from diffprune.scores.visit import visit
from diffprune.surrogates import Surrogate
from diffprune.tables import BASE_COLUMNS, how_other
from diffprune.tensor_files import load_tensors, save_tensors

BY_DRAW = ("loss", "el2n", "grand")  # of the last checkpoint; the others are of all
MOST_ROWS = 4096
USUAL_ROWS = 64


class Latents(Protocol):
    """Where latents come from, as `arrays.ArrayFolder` has them. Called by two threads, never at once."""

    metadata: dict[str, Any]
    fingerprint: str
    stems: list[str]

    def table(self, stem: str) -> pa.Table: ...

    def array(self, stem: str) -> np.ndarray: ...


_Rows = tuple[pa.Table, list[int], list[str], list[int | None], np.ndarray | None]
"""Base columns, and of the rows that are ok: their places, keys, labels and float32 latents."""


def identity_of(source: Latents, stem: str) -> dict[str, Any]:
    """As ``ArrayFolder.identity``; of a source without that method, its fingerprint has to say all."""
    return source.identity(stem) if hasattr(source, "identity") else {}


def unread_table(source: Latents, stem: str) -> pa.Table:
    """The base columns of one shard; where images are encoded on the fly, those of samples that may yet fail."""
    return getattr(source, "unread_table", source.table)(stem)


@dataclass(frozen=True)
class Plan:
    """What is to be computed. `group` is the number of samples of MoSo's one-pass estimate, None for two passes."""

    methods: list[str]
    draws: Draws
    moso_mode: str
    support: Support
    group: int | None
    normalise_t: bool

    @property
    def of_all_checkpoints(self) -> bool:
        return bool({"moso", "monotonicity"} & set(self.methods))

    @property
    def of_all_samples(self) -> bool:
        """Whether a sample's scores depend on the other samples."""
        return "moso" in self.methods or self.normalise_t

    @property
    def two_passes(self) -> bool:
        return "moso" in self.methods and self.group is None

    def sweeps(self, checkpoints: int) -> int:
        """How many times the samples go through a surrogate in all."""
        again = {"moso", "grand"} <= set(self.methods) and self.draws.count > 1
        return checkpoints * (1 + self.two_passes) + again


class Passes:
    """One run of `score`: `begin`, then the `scores` of each shard, then `remove`.

    A context manager: while a shard is scored, a thread reads the next one.
    """

    def __init__(
        self,
        source: Latents,
        surrogate: Surrogate | None,
        plan: Plan,
        folder: Path,
        batch_size: int | str | None,
        memory: int | None,
        rows: int,
        engine: Engine | None = None,
    ) -> None:
        self.source, self.surrogate, self.plan, self.folder, self.rows = source, surrogate, plan, folder, rows
        self.engine = engine or Engine()
        self.sums: dict[str, Tensor] = {}  # for `normalise_t`: of all samples' values, by stratum of t
        self._batch_size, self._memory = batch_size, memory
        self.size = BatchSize(batch_size if isinstance(batch_size, int) else USUAL_ROWS)
        self._sum_size = BatchSize(SUM_ROWS[surrogate.device.type if surrogate else "cpu"])
        self._mean = lru_cache(maxsize=plan.support.trials)(self._read_mean)
        self._wanted = set(source.stems)  # shards worth reading ahead
        self._ahead: Prefetch[_Rows] = Prefetch(self._rows_of, source.stems, skip=lambda stem: stem not in self._wanted)

    def __enter__(self) -> Passes:
        self._ahead.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ahead.__exit__(kind, error, trace)

    def begin(self, wanted: list[str]) -> None:
        """All that has to be done before the first of the scores of the shards that are ``wanted``."""
        self._begin(self.engine.mine(self.source.stems) if self.plan.of_all_samples else wanted)
        self._wanted = set(wanted)

    def _begin(self, needed: list[str]) -> None:
        """``needed``: the shards of this process whose findings the scores take."""
        if self.surrogate is None:
            return
        self._forget_others(needed)
        last, ranks = len(self.surrogate.paths) - 1, self.engine.ranks
        if self._finds_batch_size:
            if ranks.rank:
                ranks.wait()  # the first one finds it for all
            self.size = BatchSize(self._found_batch_size())
            if not ranks.rank:
                ranks.wait()
        for number in range(last + 1):
            keep = number < last or self.plan.normalise_t
            todo = [stem for stem in (needed if keep else []) if not self._findings_path(number, stem).is_file()]
            if self.plan.two_passes and (ranks.max(len(todo)) or not keep):
                self._first_pass(number)
            if todo:
                self._wanted = set(todo)
                with progress(f"score, checkpoint {number + 1} of {last + 1}", total=self.rows, unit="images") as bar:
                    self._find(number, todo, bar.advance)
            ranks.wait()
            if keep and not ranks.rank:
                for trial in range(self.plan.support.trials):
                    self._mean_gradient(number, trial).remove()
        if self.plan.normalise_t:
            self.sums = self._stratum_sums()

    def reading_no_further(self) -> None:
        """In a worker, which does not know the shard that comes next."""
        self._wanted = set()
        if self._finds_batch_size:
            self.size = BatchSize(self._found_batch_size())

    def find(self, number: int, stem: str, advance: Callable[[int], None]) -> None:
        """Visit one shard at a checkpoint and keep what was found, unless it is there."""
        path = self._findings_path(number, stem)
        if not path.is_file():
            found = self._visit(number, self.read(stem)[2], advance)
            save_tensors(path, found, {"input": json.dumps(identity_of(self.source, stem))})

    def shard_sum(self, number: int, trial: int, stem: str, advance: Callable[[int], None]) -> GradientSum:
        """MoSo's gradient sum over one shard's samples of a trial."""
        support, network = self.plan.support, self.surrogate.network(number)
        samples = self.read(stem)[2]
        samples = samples.take(support.trial(samples.hashes) == trial)
        inside = support.inside(samples.hashes)
        found = gradient_sum(network, samples.take(inside), self.plan.draws, self._sum_size)
        advance(len(samples))
        if support.fraction < 1:
            found.population = len(samples)
        return found

    def put_shard_sum(self, number: int, trial: int, stem: str, advance: Callable[[int], None]) -> None:
        """The same, left for another process to add."""
        mean = self._mean_gradient(number, trial)
        if not mean.has_part(stem):
            mean.put(stem, self.shard_sum(number, trial, stem, advance))

    def scores(self, stem: str, samples: Samples, advance: Callable[[int], None]) -> dict[str, Tensor]:
        """Score name -> [n] float64 on the CPU, for the methods asked for and maybe others."""
        result = {"random": random_scores(samples.hashes, self.plan.draws.seed)}
        if self.surrogate is None:
            advance(len(samples))
            return result
        findings = []
        for number in range(len(self.surrogate.paths)):
            path = self._findings_path(number, stem)
            findings.append(load_tensors(path)[0] if path.is_file() else self._visit(number, samples, advance))
            if path.is_file() and number == len(self.surrogate.paths) - 1:
                advance(len(samples))
        for name in BY_DRAW:
            if name in findings[-1]:
                values = findings[-1][name]
                if self.plan.normalise_t:
                    values = normalised(values, findings[-1]["stratum"], self.sums[name])
                result[name] = values.mean(dim=1)
        if "monotonicity" in self.plan.methods:
            result["monotonicity"] = monotonicity(torch.stack([found["mean_loss"] for found in findings]))
        if "moso" in self.plan.methods:
            result["moso"] = torch.stack([found["moso"] for found in findings]).mean(dim=0)
        return {name: values.cpu() for name, values in result.items()}

    def read(self, stem: str) -> tuple[pa.Table, list[int], Samples]:
        """A shard's base columns, the rows that are ok, and what the surrogate sees of them."""
        (rows,) = self._ahead.parts(stem)
        base, ok, keys, labels, latents = rows
        if self.surrogate is None:
            return base, ok, Samples(hash_keys(keys), torch.empty(len(ok), 0), None)
        device = self.surrogate.device
        given = torch.tensor(labels, dtype=torch.int64, device=device) if self.surrogate.num_classes else None
        return base, ok, Samples(hash_keys(keys, device), torch.from_numpy(latents).to(device), given)

    def _rows_of(self, stem: str) -> Iterator[_Rows]:
        """Runs in a thread: what has to be read of a shard, in memory."""
        base = self.source.table(stem).select(BASE_COLUMNS)
        ok = [row for row, status in enumerate(base["status"].to_pylist()) if status == "ok"]
        keys, labels = (base[name].take(ok).to_pylist() if ok else [] for name in ("key", "label"))
        latents = None if self.surrogate is None else self.source.array(stem)[ok].astype(np.float32)
        yield base, ok, keys, labels, latents

    def remove(self) -> None:
        """Remove the partial results, once all tables are there; those of a part, and the folder with the last."""
        if self.engine.part is None:
            if not self.engine.ranks.rank:
                shutil.rmtree(self.folder, ignore_errors=True)
            return
        for number in range(len(self.surrogate.paths) if self.surrogate else 0):
            for stem in self.engine.whole(self.source.stems):
                self._findings_path(number, stem).unlink(missing_ok=True)
        for path in self.folder.glob("batch_size*.json"):  # another part that still wants it finds it again
            path.unlink(missing_ok=True)
        for folder in (*self.folder.glob("findings-*"), self.folder):
            with suppress(OSError):  # not there, or other parts' files are in it
                folder.rmdir()

    def _visit(self, number: int, samples: Samples, advance: Callable[[int], None]) -> dict[str, Tensor]:
        """What the checkpoint has to say of one shard's samples: a term of `moso`, `mean_loss`, and at the last one the
        values of each draw."""
        last = number == len(self.surrogate.paths) - 1
        norms = last and "grand" in self.plan.methods
        if "moso" not in self.plan.methods:
            found = visit(
                self.surrogate.network(number), samples, self.plan.draws, self.size, norms=norms, advance=advance
            )
        elif self.plan.group is None:
            found = self._second_pass(number, samples, norms, advance)
        else:
            found = self._one_pass(number, samples, norms, advance)
        result = {}
        if "monotonicity" in self.plan.methods:
            result["mean_loss"] = found["loss"].mean(dim=1)
        if "moso" in found:
            result["moso"] = found["moso"]
        if last:
            result |= {name: found[name] for name in BY_DRAW if name in self.plan.methods}
            if self.plan.normalise_t:
                result["stratum"] = strata(samples, self.plan.draws)
        return {name: value.cpu() for name, value in result.items()}

    def _second_pass(
        self, number: int, samples: Samples, norms: bool, advance: Callable[[int], None]
    ) -> dict[str, Tensor]:
        plan, network = self.plan, self.surrogate.network(number)
        trial, inside = plan.support.trial(samples.hashes), plan.support.inside(samples.hashes)
        parts, places = [], []
        for one in range(plan.support.trials):
            mean = self._mean(number, one)
            rows = (trial == one).nonzero()[:, 0]
            found = visit(
                network,
                samples.take(rows),
                plan.draws,
                self.size,
                norms=norms,
                direction=mean.gradient,
                advance=advance,
            )
            dot, of_mean = whole_set(
                mean.samples, mean.population, inside[rows], found["dot"], mean.sqnorm, found["sqnorm"]
            )
            found["moso"] = self._term(number, mean.population, dot, of_mean, found["sqnorm"])
            parts.append(found)
            places.append(rows)
        order = torch.cat(places).argsort()
        return {name: torch.cat([part[name] for part in parts])[order] for name in parts[0]}

    def _one_pass(
        self, number: int, samples: Samples, norms: bool, advance: Callable[[int], None]
    ) -> dict[str, Tensor]:
        plan, network, size, n = self.plan, self.surrogate.network(number), self.plan.group, len(samples)
        parts: list[dict[str, Tensor]] = []
        for start in range(0, n, size):
            first = max(0, min(start, n - size))  # the last group of a shard is filled up with samples before it
            group = torch.arange(first, min(first + size, n), device=samples.hashes.device)
            try:
                found = group_products(network, samples.take(group), plan.draws, size)
            except torch.OutOfMemoryError as error:
                raise InputError(
                    f"out of memory: one pass needs a group of {size} samples at {plan.draws.count} draws in memory at "
                    "once; give a smaller --group-size, which makes another estimate"
                ) from error
            dot, of_mean = in_group(self.rows, found["dot"], found["sqnorm"])
            found["moso"] = self._term(number, self.rows, dot, of_mean, found["sqnorm"])
            parts.append({name: value[start - first :] for name, value in found.items()})
            advance(len(parts[-1]["moso"]))
        if not parts:
            empty = visit(network, samples, plan.draws, self.size, norms=norms)
            return empty | {"moso": empty["loss"].new_zeros(0)}
        result = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if norms and plan.draws.count == 1:
            result["grand"] = result["sqnorm"].sqrt()[:, None]
        elif norms:
            result |= visit(network, samples, plan.draws, self.size, norms=True)
        return result

    def _term(self, number: int, population: int, dot: Tensor, mean_sqnorm: Tensor, sqnorm: Tensor) -> Tensor:
        steps, rate = self.surrogate.states[number]["total_steps"], self.surrogate.rates[number]
        return moso(self.plan.moso_mode, population, steps, rate, dot, mean_sqnorm, sqnorm)

    def _find(self, number: int, todo: list[str], advance: Callable[[int], None]) -> None:
        if self.engine.workers:
            for _ in self.engine.workers.map([Task(stem, "find", (number, stem)) for stem in todo], advance):
                pass
            return
        for stem in todo:
            self.find(number, stem, advance)

    def _first_pass(self, number: int) -> None:
        self._wanted = set(self.source.stems[self.engine.ranks.rank :: self.engine.ranks.size])  # as `make` asks
        parameters = list(self.surrogate.network(number).model.named_parameters())
        title = f"score, mean gradient {number + 1} of {len(self.surrogate.paths)}"
        with progress(title, total=self.rows, unit="images") as bar:
            for trial in range(self.plan.support.trials):
                mean = self._mean_gradient(number, trial)
                if self.engine.workers:
                    self._gather(mean, number, trial, bar.advance)
                    continue
                mean.make(
                    lambda stem, trial=trial: self.shard_sum(number, trial, stem, bar.advance),
                    talk=self.engine.ranks,
                    like={name: p for name, p in parameters if p.requires_grad},
                )

    def _gather(self, mean: MeanGradient, number: int, trial: int, advance: Callable[[int], None]) -> None:
        """Workers make the sums, and this process adds them in shard order. Few wait for their turn on disk."""
        workers = self.engine.workers
        tasks = [Task(stem, "put_shard_sum", (number, trial, stem)) for stem in mean.missing()]
        ended, done = workers.map(tasks, advance, window=2 * workers.count), set()

        def shard_sum(stem: str) -> GradientSum:
            while stem not in done:
                done.add(next(ended)[0].shard)
            return mean.part(stem)

        mean.make(shard_sum)
        for _ in ended:
            pass

    def _mean_gradient(self, number: int, trial: int) -> MeanGradient:
        return MeanGradient(self.folder / f"gradient-{number}-{trial}", self.source.stems)

    def _read_mean(self, number: int, trial: int) -> Mean:
        return self._mean_gradient(number, trial).read(self.surrogate.device)

    def _forget_others(self, needed: list[str]) -> None:
        """Remove what a run that was stopped found in shards of these names that were others."""
        for number in range(len(self.surrogate.paths)):
            for stem in needed:
                path = self._findings_path(number, stem)
                if path.is_file():
                    known = load_tensors(path, only_metadata=True)[1].get("input", "{}")
                    if how_other(json.loads(known), identity_of(self.source, stem)):
                        path.unlink()

    def _findings_path(self, number: int, stem: str) -> Path:
        return self.folder / f"findings-{number}" / f"{stem}.safetensors"

    def _stratum_sums(self) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        for stem in self.source.stems:
            found = load_tensors(self._findings_path(len(self.surrogate.paths) - 1, stem))[0]
            for name in set(BY_DRAW) & found.keys():
                one = stratum_sums(found[name], found["stratum"], strata_count(self.plan.draws))
                sums[name] = sums[name] + one if name in sums else one
        return sums

    @property
    def _finds_batch_size(self) -> bool:
        """Where it is "auto"; where nobody said, because on the CPU the usual one may be too much for the memory."""
        if self.surrogate is None or isinstance(self._batch_size, int):
            return False
        return self._batch_size == "auto" or self.surrogate.device.type == "cpu"

    def _found_batch_size(self) -> int:
        """Found once per run, by one process, so that a run that was stopped goes on with the same."""
        path = self.folder / f"batch_size{'' if self._batch_size else '-usual'}.json"
        if path.is_file():
            return int(read_json(path)["rows"])
        shards = (self.read(stem)[2] for stem in self.source.stems)
        some = next((samples for samples in shards if len(samples)), None)
        if some is None:
            return BatchSize.MINIMUM
        network, draws = self.surrogate.network(-1), self.plan.draws
        parameters = {name: p.detach() for name, p in network.model.named_parameters() if p.requires_grad}
        norms, direction = "grand" in self.plan.methods, parameters if "moso" in self.plan.methods else None

        def attempt(rows: int) -> None:
            places = torch.arange(max(1, rows // draws.count), device=some.hashes.device) % len(some)
            visit(network, some.take(places), draws, BatchSize(rows, minimum=rows), norms=norms, direction=direction)

        memory = self._memory
        if self.engine.workers and not memory:
            memory = free_bytes() // 2 // self.engine.workers.count + resident_bytes()
        if self._batch_size:
            tables = (unread_table(self.source, stem).num_rows for stem in self.source.stems)
            most = min(MOST_ROWS, draws.count * max(tables))
            rows = find_batch_size(attempt, most, self.surrogate.device, memory)
        else:
            rows = rows_that_fit(attempt, USUAL_ROWS, memory)
        write_json(path, {"rows": rows})
        return rows

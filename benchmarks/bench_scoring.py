"""What `score` costs: passes against a training step, images per second end to end, ranks of the estimates, growth.

    python -m pytest benchmarks/bench_scoring.py --benchmark-enable

Without --benchmark-enable only the checks run. A way whose numbers are wrong has no speed: its test fails instead.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.bench_training import has_bfloat16
from benchmarks.scoring_data import trained, with_all_weights, write_latents, write_surrogate
from diffprune.draws import hash_keys
from diffprune.memory import BatchSize
from diffprune.models.dit import DiT
from diffprune.per_sample import per_sample_gradients
from diffprune.scores.batches import Draws, Network, Samples, draw_losses
from diffprune.scores.moso import gradient_sum, group_products
from diffprune.scores.visit import visit
from diffprune.scoring import score
from diffprune.tables import read_folder

BATCH, ROUNDS, IMAGENET = 32, 7, 1_281_167
DRAWS = Draws(0, 1)


def dit_s_4() -> DiT:
    return with_all_weights(DiT.from_name("DiT-S/4", num_classes=10, learn_sigma=False))


class Problem:
    """DiT-S/4, a batch of 32 latents, and what is done with them."""

    def __init__(self) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        generator = torch.Generator().manual_seed(0)
        self.network = Network(dit_s_4().to(device))
        latents = torch.randn(BATCH, 4, 32, 32, generator=generator).to(device)
        labels = torch.randint(0, 10, (BATCH,), generator=generator).to(device)
        self.samples = Samples(hash_keys([str(i) for i in range(BATCH)], device), latents, labels)
        self.parameters = {name: p for name, p in self.network.model.named_parameters() if p.requires_grad}
        total = gradient_sum(self.network, self.samples, DRAWS, BatchSize(BATCH)).sums
        self.mean = {name: (value / BATCH).float().to(device) for name, value in total.items()}

    def training_step(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None
        draw_losses(self.network, self.samples, DRAWS)[0].mean().backward()

    def grand(self) -> dict[str, Tensor]:
        return visit(self.network, self.samples, DRAWS, BatchSize(BATCH), norms=True)

    def first_pass(self) -> None:
        gradient_sum(self.network, self.samples, DRAWS, BatchSize(BATCH))

    def second_pass(self) -> dict[str, Tensor]:
        return visit(self.network, self.samples, DRAWS, BatchSize(BATCH), norms=True, direction=self.mean)

    def moso(self) -> None:
        self.first_pass()
        self.second_pass()

    def norm_dot_mean(self) -> dict[str, Tensor]:
        for parameter in self.parameters.values():
            parameter.grad = None
        with per_sample_gradients(self.network.model, direction=self.mean, weight_gradients=True) as grads:
            draw_losses(self.network, self.samples, DRAWS)[0].sum().backward()
        return {"dot": grads.dot, "sqnorm": grads.sqnorm}

    def one_pass(self) -> dict[str, Tensor]:
        return group_products(self.network, self.samples, DRAWS, BATCH)

    def loop(self, rows: int) -> tuple[Tensor, Tensor]:
        dots, norms = [], []
        for row in range(rows):
            one = self.samples.take(torch.tensor([row], device=self.samples.hashes.device))
            loss = draw_losses(self.network, one, DRAWS)[0].sum()
            gradients = dict(
                zip(self.parameters, torch.autograd.grad(loss, list(self.parameters.values())), strict=True)
            )
            dots.append(sum((g.double() * self.mean[name].double()).sum() for name, g in gradients.items()))
            norms.append(sum(g.double().square().sum() for g in gradients.values()))
        return torch.stack(dots), torch.stack(norms)


WAYS = ("training_step", "grand", "first_pass", "second_pass", "moso", "norm_dot_mean", "one_pass")
GOALS = {"grand": 0.9, "norm_dot_mean": 1.4, "moso": 2.2}


@pytest.fixture(scope="module")
def problem() -> Problem:
    """Fails where a way's numbers are not the loop's."""
    problem = Problem()
    dots, norms = problem.loop(rows := 3)
    size = norms.sqrt() * sum(value.double().square().sum() for value in problem.mean.values()).sqrt()
    for way, factor in (("second_pass", 1), ("norm_dot_mean", 1), ("one_pass", BATCH)):
        found = getattr(problem, way)()
        worst = max(
            ((found["dot"][:rows] / factor - dots).abs() / size).max().item(),
            ((found["sqnorm"][:rows] - norms).abs() / norms).max().item(),
        )
        if not worst < 1e-4:
            pytest.fail(f"{way} differs from the loop by {worst:.1e} relative; no speed is reported")
    return problem


def test_passes_against_a_training_step(benchmark, problem, capsys):
    """In turn, so that what else the machine does hits all of them; medians."""
    times: dict[str, list[float]] = {way: [] for way in WAYS}

    def all_ways() -> None:
        for way in WAYS:
            times[way].append(seconds(getattr(problem, way)))

    if not benchmark.enabled:
        return
    benchmark.pedantic(all_ways, rounds=ROUNDS, warmup_rounds=0)
    step = statistics.median(times["training_step"])
    lines = [f"DiT-S/4, 32×32×4, batch {BATCH}, float32; {machine()}"]
    for way, values in times.items():
        took = statistics.median(values)
        goal = f"  goal {GOALS[way]}" if way in GOALS else ""
        lines.append(
            f"{way:>14}: {took:7.3f} s ({min(values):.3f} to {max(values):.3f})"
            f"  {took / step:5.2f} training steps{goal}"
        )
    benchmark.extra_info.update({way: statistics.median(values) / step for way, values in times.items()})
    say(capsys, lines)


def test_images_per_second_end_to_end(benchmark, tmp_path, capsys):
    """From a latents folder to score tables, one checkpoint, one draw."""
    if not benchmark.enabled:
        pytest.skip("timed with --benchmark-enable only")
    count = 64
    generator = torch.Generator().manual_seed(0)
    latents = write_latents(
        tmp_path / "latents",
        torch.randn(count, 4, 32, 32, generator=generator),
        torch.randint(0, 10, (count,), generator=generator),
        count // 2,
    )
    run = write_surrogate(tmp_path / "run", {100: dit_s_4()})
    lines = [f"DiT-S/4, 32×32×4, {count} latents in 2 shards, from files to tables; {machine()}"]
    ways = {
        "loss,el2n": {},
        "loss,el2n,grand": {},
        "moso": {},
        "loss,el2n,grand,moso": {},
        "moso --one-pass": {"one_pass": True},
    }
    if has_bfloat16(torch.device("cpu")):
        ways |= {f"{way} bf16": {"precision": "bf16"} for way in list(ways)[:4]}

    def all_ways() -> None:
        for number, (way, options) in enumerate(ways.items()):
            methods = way.split(" ")[0].split(",")
            took = seconds(
                lambda m=methods, n=number, o=options: score(
                    latents, run, tmp_path / f"out-{n}", methods=m, batch_size=BATCH, **o
                )
            )
            rate = count / took
            lines.append(
                f"{way:>26}: {rate:8.2f} images/s; "
                f"extrapolated to {IMAGENET:,} images: {IMAGENET / rate / 3600:,.1f} hours"
            )
            benchmark.extra_info[way] = rate

    benchmark.pedantic(all_ways, rounds=1)
    say(capsys, lines)


def test_ranks(benchmark, tmp_path, capsys):
    """Spearman of each shortcut with the exact score, on a small surrogate that was trained. `--compile` is left out
    unless DIFFPRUNE_BENCH_COMPILE is set, as it takes minutes."""
    if not benchmark.enabled:
        pytest.skip("with --benchmark-enable only")
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 10, (256,), generator=generator)
    latents = torch.randn(10, 4, 8, 8, generator=generator)[labels]
    latents = latents + 0.5 * torch.randn(256, 4, 8, 8, generator=generator)
    model = DiT(8, 2, 4, 48, 2, 2, num_classes=10, learn_sigma=False, time_scale=1000.0)
    run = write_surrogate(tmp_path / "run", trained(model, latents, labels, (100,)))
    folder = write_latents(tmp_path / "latents", latents, labels, 128)
    names = ("loss", "el2n", "grand", "moso")
    ways = [
        ("bf16", "paper", {"precision": "bf16"}),
        ("one pass, groups of 32", "paper", {"one_pass": True, "group_size": 32}),
        ("one pass, groups of 128", "paper", {"one_pass": True, "group_size": 128}),
        ("half the support", "paper", {"support_fraction": 0.5}),
        ("2 trials", "paper", {"trials": 2}),
        ("bf16", "loo1", {"precision": "bf16"}),
        ("one pass, groups of 32", "loo1", {"one_pass": True, "group_size": 32}),
    ]
    if os.environ.get("DIFFPRUNE_BENCH_COMPILE"):
        ways.append(("compile", "paper", {"compile": True}))
    lines = [f"Spearman with float32, exact; 256 latents, a trained DiT of width 48; {machine()}"]

    def all_ways() -> None:
        exact = {mode: columns(folder, run, tmp_path / mode, names, moso_mode=mode) for mode in ("paper", "loo1")}
        for number, (way, mode, options) in enumerate(ways):
            found = columns(folder, run, tmp_path / f"way-{number}", names, moso_mode=mode, **options)
            ranks = {name: spearman(found[name], exact[mode][name]) for name in names}
            lines.append(f"{way:>23}, {mode:>5}: " + "  ".join(f"{name} {rank:.6f}" for name, rank in ranks.items()))
            benchmark.extra_info[f"{way}, {mode}"] = ranks

    benchmark.pedantic(all_ways, rounds=1)
    say(capsys, lines)


def test_growth(benchmark, tmp_path, capsys):
    """Time and peak memory of `score` in a process of its own. Refused if memory grows with the number of samples."""
    if not benchmark.enabled:
        pytest.skip("with --benchmark-enable only")
    model = with_all_weights(DiT(4, 2, 2, 32, 1, 2, num_classes=10, learn_sigma=False))
    run = write_surrogate(tmp_path / "run", {100: model})
    generator = torch.Generator().manual_seed(0)
    found: dict[int, dict[str, float]] = {}

    def all_sizes() -> None:
        for count in (1_000, 10_000, 100_000):
            latents = torch.randn(count, 2, 4, 4, generator=generator)
            labels = torch.randint(0, 10, (count,), generator=generator)
            folder = write_latents(tmp_path / f"latents-{count}", latents, labels, 1000)
            done = subprocess.run(
                [sys.executable, __file__, folder, run, tmp_path / f"out-{count}"],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                capture_output=True,
                text=True,
                check=True,
            )
            found[count] = json.loads(done.stdout)

    benchmark.pedantic(all_sizes, rounds=1)
    if found[100_000]["peak_mib"] > 1.15 * found[1_000]["peak_mib"]:
        pytest.fail(f"memory grows with the number of samples: {found}")
    benchmark.extra_info.update({str(count): values for count, values in found.items()})
    lines = [f"loss, el2n, grand and moso, a DiT of width 32, 2×4×4 latents, shards of 1,000; {machine()}"]
    for count, values in found.items():
        took, peak = values["seconds"], values["peak_mib"]
        lines.append(f"{count:>9,} samples: {took:7.1f} s  {count / took:7.0f} images/s  peak {peak:.0f} MiB")
    say(capsys, lines)


def columns(folder: Path, run: Path, out: Path, names: tuple[str, ...], **options: object) -> dict[str, Tensor]:
    score(folder, run, out, methods=names, **options)
    table = read_folder(out)
    return {name: torch.tensor(table[name].to_pylist(), dtype=torch.float64) for name in names}


def spearman(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([values.argsort().argsort().double() for values in (a, b)])
    return torch.corrcoef(ranks)[0, 1].item()


def seconds(work: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    return f"{device}, {threads}, torch {torch.__version__}, Python {platform.python_version()}"


def say(capsys: pytest.CaptureFixture, lines: list[str]) -> None:
    with capsys.disabled():
        print("\n\n" + "\n".join(lines))


if __name__ == "__main__":  # test_growth's process
    import resource

    began = time.monotonic()
    score(sys.argv[1], sys.argv[2], sys.argv[3], methods=("loss", "el2n", "grand", "moso"), batch_size=256)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    print(json.dumps({"seconds": time.monotonic() - began, "peak_mib": peak}))

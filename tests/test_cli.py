"""The command line from a folder of images to a pruned set, and what it says when the input is bad."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import typer
from small_run import DIT_OVERRIDES, VQVAE_OVERRIDES, SmallRun, write_digits
from test_encoding import damage_image
from typer.testing import CliRunner

from diffprune.cli.app import app, main, with_ray_address
from diffprune.shards import index_shard
from diffprune.tables import read_folder

runner = CliRunner()


def invoke(*arguments: object, code: int = 0):
    """Run the command line in this process and check its exit code."""
    result = runner.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, f"{arguments}\n{result.output}\n{result.stderr}\n{result.exception!r}"
    return result


def sets(overrides: list[str]) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_whole_road(tmp_path):
    write_digits(tmp_path / "images", count=60)
    shards, vqvae, latents = tmp_path / "shards", tmp_path / "vqvae", tmp_path / "latents"
    packed = json.loads(invoke("pack", tmp_path / "images", shards, "--shard-size", 25, "--json").stdout)
    assert packed["count"] == 60 and len(packed["shards"]) == 3
    verified = json.loads(invoke("verify", packed["pattern"], "--decode", "--json").stdout)
    assert (verified["samples"], verified["damaged"]) == (60, 0)
    assert verified["classes"] == {str(label): 6 for label in range(10)}

    invoke("train", "vqvae", shards, "-o", vqvae, *sets(VQVAE_OVERRIDES))
    invoke("encode", shards, "--vqvae", vqvae, "-o", latents)
    invoke("embed", shards, "--model", f"vqvae:{vqvae}", "-o", tmp_path / "embeddings")
    invoke("train", "dit", latents, "-o", tmp_path / "surrogate", *sets(DIT_OVERRIDES))
    scores, clusters, kept = tmp_path / "scores", tmp_path / "clusters", tmp_path / "kept.parquet"
    methods = "random,loss,el2n,grand,moso,monotonicity"
    invoke("score", latents, "--checkpoint", tmp_path / "surrogate", "--method", methods, "-o", scores)
    invoke("cluster", tmp_path / "embeddings", "-k", 4, "-o", clusters)
    table = read_folder(scores)
    assert set(methods.split(",")) <= set(table.column_names) and table.num_rows == 60

    invoke("select", scores, clusters, "--by", "grand", "--prune", 0.9, "-o", kept)
    top = table.sort_by([("grand", "descending")])["key"].to_pylist()[:6]
    assert sorted(pq.read_table(kept)["key"].to_pylist()) == sorted(top)

    invoke("prune", kept, shards, "-o", tmp_path / "pruned", "--verify")
    originals = {s.key: (p, s) for p in shards.glob("*.tar") for s in index_shard(p).samples}
    pruned = {s.key: (p, s) for p in (tmp_path / "pruned").glob("*.tar") for s in index_shard(p).samples}
    invoke("export", kept, "-f", "wids", "--shards", tmp_path / "pruned", "-o", tmp_path / "pruned/index.json")
    by_class = ["--by", "grand + -distance & label", "--quota", "3=2,*=1", "--dedup", 1e-6]
    by_class += ["--embeddings", tmp_path / "embeddings", "--json", "-o", tmp_path / "few.parquet"]
    few = json.loads(invoke("select", scores, clusters, *by_class).stdout)
    assert (few["count"], few["per"], few["quota"]) == (11, "label", {"3": 2, "*": 1})
    assert sorted(pruned) == sorted(top)
    for key, (path, sample) in pruned.items():
        original, there = originals[key]
        assert _span(path, sample) == _span(original, there)

    invoke("train", "dit", latents, "--kept", kept, "-o", tmp_path / "model", *sets(DIT_OVERRIDES))
    sampled, grid = tmp_path / "sampled", tmp_path / "grid.png"
    options = ["--count", 12, "--steps", 2, "--method", "midpoint", "--guidance", 2, "--guidance-channels", 1]
    options += ["--coarse", tmp_path / "surrogate", "--coarse-until", 0.5, "--grid", grid]
    invoke("sample", tmp_path / "model", "--vqvae", vqvae, "-o", sampled, *options)
    assert grid.read_bytes()[:4] == b"\x89PNG"
    assert json.loads(invoke("verify", sampled, "--decode", "--json").stdout)["samples"] == 12
    invoke("embed", sampled, "--model", f"vqvae:{vqvae}", "-o", tmp_path / "sampled-embeddings")
    metrics, page = tmp_path / "metrics.json", tmp_path / "report.html"
    reference = ["--reference", tmp_path / "embeddings", "--kept", kept]
    more = ["--split", "train", "--vendi-order", 3, "--vendi-order", "inf"]
    more += ["--same-seed", tmp_path / "sampled-embeddings"]
    given = ["evaluate", tmp_path / "sampled-embeddings", *reference, "-o", metrics, "--name", "GraNd", *more]
    shown = invoke(*given).stdout
    assert "frechet distance" in shown and "train" in shown and "note: fewer samples (12)" in shown
    assert "closest_pairs" not in shown and "samples" in invoke(*given, "--dry-run").stdout
    told = json.loads(metrics.read_text())
    assert told["metrics"]["frechet_distance"] > 0 and told["vendi"]["orders"] == [1.0, 3.0, "inf"]
    assert told["context"]["reference"]["split"] == "train" and told["context"]["sampling"]["coarse_until"] == 0.5
    assert told["same_seed"]["twins"] == 1
    given = ["--shards", shards, "--scores", scores, "--clusters", clusters, "--metrics", metrics]
    named = ["--selection", f"GraNd={kept}", "--samples", f"GraNd={grid}", "--log", f"GraNd={tmp_path}/model/log.jsonl"]
    invoke("report", page, *given, *named)
    html = page.read_text()
    assert "GraNd" in html and 'src="http' not in html and 'href="http' not in html
    assert not [name for name in files(tmp_path) if "/.tmp-" in name or name.startswith(".tmp-")]


def _span(path: Path, sample) -> bytes:
    return path.read_bytes()[sample.offset : sample.offset + sample.size]


def test_no_stage_imports_dynamo_unasked(small_run: SmallRun, tmp_path: Path) -> None:
    """It takes a second, more than a small stage."""
    code = f"""
import sys
from pathlib import Path
import diffprune
run, out = Path({str(small_run.root)!r}), Path({str(tmp_path)!r})
diffprune.embed(run / "shards", out / "embeddings", model=f"vqvae:{{run / 'vqvae'}}")
diffprune.cluster(out / "embeddings", out / "clusters", k=3)
diffprune.score(run / "latents", run / "surrogate", out / "scores")
kept = {{"order": "k-center", "keep": 0.1, "dedup": 1e-6, "embeddings": out / "embeddings"}}
diffprune.select(out / "clusters", out / "kept.parquet", **kept)
sys.exit(", ".join({{"sympy", "torch._dynamo"}} & set(sys.modules)) or None)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_does_not_import_torch():
    code = "import sys; from diffprune.cli.app import app; sys.exit('torch' in sys.modules or 'pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    for command in ([], ["pack"], ["train", "dit"], ["select"]):
        assert "Usage" in invoke(*command, "--help").stdout


def test_help_names_every_option_and_verb_in_full_at_80_columns(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    commands = [([], typer.main.get_command(app))]
    while commands:
        path, command = commands.pop()
        text = invoke(*path, "--help").stdout
        assert max(map(len, text.splitlines())) <= 80
        named = [name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)]
        assert [name for name in named if name not in text] == [], path
        assert "…" not in text.replace(", …", ""), path
        commands += [([*path, name], verb) for name, verb in getattr(command, "commands", {}).items()]
    assert "MoSo:\n  --mode" in invoke("score", "--help").stdout
    assert "Data:\n  pack" in invoke("--help").stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["verify", "{root}/nothing-*.tar"], "no shards"),
        (["verify", "{root}/none.tar"], "none.tar: no such shard"),
        (["encode", "{root}/none-{{0..3}}.tar", "--vqvae", "{run}/vqvae", "-o", "{out}"], "none-0.tar: no such shard"),
        (["pack", "{root}/missing", "{out}"], "missing"),
        (["train", "dit", "{run}/latents", "-o", "{out}", "--set", "train.stepz=3"], "stepz"),
        (["train", "dit", "{run}/latents", "-o", "{out}", "--set", "train.steps=many"], "steps"),
        (["train", "dit", "{run}/embeddings", "-o", "{out}"], "expected latents, found embeddings"),
        (["score", "{run}/latents", "--checkpoint", "{run}/shards", "-o", "{out}"], "shards"),
        (["score", "{run}/latents", "--checkpoint", "{run}/surrogate", "--method", "grade", "-o", "{out}"], "grade"),
        (
            [
                "score",
                "{run}/latents",
                "--checkpoint",
                "{run}/surrogate",
                "--method",
                "moso",
                "--mode",
                "x",
                "-o",
                "{out}",
            ],
            "loo1",
        ),
        (["cluster", "{run}/embeddings", "-k", "119", "--metric", "manhattan", "-o", "{out}"], "cosine"),
        (["select", "{run}/scores", "--by", "quality", "--keep", "0.1", "-o", "{out}"], "quality"),
        (["select", "{run}/scores", "--order", "balanced", "--keep", "0.1", "-o", "{out}"], "cluster"),
        (["select", "{run}/scores", "--by", "grand", "-o", "{out}"], "exactly one of keep, prune and count"),
        (["select", "{run}/scores", "--by", "grand", "--count", "121", "-o", "{out}"], "121"),
        (["select", "{run}/scores", "{run}/scores", "--by", "grand", "--count", "12", "-o", "{out}"], "only one"),
        (["prune", "{run}/scores/stage.json", "{run}/shards", "-o", "{out}"], "stage.json"),
        (["evaluate", "{run}/latents", "--reference", "{run}/embeddings", "-o", "{out}"], "latents"),
        (["sample", "{run}/vqvae", "--vqvae", "{run}/vqvae", "-o", "{out}"], "vqvae"),
        (["evaluate", "{run}/embeddings", "--reference", "{run}/embeddings", "-o", "pipe:cat"], "names a command"),
    ],
)
def test_bad_input_is_told_and_leaves_nothing(small_run, tmp_path, arguments, complaint):
    out = tmp_path / "out"
    filled = [a.format(root=tmp_path, run=small_run.root, out=out) for a in arguments]
    result = invoke(*filled, code=1)
    assert result.stderr.startswith("error: ") and complaint in result.stderr, result.stderr
    assert "Traceback" not in result.output
    assert not out.exists() and files(tmp_path) == []


def test_a_name_that_is_not_utf8_is_told(small_run, tmp_path):
    given = ["evaluate", small_run.embeddings, "--reference", small_run.embeddings, "-o", tmp_path / "m.json"]
    told = invoke(*given, "--name", "gr\udcfcn", code=1).stderr
    assert "gr\\udcfcn" in told and "UTF-8" in told and files(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["cluster", "{run}/embeddings", "-k", "4", "--sample", "100", "-o", "{out}"], "--sample"),
        (
            ["cluster", "{run}/embeddings", "--like", "{run}/clusters", "--sample", "99", "-o", "{out}"],
            "--like assigns",
        ),
        (["cluster", "{run}/embeddings", "--choose-k", "2,3,4", "--levels", "2", "-o", "{out}"], "--levels"),
        (["cluster", "{run}/embeddings", "--choose-k", "2,3,4", "--n-init", "1", "-o", "{out}"], "--n-init"),
        (["cluster", "{run}/embeddings", "--choose-k", "2,3,4", "--engine", "faiss", "-o", "{out}"], "--engine"),
        (["report", "{out}", "--selection", "a={run}/x", "--selection", "a={run}/y"], "'a' is given twice"),
        (
            ["select", "{run}/scores", "--order", "random", "--keep", "0.1", "--within", "farthest", "-o", "{out}"],
            "none",
        ),
        (["select", "{run}/scores", "--by", "loss", "--keep", "0.1", "--dedup-keep", "random", "-o", "{out}"], "dedup"),
    ],
)
def test_options_without_effect_are_refused(small_run, tmp_path, arguments, complaint):
    filled = [a.format(run=small_run.root, out=tmp_path / "out") for a in arguments]
    result = runner.invoke(app, filled)
    assert result.exit_code in (1, 2) and complaint in " ".join(result.stderr.split()), result.stderr
    assert files(tmp_path) == []


def test_damaged_and_duplicate_shards_name_file_and_key(small_run, tmp_path):
    shards = tmp_path / "shards"
    shutil.copytree(small_run.shards, shards)
    first, second = sorted(shards.glob("*.tar"))[:2]
    whole = first.read_bytes()
    first.write_bytes(whole[: len(whole) // 2])
    for verb in (
        ["encode", shards, "--vqvae", small_run.vqvae],
        ["embed", shards, "--model", f"vqvae:{small_run.vqvae}"],
    ):
        told = invoke(*verb, "-o", tmp_path / "out", code=1).stderr
        assert first.name in told and "cut" in told and "diffprune verify" in told
        assert not (tmp_path / "out").exists()
    told = json.loads(invoke("verify", shards, "--json", code=1).stdout)
    assert told["damaged"] >= 1 and first.name in told["damage"][0]["shard"]
    first.write_bytes(second.read_bytes())
    key = index_shard(second).samples[0].key
    told = invoke("embed", shards, "--model", f"vqvae:{small_run.vqvae}", "-o", tmp_path / "out", code=1).stderr
    assert key in told and first.name in told and second.name in told
    assert "the same key" in invoke("verify", shards, "--json", code=1).stdout


def test_failed_samples_are_counted_at_the_end(small_run, tmp_path):
    shards = tmp_path / "shards"
    shutil.copytree(small_run.shards, shards)
    key = damage_image(sorted(shards.glob("*.tar"))[0])
    told = invoke("encode", shards, "--vqvae", small_run.vqvae, "-o", tmp_path / "latents").stdout
    assert "1 of 120 samples failed" in told and key in told
    kept = ["select", tmp_path / "latents", "--order", "random", "--keep", 0.5, "-o", tmp_path / "kept.parquet"]
    few = ["--set", "train.steps=1"]
    for verb in (
        kept,
        ["reconstruct", shards, "--vqvae", small_run.vqvae],
        ["train", "vqvae", shards, "-o", tmp_path / "vqvae", *sets(VQVAE_OVERRIDES), *few],
    ):
        told = invoke(*verb).stdout
        assert "samples that failed, and are left out: 1" in told and "None" not in told
    assert "damaged" in json.loads(invoke("verify", shards, "--decode", "--json", code=1).stdout)["damage"][0]["error"]


def test_missing_labels_are_told_before_a_conditional_model_trains(small_run, tmp_path):
    images = tmp_path / "images"
    write_digits(images, count=20)
    invoke("pack", images, tmp_path / "packed")
    from diffprune.packing import PackedSample, write_shards

    with_label = index_shard(next((tmp_path / "packed").glob("*.tar")))
    data = with_label.path.read_bytes()
    samples = []
    for sample in with_label.samples:
        image = sample.images()[0]
        samples.append(PackedSample(sample.key, {"png": data[image.data_offset : image.data_offset + image.size]}))
    write_shards(samples, tmp_path / "unlabelled", prefix="u")
    invoke("encode", tmp_path / "unlabelled", "--vqvae", small_run.vqvae, "-o", tmp_path / "latents")
    told = invoke("train", "dit", tmp_path / "latents", "-o", tmp_path / "run", *sets(DIT_OVERRIDES), code=1).stderr
    assert "label" in told and samples[0].key in told
    options = ["--set", "model.num_classes=0", "--set", "model.class_dropout_prob=0"]
    invoke("train", "dit", tmp_path / "latents", "-o", tmp_path / "run", *sets(DIT_OVERRIDES), *options)


def test_nan_scores_and_foreign_tables_cannot_be_selected(small_run, tmp_path):
    import pyarrow as pa

    from diffprune.tables import table_metadata, write_table

    scores = tmp_path / "scores"
    shutil.copytree(small_run.scores, scores)
    path = sorted(scores.glob("*.parquet"))[0]
    table, metadata = pq.read_table(path), table_metadata(path)
    column = table.column_names.index("grand")
    values = table["grand"].to_pylist()
    values[3] = float("nan")
    write_table(path, table.set_column(column, table.schema.field("grand"), pa.array(values, pa.float64())), metadata)
    told = invoke("select", scores, "--by", "grand", "--keep", 0.5, "-o", tmp_path / "kept.parquet", code=1).stderr
    assert "grand" in told and table["key"][3].as_py() in told
    (scores / path.name).unlink()
    told = invoke("select", scores, "--by", "grand", "--keep", 0.5, "-o", tmp_path / "kept.parquet", code=1).stderr
    assert "2 of 3 shards are done" in told
    assert not (tmp_path / "kept.parquet").exists()


def test_resume_with_another_config_is_refused(small_run, tmp_path):
    scores = tmp_path / "scores"
    shutil.copytree(small_run.scores, scores)
    base = ["score", small_run.latents, "--checkpoint", small_run.surrogate, "-o", scores]
    told = invoke(*base, "--method", "random,loss,el2n,grand,moso,monotonicity", "--seed", 5, code=1).stderr
    assert "seed was 0, is now 5" in told
    run = tmp_path / "surrogate"
    shutil.copytree(small_run.surrogate, run)
    told = invoke(
        "train", "dit", small_run.latents, "-o", run, *sets(DIT_OVERRIDES), "--set", "train.lr=5", code=1
    ).stderr
    assert "lr" in told


def test_dry_run_writes_nothing(small_run, tmp_path):
    out = tmp_path / "out"
    plans = [
        ["pack", small_run.images, out],
        ["verify", small_run.shards],
        ["train", "vqvae", small_run.shards, "-o", out, *sets(VQVAE_OVERRIDES)],
        ["encode", small_run.shards, "--vqvae", small_run.vqvae, "-o", out],
        ["embed", small_run.shards, "--model", f"vqvae:{small_run.vqvae}", "-o", out],
        ["train", "dit", small_run.latents, "-o", out, *sets(DIT_OVERRIDES)],
        ["score", small_run.latents, "--checkpoint", small_run.surrogate, "-o", out],
        ["cluster", small_run.embeddings, "-k", 3, "-o", out],
        ["select", small_run.scores, "--by", "grand", "--prune", 0.9, "-o", out],
        ["sample", small_run.surrogate, "--vqvae", small_run.vqvae, "-o", out],
        ["evaluate", small_run.embeddings, "--reference", small_run.embeddings, "-o", out],
    ]
    for plan in plans:
        assert json.loads(invoke(*plan, "--dry-run", "--json").stdout)["dry_run"] is True, plan
    assert files(tmp_path) == [] and not out.exists()


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_scoring_keeps_what_is_finished_and_finishes_the_rest(small_run, tmp_path, sent, code):
    latents, out = small_run.latents, tmp_path / "scores"
    base = ["score", str(latents), "--checkpoint", str(small_run.surrogate), "--draws", "24", "--method", "loss,grand"]
    command = [sys.executable, "-m", "diffprune", *base, "-o", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not list(out.glob("[!.]*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(sent)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == code and "run the same command again" in told, told
    assert 1 <= len(list(out.glob("[!.]*.parquet"))) < 3
    assert not [name for name in files(out) if ".tmp-" in name]
    finished = {path.name: path.read_bytes() for path in out.glob("[!.]*.parquet")}
    result = json.loads(invoke(*base, "-o", out, "--json").stdout)
    assert result["shards_done_before"] == len(finished)
    invoke(*base, "-o", tmp_path / "undisturbed")
    for path in sorted((tmp_path / "undisturbed").glob("[!.]*.parquet")):
        assert path.read_bytes() == (out / path.name).read_bytes()
    assert pc.count(read_folder(out)["grand"]).as_py() == 120


def test_doctor_says_what_runs_and_why_the_rest_does_not():
    found = json.loads(invoke("doctor", "--json").stdout)
    assert found["packages"]["torch"] and found["device"].split(":")[0] in ("cpu", "cuda")
    for op, implementations in found["ops"].items():
        assert implementations["reference"] == "runs", op
    assert "kmeans_assign" in invoke("doctor").stdout


@pytest.mark.parametrize(
    "given, meant",
    [
        (["score", "x", "--ray"], ["score", "x", "--ray", "auto"]),
        (["score", "--ray", "-o", "y"], ["score", "--ray", "auto", "-o", "y"]),
        (["score", "--ray", "host:6379", "-o", "y"], ["score", "--ray", "host:6379", "-o", "y"]),
        (["score", "--ray=host:6379"], ["score", "--ray=host:6379"]),
        ([], []),
    ],
)
def test_the_address_of_a_ray_cluster_can_be_left_out(given, meant):
    assert with_ray_address(given) == meant


def test_the_command_takes_ray_without_an_address(monkeypatch, capsys, tmp_path):
    out = tmp_path / "scores"
    given = ["score", str(tmp_path / "nowhere"), "--checkpoint", "x", "-o", str(out), "--ray"]
    monkeypatch.setattr("sys.argv", ["diffprune", *given])
    with pytest.raises(SystemExit):
        main()
    assert "nowhere: no stage.json" in capsys.readouterr().err and not out.exists()


def run_command(*arguments: object, before: str = "", **environment: str) -> subprocess.CompletedProcess:
    """The command line in a process of its own, after a shell's redirections."""
    command = [sys.executable, "-m", "diffprune", *map(str, arguments)]
    shell = ["sh", "-c", f'exec "$@" {before}', "sh", *command]
    return subprocess.run(shell, capture_output=True, env={**os.environ, **environment}, check=False)


def test_an_encoding_without_the_characters_is_no_error(small_run, tmp_path):
    from test_pruning import write_tar

    write_tar(tmp_path / "é.tar", {"é": {"txt": b""}})
    for arguments in (["prune", "--help"], ["verify", tmp_path], ["verify", tmp_path / "é.tar", "--json"]):
        done = run_command(*arguments, PYTHONIOENCODING="ascii")
        assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
        assert done.stdout.isascii()
    (tmp_path / "lost é.tar").symlink_to("é nowhere")
    told = json.loads(run_command("verify", tmp_path, "--json", PYTHONIOENCODING="ascii").stdout)
    assert told["damage"][0]["shard"] == str(tmp_path / "lost é.tar")
    done = run_command("reconstruct", small_run.shards, "--vqvae", small_run.vqvae, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("closed", ["2>&-", "1>&-", "1>&- 2>&-"])
def test_a_closed_stream_is_no_error(small_run, tmp_path, closed):
    out = tmp_path / "clusters"
    done = run_command("cluster", small_run.embeddings, "-k", 3, "-o", out, before=closed)
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert read_folder(out).num_rows == 120
    assert (b"smallest cluster" in done.stdout) == ("1>" not in closed)
    assert run_command("verify", small_run.shards, "--json", before=closed).returncode == 0
    refused = run_command("verify", tmp_path / "nowhere", before=closed)
    assert refused.returncode == 1 and refused.stdout == b"", "an error is not printed where results are"

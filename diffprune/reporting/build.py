"""The report verb: whatever inputs are given, read, drawn and put into one HTML file."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from diffprune._version import __version__
from diffprune.errors import InputError
from diffprune.files import atomic_path
from diffprune.outputs import HTML, check_output
from diffprune.progress import progress, quiet
from diffprune.reporting import sections
from diffprune.reporting.inputs import (
    Log,
    PathLike,
    Scores,
    Selection,
    class_names,
    read_evaluations,
    read_logs,
    read_scores,
    read_selections,
    stage_of,
)
from diffprune.reporting.palette import Palette
from diffprune.reporting.tables import flatten
from diffprune.shards import ShardSpec
from diffprune.storage import as_path


def report(
    out: str | os.PathLike,
    *,
    title: str = "diffprune report",
    shards: ShardSpec | None = None,
    scores: Sequence[PathLike] | Mapping[str, PathLike] = (),
    selections: Mapping[str, PathLike] | None = None,
    clusters: PathLike | None = None,
    samples: Mapping[str, ShardSpec] | None = None,
    metrics: Sequence[PathLike] = (),
    logs: Mapping[str, PathLike] | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Write one HTML file that needs nothing else: pictures, figures and styles are inside it.

    A section whose input is not given is left out. A name given to several inputs (a selection, its metrics, its
    samples, its log) is one method, and has one colour. The same inputs give the same bytes.

    Args:
        shards: the data set's shards, for pictures of the highest and lowest scored images.
        scores: folders of score tables of that data set. In a mapping, the names tell columns of one name apart.
        selections: name -> kept.parquet. Class retention needs ``scores`` or ``clusters``, where the labels are.
        clusters: the folder that ``cluster`` wrote.
        samples: name -> a grid of generated images (PNG), or their shards; with shards, and metrics of the same name,
            the page also shows which generated images are nearest to a training image.
        metrics: files that ``evaluate`` wrote.
        logs: name -> the log.jsonl of a training run.
        dry_run: read and check the tables, name the sections, write nothing.

    Returns ``out``, ``sections`` (their titles), ``bytes``. Raises InputError if there is nothing to show, or an input
    is unreadable, of another data set, or holds NaN scores.
    """
    given = [path for paths in (selections, samples, logs) for path in (paths or {}).values()]
    check_output(out, HTML, [*metrics, *(path for path in given if isinstance(path, (str, os.PathLike)))])
    folders = _named_folders(scores)
    if clusters is not None and not any(os.path.realpath(f) == os.path.realpath(clusters) for f in folders.values()):
        folders = {**folders, "clusters": clusters}
    table = read_scores(folders)
    chosen = read_selections(selections or {}, table)
    evaluations = read_evaluations(metrics)
    curves = read_logs(logs or {})
    pictures = dict(samples or {})
    if table is None and not (chosen or evaluations or curves or pictures):
        raise InputError("report: nothing to show; give scores, selections, samples, metrics or logs")
    material = sections.Material(
        table,
        chosen,
        evaluations,
        curves,
        pictures,
        shards,
        class_names(shards),
        _palette(table, chosen, selections or {}, evaluations, pictures, curves),
    )
    builders = [builder for builder in sections.BUILDERS if builder.applies(material)]
    plan = {"out": str(out), "sections": [b.title for b in builders] + ["Provenance"], "dry_run": dry_run}
    if dry_run:
        return plan
    content = {}
    with progress("report", total=len(builders), unit="sections") as bar:
        for builder in builders:
            with quiet():
                content[builder.id] = builder.build(material)
            bar.advance(note=builder.title)
    page = render(
        "report.html.j2",
        title=title,
        version=__version__,
        facts=sections.facts(material),
        headline=sections.headline_of(material),
        sections=[{"id": builder.id, "title": builder.title} for builder in builders],
        content=content,
        provenance=_provenance(folders, selections or {}, chosen, evaluations),
    )
    with atomic_path(out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return {**plan, "bytes": len(page.encode())}


def render(template: str, **values: Any) -> str:
    """A page of a template that lies beside this file."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # keys, names and paths come from data sets: nothing in them may become markup
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def _named_folders(scores: Sequence[PathLike] | Mapping[str, PathLike]) -> dict[str, PathLike]:
    if isinstance(scores, Mapping):
        return dict(scores)
    folders = [scores] if isinstance(scores, (str, os.PathLike)) else list(scores)
    names = [as_path(folder).name for folder in folders]
    return {n if names.count(n) == 1 else str(as_path(f)): f for n, f in zip(names, folders, strict=True)}


def _palette(
    table: Scores | None,
    chosen: Sequence[Selection],
    selection_paths: Mapping[str, PathLike],
    evaluations: Sequence[dict[str, Any]],
    pictures: Mapping[str, ShardSpec],
    curves: Sequence[Log],
) -> Palette:
    """Selections take the colour of the score they were made by; a run, that of its selection."""
    score_names = [score.name for score in table.scores] if table else []
    aliases: dict[str, str] = {}
    for selection in chosen:
        target = selection.by or {"random": "random", "cluster-nearest": "distance"}.get(
            selection.metadata.get("order", ""), ""
        )
        if target in score_names and target not in aliases.values():
            aliases[selection.name] = target
    by_path = {os.path.realpath(path): name for name, path in selection_paths.items()}
    for evaluation in evaluations:
        kept = evaluation["context"].get("kept")
        name = by_path.get(os.path.realpath(kept)) if kept else None
        if name is not None and evaluation["name"] != name:
            aliases[evaluation["name"]] = aliases.get(name, name)
    runs = [*(s.name for s in chosen), *(e["name"] for e in evaluations), *pictures, *(log.name for log in curves)]
    full = [e["name"] for e in evaluations if e["context"].get("kept") is None]
    return Palette([*runs, *score_names], aliases, neutral=full)


def _provenance(
    folders: Mapping[str, PathLike],
    selection_paths: Mapping[str, PathLike],
    chosen: Sequence[Selection],
    evaluations: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Versions, and for each input where it is, its fingerprint, and what it was made with."""
    rows = []
    for name, folder in folders.items():
        stage = stage_of(folder)
        rows.append(_origin(stage.get("stage", "score"), name, folder, {**stage, **stage.get("config", {})}))
    for selection in chosen:
        rows.append(_origin("select", selection.name, selection_paths[selection.name], selection.metadata))
    for evaluation in evaluations:
        context = evaluation["context"]
        settings = {**context, "version": context.get("diffprune"), "reference": context["reference"].get("path")}
        rows.append(_origin("evaluate", evaluation["name"], context["samples"]["path"], settings))
    packages = ("torch", "numpy", "pyarrow", "matplotlib")
    versions = [("diffprune", __version__), ("Python", platform.python_version())]
    return {"rows": rows, "versions": versions + [(name, version(name)) for name in packages]}


def _origin(step: str, name: str, path: PathLike, settings: Mapping[str, Any]) -> dict[str, Any]:
    first = {key: settings[key] for key in ("fingerprint", "version") if settings.get(key)}
    elsewhere = (*first, "stage", "config", "metadata", "inputs", "diffprune", "samples", "flags")
    rest = {key: value for key, value in settings.items() if key not in elsewhere}
    return {"step": step, "name": name, "path": str(as_path(path)), "settings": flatten(first) + flatten(rest)}

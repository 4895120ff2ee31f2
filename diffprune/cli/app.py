"""The verbs. Modules that import torch are imported by the verb that needs them, so that ``--help`` is instant."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import diffprune
from diffprune.cli import data_verbs, feature_verbs, model_verbs, proof_verbs, selection_verbs
from diffprune.cli.commands import Verb, Verbs
from diffprune.environment import prepare, prepare_streams

# rich_markup_mode=None: rich's tables of options cut their names at 80 columns
app = typer.Typer(
    name="diffprune",
    help="Score every image of a diffusion model's training set, say which to keep, and prove it.",
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
train = typer.Typer(
    help="Train the VQ-VAE or the DiT, from a TOML config and overrides.",
    cls=Verbs,
    no_args_is_help=True,
    rich_markup_mode=None,
)

VERBS = {
    "Data": (data_verbs.pack, data_verbs.verify, data_verbs.prune, data_verbs.export),
    "Features": (feature_verbs.encode, feature_verbs.embed),
    "Selection": (selection_verbs.score, selection_verbs.cluster, selection_verbs.select),
    "Models": (train, model_verbs.convert, model_verbs.reconstruct, model_verbs.sample),
    "Proof": (proof_verbs.evaluate, proof_verbs.sweep, proof_verbs.report, proof_verbs.doctor),
}
train.command("vqvae", cls=Verb)(model_verbs.train_vqvae)
train.command("dit", cls=Verb)(model_verbs.train_dit)
for panel, verbs in VERBS.items():
    for verb in verbs:
        if isinstance(verb, typer.Typer):
            app.add_typer(verb, name="train", rich_help_panel=panel)
        else:
            app.command(rich_help_panel=panel, cls=Verb)(verb)


def main() -> None:
    """Entry point of the ``diffprune`` command."""
    prepare()
    prepare_streams()
    app(args=with_ray_address(sys.argv[1:]))


def with_ray_address(arguments: list[str]) -> list[str]:
    """``--ray`` without an address means ``--ray auto``: typer has no options whose value can be left out."""
    given = []
    for argument, following in zip(arguments, [*arguments, "-"][1:], strict=True):
        given += [argument, "auto"] if argument == "--ray" and following.startswith("-") else [argument]
    return given


def _version(value: bool) -> None:
    if value:
        print(f"diffprune {diffprune.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass

"""An output folder belongs to one plan: a run that was stopped goes on, another run is refused."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from diffprune.errors import InputError, ResumeError
from diffprune.files import TEMPORARY_PREFIX, fingerprint, read_json, write_json
from diffprune.locks import is_lock
from diffprune.storage import AnyPath, as_path, existing


def claim_folder(
    out: str | os.PathLike,
    manifest: str,
    plan: dict[str, Any],
    paths: Sequence[AnyPath],
    *,
    extra: Sequence[str],
    dry_run: bool,
) -> set[AnyPath]:
    """Reserve ``out`` for one plan by a manifest file in it, and say which of ``paths`` are not there yet.

    Raises:
        InputError: ``out`` holds files that are not this plan's.
        ResumeError: ``out`` holds the manifest of another plan; the settings that differ are named.
    """
    out = as_path(out)
    is_folder = out.is_dir()
    if not is_folder and out.exists():
        raise InputError(f"{out}: expected a folder, found a file")
    found = {path.name for path in out.iterdir() if not is_lock(path)} if is_folder else set()
    theirs = None
    if (out / manifest).exists():
        theirs = read_json(out / manifest)
        theirs = theirs.get("plan") if isinstance(theirs, dict) else None
        if not isinstance(theirs, dict):
            raise InputError(f"{out / manifest}: expected the plan of a run, found something else; remove the folder")
        if different := sorted(name for name in plan if plan[name] != theirs.get(name)):
            told = "; ".join(f"{name}: {theirs.get(name)!r} there, {plan[name]!r} now" for name in different)
            raise ResumeError(
                f"{out / manifest}: begun with other settings ({told}); "
                "finish it with the same settings or write into another folder"
            )
        half_written = {name for name in found if name.startswith(TEMPORARY_PREFIX)}  # by this plan's runs
        ours = {manifest, *extra, *(path.name for path in paths), *half_written}
    else:
        ours = {manifest, TEMPORARY_PREFIX + manifest}  # a shard without its manifest is somebody else's
    if foreign := sorted(found - ours):
        raise InputError(
            f"{out}: expected an empty folder, found {len(foreign)} other file(s), first {foreign[0]!r}; "
            "write into another folder"
        )
    if not dry_run and theirs != plan:
        write_json(out / manifest, {"fingerprint": fingerprint(plan), "plan": plan})
    return set(paths) - existing(paths)

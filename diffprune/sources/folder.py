"""A folder of class folders."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from diffprune.errors import InputError
from diffprune.progress import progress
from diffprune.sources.base import Source, SourceImage, check_collisions, image_extension, safe_key, safe_name

SIDECAR_SUFFIXES = {".csv", ".html", ".json", ".jsonl", ".md", ".mat", ".npy", ".tsv", ".txt", ".xml", ".yaml", ".yml"}
SIDECAR_NAMES = {"desktop.ini", "license", "readme", "sha256sums", "thumbs.db"}


class FolderSource(Source):
    """``<folder>/<class>/.../<image>``: classes numbered in sorted order of their names."""

    kind = "folder"

    def __init__(self, folder: Path) -> None:
        self.name = safe_name(folder.resolve().name)
        self.folder = folder
        self.class_names: list[str] = []
        self.paths: list[str] = []
        self.labels: list[int] = []
        listing = hashlib.blake2b(digest_size=16)
        top = self._entries(folder)
        loose = [entry.name for entry in top if not entry.is_dir()]
        for entry in filter(os.DirEntry.is_dir, top):
            if not _is_text(entry.name):
                raise InputError(f"{entry.path!a}: a class name that is not UTF-8; rename the folder")
            files = sorted(self._files(Path(entry.path)))
            if not files:
                raise InputError(f"{entry.path}: a class folder without images; put some in or remove it")
            for path, size, mtime in files:
                listing.update(f"{path}\0{size}\0{mtime}\n".encode("utf-8", "surrogateescape"))
            self.paths += [path for path, _, _ in files]
            self.labels += [len(self.class_names)] * len(files)
            self.class_names.append(entry.name)
        if loose:
            raise InputError(
                f"{folder / loose[0]}: expected class folders, found {len(loose)} file(s) outside of any; "
                "move images to <folder>/<class>/ and other files away"
            )
        if not self.paths:
            raise InputError(f"{folder}: expected class folders with images, found none")
        self._check_images()
        self.identity = listing.hexdigest()
        self.keys = [safe_key(path) for path in self.paths]
        check_collisions(self.keys, lambda row: str(folder / self.paths[row]))

    def read(self, rows: Sequence[int] | np.ndarray) -> Iterator[SourceImage]:
        for row in rows:
            path = self.folder / self.paths[row]
            yield SourceImage(self.keys[row], self.labels[row], _read(path), str(path))

    def _entries(self, folder: Path) -> list[os.DirEntry[str]]:
        """Sorted; hidden ones and sidecars left out (sidecars counted), links checked."""
        root, entries = self.folder.resolve(), []
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            if entry.is_symlink():
                target = Path(os.path.realpath(entry.path))
                if root not in target.parents or not target.is_file():
                    raise InputError(
                        f"{entry.path}: a link to {target}; links may only lead to files inside {self.folder}. "
                        "Copy the target there or remove the link"
                    )
            suffix = os.path.splitext(entry.name)[1].lower()
            if entry.is_file() and (suffix in SIDECAR_SUFFIXES or entry.name.lower() in SIDECAR_NAMES):
                self.skipped += 1
                continue
            entries.append(entry)
        return entries

    def _files(self, folder: Path) -> Iterator[tuple[str, int, int]]:
        for entry in self._entries(folder):
            if entry.is_dir():
                yield from self._files(Path(entry.path))
            else:
                about = entry.stat()
                yield Path(entry.path).relative_to(self.folder).as_posix(), about.st_size, about.st_mtime_ns

    def _check_images(self) -> None:
        bad = []
        with progress("check", total=len(self.paths), unit="files") as bar:
            for path in self.paths:
                if image_extension(_read(self.folder / path, 16)) is None:
                    bad.append(path)
                bar.advance()
        if bad:
            raise InputError(
                f"{self.folder}: {len(bad)} of {len(self.paths)} files are no PNG, JPEG or WebP by their first bytes: "
                f"{', '.join(bad[:5])}{', ...' if len(bad) > 5 else ''}; convert them, or remove them"
            )


def _read(path: Path, limit: int = -1) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(limit)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True

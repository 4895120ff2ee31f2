"""Hugging Face image parquet."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from diffprune.errors import InputError
from diffprune.sources.base import Source, SourceImage, check_collisions, random_order, safe_key, safe_name
from diffprune.storage import AnyPath, RemotePath, Stat, for_arrow, stats

POOL_BYTES = 512 << 20


class ParquetSource(Source):
    """Hugging Face image parquet: ``image`` struct{bytes, path}, ``label`` int, names in the schema's metadata."""

    kind = "parquet"

    def __init__(self, paths: Sequence[AnyPath], name: str) -> None:
        splits = {match[1] for path in paths if (match := re.fullmatch(r"(.+)-\d{5}-of-\d{5}", path.stem))}
        if len(splits) > 1:
            raise InputError(
                f"{paths[0].parent}: parquet files of {len(splits)} splits ({', '.join(sorted(splits))}); "
                f"name one, such as '{paths[0].parent}/{min(splits)}-*.parquet'"
            )
        self.name = safe_name(splits.pop() if splits else name)
        self.groups: list[tuple[AnyPath, int, int]] = []  # (file, row group, the file's first row)
        self.group_bytes: list[int] = []
        self.keys = []
        starts, labels, names = [0], [], []
        listing = hashlib.blake2b(digest_size=16)
        self._found = stats(paths)
        for path in paths:
            if path not in self._found:
                raise InputError(f"{path}: no such file")
            first = len(self.keys)
            with _open(path, self._found[path]) as file:
                _check_schema(path, file.schema_arrow)
                labels.append(_labels(path, file))
                names.append(_class_names(path, file.schema_arrow))
                for group in range(file.metadata.num_row_groups):
                    about = file.metadata.row_group(group)
                    self.groups.append((path, group, first))
                    self.group_bytes.append(_image_bytes(path, about))
                    starts.append(starts[-1] + about.num_rows)
            stem = safe_key(path.name)
            self.keys += [f"{stem}_{row:08d}" for row in range(len(labels[-1]))]
            size, version = self._found[path]
            version = path.stat().st_mtime_ns if isinstance(path, Path) else version
            listing.update(f"{path.name}\0{size}\0{version}\n".encode())
        if not self.keys:
            raise InputError(f"{paths[0]}: no rows in {len(paths)} parquet file(s)")
        if different := [path for path, other in zip(paths, names, strict=True) if other != names[0]]:
            raise InputError(f"{different[0]}: other class names than in {paths[0]}; pack them separately")
        self.identity = listing.hexdigest()
        self.starts = np.asarray(starts)
        self.labels = np.concatenate(labels)
        self.class_names = names[0] or [str(label) for label in range(max(int(self.labels.max()), 0) + 1)]
        wrong = np.flatnonzero((self.labels < 0) | (self.labels >= len(self.class_names)))
        if len(wrong):
            raise InputError(
                f"{self._origin(int(wrong[0]))}: expected a label from 0 to {len(self.class_names) - 1}, found "
                f"{self.labels[wrong[0]]} ({len(wrong)} such rows); an unlabelled split cannot be packed"
            )
        check_collisions(self.keys, self._origin)
        self.pools = np.arange(len(self.groups))
        self._held: dict[int, pa.ChunkedArray] = {}  # images of the row groups in use, all of one pool
        self._held_pool = -1

    def order(self, seed: int | None) -> np.ndarray:
        """Row groups in random order fill pools of 512 MiB; rows are in random order within each pool."""
        if seed is None:
            return super().order(None)
        groups = random_order([f"{safe_key(path.name)}/{group}" for path, group, _ in self.groups], seed)
        sizes = np.asarray(self.group_bytes)[groups]
        self.pools[groups] = (np.cumsum(sizes) - sizes) // POOL_BYTES
        rank = np.empty(len(self.keys), dtype=np.int64)
        rank[random_order(self.keys, seed)] = np.arange(len(self.keys))
        return np.lexsort((rank, np.repeat(self.pools, np.diff(self.starts))))

    def read(self, rows: Sequence[int] | np.ndarray) -> Iterator[SourceImage]:
        for row in np.asarray(rows).tolist():
            group = self._group(row)
            if self.pools[group] != self._held_pool:
                self._held.clear()
                self._held_pool = self.pools[group]
            if group not in self._held:
                path, number, _ = self.groups[group]
                self._held[group] = _read_images(path, number, self._found[path])
            data = self._held[group][row - int(self.starts[group])].as_py()
            if data is None:
                raise _no_bytes(self._origin(row))
            yield SourceImage(self.keys[row], int(self.labels[row]), data, self._origin(row))

    def _group(self, row: int) -> int:
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    def _origin(self, row: int) -> str:
        path, _, first = self.groups[self._group(row)]
        return f"{path}, row {row - first}"


def _check_schema(path: AnyPath, schema: pa.Schema) -> None:
    image = schema.field("image").type if "image" in schema.names else None
    label = schema.field("label").type if "label" in schema.names else None
    if image is None or label is None:
        raise InputError(f"{path}: expected columns 'image' and 'label', found {', '.join(schema.names)}")
    if not pa.types.is_struct(image) or image.get_field_index("bytes") < 0:
        raise InputError(f"{path}: expected column 'image' to be a struct with 'bytes', found {image}")
    if not pa.types.is_integer(label):
        raise InputError(f"{path}: expected column 'label' to hold integers, found {label}")


def _labels(path: AnyPath, file: pq.ParquetFile) -> np.ndarray:
    column = file.read(columns=["label"])["label"]
    if column.null_count:
        row = column.is_null().to_pylist().index(True)
        raise InputError(f"{path}, row {row}: no label; {column.null_count} row(s) have none. Label or remove them")
    return column.to_numpy().astype(np.int64)


def _class_names(path: AnyPath, schema: pa.Schema) -> list[str] | None:
    """The names that Hugging Face's ``datasets`` keeps in the schema, None where there are none."""
    try:
        about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        return about.get("info", {}).get("features", {}).get("label", {}).get("names")
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path}: its 'huggingface' schema metadata cannot be read ({error})") from error


def _image_bytes(path: AnyPath, group: pq.RowGroupMetaData) -> int:
    """How many bytes a row group's images have; InputError if the statistics tell that some are not there."""
    for column in map(group.column, range(group.num_columns)):
        if column.path_in_schema == "image.bytes":
            statistics = column.statistics
            if statistics is not None and statistics.has_null_count and statistics.null_count:
                raise _no_bytes(str(path))
            return column.total_uncompressed_size
    raise InputError(f"{path}: column 'image' has no 'bytes'")


def _no_bytes(origin: str) -> InputError:
    return InputError(
        f"{origin}: an image with a path and no bytes; the parquet only points to files. Embed them "
        "(datasets: `embed_table_storage`, or push_to_hub with embed_external_files=True) or pack the folder of files"
    )


def _read_images(path: AnyPath, group: int, about: Stat) -> pa.ChunkedArray:
    with _open(path, about) as file:
        return pc.struct_field(file.read_row_group(group, columns=["image.bytes"])["image"], "bytes")


@contextmanager
def _open(path: AnyPath, about: Stat) -> Iterator[pq.ParquetFile]:
    """``about``: what a URL's object must still be."""
    try:
        with ExitStack() as opened:
            file: Path | BinaryIO
            if isinstance(path, RemotePath):
                from diffprune.storage.reading import RemoteFile, as_stream

                file = as_stream(opened.enter_context(RemoteFile(path, *about)))
            else:
                file = for_arrow(path)
            yield opened.enter_context(pq.ParquetFile(file))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; it was there when the source was opened") from error
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable parquet file ({error}); fetch it again") from error

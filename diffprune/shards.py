"""WebDataset shards: which they are, where each sample lies in them, and its bytes.

One pass over a tar's 512-byte headers gives every sample's key, offsets and sizes. That index is how shards are
read, counted, verified, subset and rewritten; nothing is ever extracted and no name in a tar is ever used as a path.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffprune.errors import InputError
from diffprune.progress import progress
from diffprune.storage import AnyPath, RemotePath, Stat, as_path, stats
from diffprune.storage.paths import READ_ONLY
from diffprune.tar_index import Damage, index_tar
from diffprune.tar_samples import BLOCK, IMAGE_EXTENSIONS, Member, Sample, SampleList
from diffprune.unique_keys import first_repeated

if TYPE_CHECKING:
    from diffprune.storage.reading import RemoteFile

__all__ = [
    "BLOCK",
    "IMAGE_EXTENSIONS",
    "Damage",
    "Member",
    "Sample",
    "SampleList",
    "ShardIndex",
    "ShardReader",
    "ShardSpec",
    "find_duplicate_key",
    "find_shards",
    "index_each",
    "index_found",
    "index_shard",
    "index_shards",
    "list_shards",
]

_BLOCK_BYTES = 1 << 20
_INDEXED_AT_ONCE = 4
MOST_NAMES = 1_000_000  # of a brace pattern; the largest data sets have a quarter of that

ShardSpec = str | os.PathLike | Sequence[str | os.PathLike]


@dataclass(frozen=True)
class ShardIndex:
    """Every sample of one shard in file order, what is damaged, and what is no sample (links, stray names).

    ``version``: of a URL, what tells this version of the object from others, such as its ETag.
    """

    path: AnyPath
    samples: SampleList
    damage: list[Damage]
    ignored: list[str]
    size: int
    version: str | None = field(default=None, compare=False)

    @property
    def identity(self) -> dict[str, Any]:
        """What tells this shard from another one of its name, JSON-able: the same for a copy of it elsewhere.

        Images of the same sizes under the same names and times of change are not told apart, see docs/reliability.md.
        """
        return {"bytes": self.size, "index": self.samples.digest()}

    def only(self, keys: Set[str]) -> ShardIndex:
        """The index of these samples alone, with the numbers that they have in the shard."""
        return replace(self, samples=self.samples.only(keys))


def list_shards(spec: ShardSpec) -> list[AnyPath]:
    """The shard files that ``spec`` means, in order.

    ``spec`` is a brace pattern (``train-{000000..000127}.tar``), a glob, a folder (its ``*.tar``), a ``.tar`` file,
    a text file that lists shards one a line, or a sequence of any of these; each may be a URL. Raises InputError if a
    shard is missing, if there is none, or if two have the same file name (tables are named after them).
    """
    return list(find_shards(spec))


def find_shards(spec: ShardSpec, dangling: list[Path] | None = None) -> dict[AnyPath, Stat]:
    """``list_shards``, with what storage said of each when it was asked whether it is there; for ``index_found``.

    ``dangling``: a list that gets the links to files that are not there, in place of an error.
    """
    specs = [spec] if isinstance(spec, (str, os.PathLike)) else list(spec)
    try:
        paths = [path for one in specs for path in _expand(os.fspath(one))]
    except RecursionError:
        raise InputError(
            f"{show_spec(specs)}: a list of shards that leads back to itself; expected .tar files in it"
        ) from None
    if not paths:
        raise InputError(
            f"{show_spec(specs)}: no shards; expected a brace pattern, a glob, a folder with .tar files or a list file"
        )
    there = stats(paths)
    missing = [path for path in paths if path not in there]
    if dangling is not None:
        dangling += [path for path in missing if isinstance(path, Path) and path.is_symlink()]
        lost = set(dangling)
        missing, paths = ([path for path in some if path not in lost] for some in (missing, paths))
    if missing:
        where = f"{len(missing)} of {len(paths)} of {show_spec(specs)} are missing"
        raise InputError(f"{missing[0]}: no such shard ({where})")
    seen: dict[str, AnyPath] = {}
    for path in paths:
        if (other := seen.get(path.stem)) is not None:
            same = path == other or (isinstance(path, Path) and isinstance(other, Path) and path.samefile(other))
            if same:
                raise InputError(f"{path}: given twice{'' if path == other else f', as {other} too'}; give it once")
            raise InputError(f"{path}: another shard has the same name ({other}); rename one of them")
        seen[path.stem] = path
    return {path: there[path] for path in paths}


def index_shards(spec: ShardSpec) -> list[ShardIndex]:
    """Index every shard of ``spec``; raise InputError if one is damaged or a key stands in two places.

    ``diffprune verify`` lists all the damage; every other stage refuses damaged shards through this function.
    """
    return index_found(find_shards(spec))


def index_found(shards: Mapping[AnyPath, Stat]) -> list[ShardIndex]:
    """``index_shards`` of what ``find_shards`` found, or of some of it: nothing is asked for again."""
    indexes = []
    # A shard behind a URL takes a minute and more, of which nothing would be seen; one on disk none.
    shown = _any_remote(shards) and progress("index", total=len(shards), unit="shards")
    with shown or nullcontext() as bar:
        for index in index_each(shards):
            indexes.append(index)
            if bar:
                bar.advance()
    for index in indexes:
        if index.damage:
            first = index.damage[0]
            key = f", key {first.key!r}" if first.key else ""
            more = f" (and {len(index.damage) - 1} more)" if len(index.damage) > 1 else ""
            raise InputError(
                f"{index.path}: at byte {first.offset:,}{key}: {first.message}{more}. "
                f"Run `diffprune verify` for the whole list, then {first.remedy}"
            )
    duplicate = find_duplicate_key(indexes)
    if duplicate:
        key, first_path, second_path = duplicate
        raise InputError(
            f"{second_path}: key {key!r} is also in {first_path}; keys must be unique over all shards. "
            f"Pack again with unique keys, or leave one of the shards out"
        )
    return indexes


def index_each(shards: Mapping[AnyPath, Stat]) -> Iterator[ShardIndex]:
    """``index_shard`` of each, in order; some URLs at a time, as each of them is waited for."""
    if not _any_remote(shards):
        yield from map(index_shard, shards)
        return
    with ThreadPoolExecutor(_INDEXED_AT_ONCE, thread_name_prefix="index") as pool:
        yield from pool.map(index_shard, shards, shards.values())


def _any_remote(paths: Iterable[AnyPath]) -> bool:
    return any(isinstance(path, RemotePath) for path in paths)


def find_duplicate_key(indexes: Iterable[ShardIndex]) -> tuple[str, AnyPath, AnyPath] | None:
    """The first key that stands in two shards, with the two, or None."""
    indexes = list(indexes)
    found = first_repeated([len(index.samples) for index in indexes], lambda shard: indexes[shard].samples.keys)
    return found and (found[0], indexes[found[1]].path, indexes[found[2]].path)


class ShardReader:
    """The bytes of one shard, for any number of threads. A context manager.

    ``size``: the file's size when it was indexed, if known: raises InputError if it is another one now. Reading is by
    ``pread``: other threads run meanwhile, and a file that is cut while it is read is an error, not the process' end.
    A URL is read by ranges: see ``will_read``, and ``storage.reading.RemoteFile`` for ``version`` and errors.
    """

    def __init__(self, path: str | os.PathLike, size: int | None = None, version: str | None = None) -> None:
        self.path, self.size, self._version = as_path(path), size, version
        self._remote: RemoteFile | None = None
        self._opened = ExitStack()

    def __enter__(self) -> ShardReader:
        if isinstance(self.path, RemotePath):
            from diffprune.storage.reading import RemoteFile

            self._remote = self._opened.enter_context(RemoteFile(self.path, self.size, self._version))
            self._read = self._remote.read_at
            return self
        self._file = os.open(self.path, os.O_RDONLY)
        found = os.fstat(self._file).st_size
        if self.size is not None and found != self.size:
            os.close(self._file)
            raise InputError(
                f"{self.path}: expected {self.size:,} bytes, found {found:,}: it changed after it was indexed; "
                f"run the command again"
            )
        return self

    def __exit__(self, *error: Any) -> None:
        if self._remote is None:
            os.close(self._file)
        else:
            self._opened.__exit__(*error)

    def will_read(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Say which ranges [begin, end) will be read, about in this order: those of a URL are then read ahead.

        Without it each read is a request, and waited for.
        """
        if self._remote is not None:
            from diffprune.storage.reading import ReadAhead

            self._read = self._opened.enter_context(ReadAhead(self._remote, ranges)).read_at

    def read(self, member: Member, limit: int | None = None) -> bytes:
        """The data of one member, of a longer one its first ``limit`` bytes."""
        return self.span(member.data_offset, member.size if limit is None else min(member.size, limit))

    def samples(self, samples: Iterable[Sample]) -> Iterator[tuple[Sample, dict[str, bytes]]]:
        """Samples and the data of their members, by extension; neighbours are read together, a megabyte at a time."""
        if self._remote is not None:
            samples = list(samples)
            self.will_read((sample.offset, sample.offset + sample.size) for sample in samples)
        block: list[Sample] = []
        start = end = 0
        for sample in samples:
            offset = sample.members[0].header_offset
            if block and (offset != end or end - start > _BLOCK_BYTES):
                yield from self._read_block(block, start, end)
                block = []
            if not block:
                start = offset
            block.append(sample)
            end = sample.members[-1].end
        if block:
            yield from self._read_block(block, start, end)

    def _read_block(self, block: list[Sample], start: int, end: int) -> Iterator[tuple[Sample, dict[str, bytes]]]:
        data = self.read_at(start, end - start)
        for sample in block:
            members = {}
            for _, extension, _, offset, size in sample.members:
                begin = offset - start
                members[extension] = piece = data[begin : begin + size]
                if len(piece) != size:
                    self.span(offset, size)  # raises: it has become shorter
            yield sample, members

    def span(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset``, exactly; raises InputError if the file has become shorter."""
        data = self.read_at(offset, size)
        if len(data) != size:
            raise InputError(
                f"{self.path}: expected {size} bytes at {offset}, found {len(data)}: it changed after it was indexed"
            )
        return data

    def read_at(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset``, fewer at the end of the file."""
        if self._remote is not None:
            return self._read(offset, size)
        try:
            data = os.pread(self._file, size, offset)
            while 0 < len(data) < size and (more := os.pread(self._file, size - len(data), offset + len(data))):
                data += more
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0), str(self.path)) from error
        return data


def show_spec(spec: ShardSpec) -> str:
    """For messages: the first three, without what may be a signature."""
    specs = [spec] if isinstance(spec, (str, os.PathLike)) else spec
    shown = [str(as_path(one)) if "?" in one and "://" in one else one for one in (os.fspath(s) for s in specs[:3])]
    return ", ".join(shown) + (", …" if len(specs) > 3 else "")


def index_shard(path: str | os.PathLike, about: Stat | None = None) -> ShardIndex:
    """Index one shard by its headers, see ``tar_index``. Damage is reported in the result, not raised.

    The index of a URL is kept on local disk, see ``storage.index_cache``. ``about``: what its storage said of it just
    now, if it was asked.
    """
    path = as_path(path)
    size, version = (path.stat().st_size, None) if isinstance(path, Path) else about or path.stat()
    if size == 0:
        return ShardIndex(
            path, SampleList.empty(), [Damage(0, None, "the file is empty; expected a tar")], [], 0, version
        )
    if isinstance(path, RemotePath):
        return ShardIndex(path, *_index_remote(path, size, version), size, version)
    with ShardReader(path, size) as reader:
        samples, damage, ignored = _index(reader.read_at, size)
    return ShardIndex(path, samples, damage, ignored, size)


_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}


def _index(
    read_at: Callable[[int, int], bytes], size: int, *windows: Any
) -> tuple[SampleList, list[Damage], list[str]]:
    """As ``index_tar``; a compressed tar is told as what it is, not as a damaged one."""
    samples, damage, ignored = index_tar(read_at, size, *windows)
    if damage and damage[0].offset == 0:
        begin = read_at(0, 6)
        for mark, name in _COMPRESSED.items():
            if begin.startswith(mark):
                message = f"compressed by {name}; samples are read by their place in a plain tar"
                return SampleList.empty(), [Damage(0, None, message, "decompress it")], []
    return samples, damage, ignored


def _index_remote(path: RemotePath, size: int, version: str) -> tuple[SampleList, list[Damage], list[str]]:
    from diffprune.storage.index_cache import load_index, save_index
    from diffprune.storage.reading import WINDOWS, HeaderReads, RemoteFile

    index = load_index(path, size, version)
    if index is None:
        with RemoteFile(path, size, version) as file, HeaderReads(file) as reads:
            index = _index(reads.read_at, size, WINDOWS)
        save_index(path, size, version, index)
    return index


def _expand(spec: str) -> list[AnyPath]:
    path = as_path(spec)
    if isinstance(path, RemotePath):
        return _expand_url(path)
    if path.is_dir():
        return sorted(path.glob("[!.]*.tar"))  # a hidden one is what a killed run left half-written
    if path.is_file():
        return [path] if path.suffix == ".tar" else _read_list(path)
    if "{" in spec:
        return _expand_braces(spec)
    if _is_pattern(spec):
        return sorted(Path(one) for one in glob.glob(spec))
    if path.suffix == ".tar":
        return [path]  # reported as missing
    raise InputError(f"{spec}: no such file or folder")


def _expand_url(url: RemotePath) -> list[AnyPath]:
    spec = os.fspath(url)
    if "{" in spec:
        return _expand_braces(spec)
    if url.suffix == ".tar":
        return [url] if not _is_pattern(url.name) or url.scheme in READ_ONLY else list(url.parent.glob(url.name))
    if _is_pattern(url.name) and url.scheme not in READ_ONLY:
        return list(url.parent.glob(url.name))
    return _read_list(url) if url.is_file() else list(url.glob("[!.]*.tar"))


def _expand_braces(spec: str) -> list[AnyPath]:
    from braceexpand import UnbalancedBracesError, braceexpand

    # braceexpand lists every range, however long, before it gives the first name
    ranges = re.findall(r"\{(-?\d{1,30})\.\.(-?\d{1,30})[.}]", spec)
    names: list[str] = []
    try:
        if all(abs(int(last) - int(first)) < MOST_NAMES for first, last in ranges):
            names = list(islice(braceexpand(spec), MOST_NAMES + 1))
    except UnbalancedBracesError as error:
        raise InputError(f"{spec}: a brace pattern whose braces do not match") from error
    if not names or len(names) > MOST_NAMES:
        raise InputError(f"{spec}: a brace pattern of more than {MOST_NAMES:,} names; is there a digit too many in it?")
    return [as_path(one) for one in names]


def _is_pattern(text: str) -> bool:
    return any(character in text for character in "*?[")


def _read_list(path: AnyPath) -> list[AnyPath]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        plain = "; decompress it" if path.suffix in (".gz", ".tgz", ".zst", ".bz2", ".xz") else ""
        raise InputError(f"{path}: expected a .tar, or a text file with one shard a line{plain}") from error
    names = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    return [one for name in names for one in _expand(name if _is_whole(name) else os.fspath(path.parent / name))]


def _is_whole(name: str) -> bool:
    """Whether a list's line says by itself where the shard is."""
    return os.path.isabs(name) or "://" in name

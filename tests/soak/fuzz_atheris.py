"""The header index and the sample reader under atheris: bytes that libFuzzer finds by the code that they reach.

    pip install atheris
    python -m tests.soak.fuzz_atheris --runs 200000

Begins with small tars of every format; after libFuzzer's own mutation half of all headers get their checksum right
again, or nothing would get past it. Exits 1 at the first broken promise of ``tar_mutations``, with the bytes.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from soak_options import soak_parser

MAX_BYTES = 16 << 10


def main() -> None:
    parser = soak_parser(__doc__)
    parser.add_argument("--runs", type=int, default=200_000)
    parser.set_defaults(seed=1)  # 0 is another one each time, to libFuzzer
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.corpus:
        fuzz(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder))
        options = ["--runs", str(arguments.runs), "--seed", str(arguments.seed), "--corpus", folder]
        done = subprocess.run(
            [sys.executable, "-m", "tests.soak.fuzz_atheris", *options], stderr=subprocess.PIPE, text=True
        )
    print(done.stderr[-4000:])
    found = re.search(r"Done (\d+) runs", done.stderr)
    runs = int(found[1]) if found else 0
    lost = int(done.returncode != 0 or not found)
    row = {"what": "tars that atheris came to", "tried": runs, "survived": runs - lost, "lost": lost}
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": [row]}))
    sys.exit(lost)


def write_corpus(folder: Path) -> None:
    """Tars of a few members in each format, and an empty one."""
    from tar_mutations import EXTENSIONS, FILLINGS, FORMATS, STEMS, TYPES, Entry, build

    rng = random.Random(0)
    (folder / "empty").write_bytes(b"")
    for number in range(60):
        items = [
            Entry(rng.choice(STEMS) + rng.choice(EXTENSIONS), rng.choice(FILLINGS), rng.choice(TYPES))
            for _ in range(rng.randint(1, 4))
        ]
        for fmt in FORMATS:
            (folder / f"{fmt}-{number}").write_bytes(build(items, fmt)[:MAX_BYTES].rstrip(b"\0") + bytes(1024))


def fuzz(arguments: argparse.Namespace) -> None:
    import atheris

    modules = ("tar_headers", "tar_members", "tar_index", "tar_samples", "shards")
    with atheris.instrument_imports(include=[f"diffprune.{module}" for module in modules]):
        from diffprune.shards import index_shard
    from tar_mutations import check_index, set_checksum

    path = Path(tempfile.mkdtemp()) / "a.tar"

    def one(data: bytes) -> None:
        path.write_bytes(data)
        check_index(index_shard(path), data)

    def mutated(data: bytes, most: int, seed: int) -> bytes:
        data, rng = bytearray(atheris.Mutate(data, most)), random.Random(seed)
        for start in range(0, len(data) - 511, 512):
            if data[start + 257 : start + 262] == b"ustar" and rng.random() < 0.5:
                set_checksum(data, start)
        return bytes(data)

    options = [f"-runs={arguments.runs}", f"-seed={arguments.seed}", f"-max_len={MAX_BYTES}"]
    options += ["-timeout=5", "-rss_limit_mb=1024", "-print_final_stats=1", f"-artifact_prefix={path.parent}/"]
    atheris.Setup([sys.argv[0], *options, str(arguments.corpus)], one, custom_mutator=mutated)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

"""The long form of test_storage_s3.py: pack, encode, score, select and prune over an S3 that keeps failing.

    python -m tests.soak.s3_faults --seconds 60

Round after round, each with other faults: every request may fail, be cut, be dropped, be lost or come late; credentials
expire somewhere in the middle and are renewed. Each round has to end with the bytes of an undisturbed local run, no
upload left open, and nothing finished done twice. Prints one JSON line: tried, survived, lost; exits 1 if anything was
lost. Needs the packages of the extras ``test`` and ``remote``.
"""

from __future__ import annotations

import json
import logging
import os
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from s3_server import Faults, S3Server, serve
from small_run import DIT_OVERRIDES, VQVAE_OVERRIDES, SmallRun, write_digits
from soak_options import soak_parser

KINDS = {"error": 0.1, "busy": 0.1, "cut": 0.1, "dropped": 0.1, "lost": 0.1, "slow": 0.01}  # of requests, at most
MAX_RENEWALS = 20  # of credentials, in a round


def main() -> None:
    parser = soak_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # of connections that were dropped

    from diffprune.progress import set_enabled
    from diffprune.storage import clients, retries, writing

    set_enabled(False)
    retries.RETRIES = retries.Retries(attempts=30, first=0.002, most=0.05)
    clients.PATIENCE = 2.0  # a busy machine needs some
    writing.PART = 5 << 20
    outcomes, seen, renewals, retried = Counter(), Counter(), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        run = SmallRun(Path(folder))
        expected = reference(run)
        os.environ |= {"DIFFPRUNE_CACHE": f"{folder}/cache", "DIFFPRUNE_SPOOL": f"{folder}/spool"}
        begin = time.monotonic()
        while time.monotonic() - begin < arguments.seconds or not outcomes:
            number = outcomes.total()
            with serve() as server:
                os.environ |= server.environment
                clients.forget_clients()
                chance = random.Random(f"{arguments.seed} {number}")
                rates = {kind: chance.random() * most for kind, most in KINDS.items() if chance.random() < 0.7}
                server.faults = Faults(rates, pause=2.5, seed=chance.randrange(1 << 30))
                try:
                    renewals += disturbed(run, server, chance)
                    lost = differences(server, expected)
                except Exception:
                    lost = traceback.format_exc()
                outcomes["lost" if lost else "survived"] += 1
                seen += server.faults.seen
                retried += len(server.requests)
                if lost:
                    print(f"round {number} (seed {arguments.seed}, rates {rates}): {lost}", file=sys.stderr)
                clients.forget_clients()
        took = time.monotonic() - begin
    result = {
        "soak": "s3_faults",
        "tried": outcomes.total(),
        "survived": outcomes["survived"],
        "lost": outcomes["lost"],
    }
    about = {"seconds": round(took), "requests": retried, "faults": dict(sorted(seen.items())), "renewals": renewals}
    what = "pipelines over an S3 with 500s, slow and cut bodies, lost answers, expired credentials"
    result |= about | {"rows": [{"what": what, **{name: result[name] for name in ("tried", "survived", "lost")}}]}
    print(json.dumps(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result) + "\n")
    sys.exit(outcomes["lost"] > 0)


def reference(run: SmallRun) -> dict[str, bytes]:
    """Models to work with, and what an undisturbed local run gives: "shards/…", "latents/…", …"""
    import diffprune
    from diffprune.config import load_config

    write_digits(run.images, count=60)
    diffprune.pack(run.images, run.shards, shard_size=15)
    diffprune.train_vqvae(load_config(None, "vqvae", VQVAE_OVERRIDES), run.shards, run.vqvae)
    diffprune.encode(run.shards, run.vqvae, run.latents)
    diffprune.train_dit(load_config(None, "dit", DIT_OVERRIDES), run.latents, run.surrogate)
    stages(run, str(run.root))
    names = ("shards", "latents", "scores", "pruned")
    files = [file for name in names for file in sorted((run.root / name).iterdir())]
    found = {f"{file.parent.name}/{file.name}": file.read_bytes() for file in files}
    return {"kept.parquet": (run.root / "kept.parquet").read_bytes(), **found}


def stages(run: SmallRun, root: str) -> None:
    """Everything, into the folder or URL ``root``; what is there already is kept."""
    import diffprune

    diffprune.pack(run.images, f"{root}/shards", shard_size=15)
    diffprune.encode(f"{root}/shards", run.vqvae, f"{root}/latents")
    diffprune.score(f"{root}/latents", run.surrogate, f"{root}/scores", methods=("el2n", "grand", "moso"))
    diffprune.select(f"{root}/scores", f"{root}/kept.parquet", by="grand", prune=0.5)
    diffprune.prune(f"{root}/kept.parquet", f"{root}/shards", f"{root}/pruned", shard_size=8)


def disturbed(run: SmallRun, server: S3Server, chance: random.Random) -> int:
    """Run until it is done, with new credentials whenever they have expired; how often that was."""
    from diffprune.errors import RemoteError

    renewals = 0
    while True:
        expire_after(server, chance.randrange(20, 400) if renewals < MAX_RENEWALS else None)
        try:
            stages(run, "s3://bucket")
            return renewals
        except RemoteError as error:
            if error.kind != "expired":
                raise
        server.faults.expired = False
        renewals += 1


def expire_after(server: S3Server, requests: int | None) -> None:
    draw, left = Faults.draw, [requests]

    def expiring(target: str) -> str | None:
        if left[0] is not None:
            left[0] -= 1
            server.faults.expired |= left[0] < 0
        return draw(server.faults, target)

    server.faults.draw = expiring


def differences(server: S3Server, expected: dict[str, bytes]) -> str:
    """What is not as it should be."""
    found = {name.removeprefix("bucket/"): one.data for name, one in server.objects.items()}
    told = []
    if found.keys() != expected.keys():
        told.append(f"objects {sorted(found.keys() ^ expected.keys())}")
    plans = {"pruned/prune.json"}  # holds the versions of the shards, which are not those of local files
    told += [
        f"{name} differs" for name in sorted(found.keys() & expected.keys() - plans) if found[name] != expected[name]
    ]
    if server.uploads:
        told.append(f"{len(server.uploads)} uploads left")
    for name, times in server.stored.items():
        is_final = name.endswith((".parquet", ".tar")) and not name.endswith("kept.parquet")
        if is_final and times > 1 + server.unanswered[name]:
            told.append(f"{name} was written {times} times, {server.unanswered[name]} of them unknown to the client")
    return "; ".join(told)


if __name__ == "__main__":
    main()

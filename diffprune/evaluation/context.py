"""What a set of metrics was computed from, and what a reader must know before comparing them."""

from __future__ import annotations

from typing import Any

from diffprune.evaluation.folders import FeatureFolder, check_alike

FEW_HELD_OUT = 100
# of `sample`'s plan, what a result states; the hashes say which checkpoints
_SAMPLING = (
    *("steps", "method", "rtol", "atol", "guidance", "guidance_channels", "seed", "count", "image_size"),
    *("precision", "coarse_until", "model_sha256", "coarse_sha256", "vqvae_sha256"),
)


def common_embedder(samples: FeatureFolder, reference: FeatureFolder) -> dict[str, Any]:
    """What made both folders; InputError if they differ in the model, its weights, the image size or anything else
    but the precision."""
    check_alike(samples.folder, samples.embedder, reference.folder, reference.embedder)
    told = {field: value for field, value in samples.embedder.items() if field != "shape"}
    return {**told, "dimensions": samples.dimensions}


def sampling_of(folder: FeatureFolder) -> dict[str, Any] | None:
    """How generated images were drawn, where ``diffprune sample`` drew them: steps, guidance, seed, checkpoints."""
    plan = folder.metadata.get("sampled")
    return {name: plan[name] for name in _SAMPLING if plan.get(name) is not None} if isinstance(plan, dict) else None


def flags(
    samples: FeatureFolder,
    reference: FeatureFolder,
    *,
    used_samples: int,
    used_reference: int,
    held_out: int,
    infinity: dict[str, Any] | None,
    nearness: dict[str, Any],
    dedup: bool,
    has_classes: bool,
) -> list[str]:
    """In words, what a reader must know before comparing the numbers."""
    dimensions = samples.dimensions
    told = [
        f"fewer {what} ({count:,}) than embedding dimensions ({dimensions:,}): the Fréchet distance is inflated"
        for what, count in (("reference images", len(reference)), ("samples", len(samples)))
        if count < dimensions
    ]
    precisions = [folder.embedder.get("precision") for folder in (samples, reference)]
    if precisions[0] != precisions[1]:
        told.append(f"samples and reference were embedded in different precisions, {precisions[0]} and {precisions[1]}")
    if infinity is None:
        least = 2 * (dimensions + 1)
        told.append(f"no Fréchet distance at infinity: it needs {least:,} samples of {dimensions:,} dimensions")
    told += [
        f"precision, recall and classes from {part:,} of {whole:,} {what}, drawn at random"
        for what, part, whole in (
            ("reference images", used_reference, len(reference)),
            ("samples", used_samples, len(samples)),
        )
        if part < whole
    ]
    told += [
        f"{folder.failed:,} of the {what} failed when they were embedded, and are left out"
        for what, folder in (("samples", samples), ("reference images", reference))
        if folder.failed
    ]
    sampling, embedded = sampling_of(samples), len(samples) + samples.failed
    drawn = (sampling or {}).get("count", embedded)
    if embedded < drawn:
        told.append(f"only {embedded:,} of the {drawn:,} samples that were to be drawn are here")
    if nearness["baseline"] == "leave-one-out":
        told.append("no held-out images: memorization is judged against the training images' own neighbours")
    elif held_out < FEW_HELD_OUT:
        told.append(f"the memorization baseline rests on only {held_out} held-out images")
    if nearness["share_below_p1"] is None:
        told.append(
            "no memorized share: 1% or more of the memorization baseline are exact copies of training images, and "
            "nothing is nearer than a copy"
        )
    if dedup and nearness["baseline"] == "held-out":
        told.append(
            "the selection left out near-duplicates of what it kept: held-out images are nearer to the training images "
            "than new ones would be, and memorization looks smaller"
        )
    if not has_classes:
        told.append("the reference has no labels: no class balance")
    size = samples.embedder.get("image_size")
    if sampling is None:
        told.append("how the samples were drawn (steps, guidance, seed) is not recorded")
    elif sampling.get("image_size") not in (None, size) and samples.embedder.get("model") == "inception":
        told.append(
            f"the samples are {sampling['image_size']} pixels wide and were resized to {size} for the embedder: FID is "
            f"defined on the images as they are"
        )
    return told

"""Real photos as files' bytes, in the shapes and modes that image sets have."""

from __future__ import annotations

import io
from pathlib import Path

import pytest


def photos() -> dict[str, bytes]:
    """Two real photos as JPEGs, and a portrait, odd sizes, grey, palette, alpha and tiny versions of one of them."""
    sklearn = pytest.importorskip("sklearn")
    from PIL import Image

    folder = Path(sklearn.__file__).parent / "datasets" / "images"
    china = Image.open(folder / "china.jpg").convert("RGB")
    flower = Image.open(folder / "flower.jpg").convert("RGB")
    alpha = flower.resize((61, 90))
    alpha.putalpha(Image.linear_gradient("L").resize(alpha.size))
    return {
        "china.jpg": (folder / "china.jpg").read_bytes(),
        "flower.jpg": (folder / "flower.jpg").read_bytes(),
        "portrait.png": _png(china.crop((200, 0, 401, 427))),
        "odd.png": _png(flower.resize((333, 97))),
        "wide.png": _png(china.crop((0, 200, 640, 231))),
        "grey.jpg": _jpeg(china.convert("L").resize((300, 301))),
        "palette.png": _png(flower.resize((123, 77)).quantize(32)),
        "alpha.png": _png(alpha),
        "tiny.png": _png(flower.resize((3, 5))),
        "pixel.png": _png(china.resize((1, 1))),
    }


def published_processor(name: str):
    """An image processor of transformers that works by Pillow: what version 4 calls ``name``, 5 ``name`` + Pil."""
    import transformers

    return getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)


def for_transformers(data: bytes):
    """The picture for a processor of transformers: in RGB, on white; old ones drop what is clear, or take no grey."""
    from PIL import Image

    image = Image.open(io.BytesIO(data))
    if "A" in image.getbands():
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def write_class_folder(folder: Path) -> dict[str, bytes]:
    """The photos in one class folder, for ``pack``; returns them by sample key."""
    found = photos()
    (folder / "photos").mkdir(parents=True)
    for name, data in found.items():
        (folder / "photos" / name).write_bytes(data)
    return {f"photos/{name.partition('.')[0]}": data for name, data in found.items()}


def _png(image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _jpeg(image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()

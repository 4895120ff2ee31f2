"""Pixels are right, damage is noticed, labels are integers."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image
from test_shards import write_tar

from diffprune.decode import DecodeError, center_crop, decode_image, load_images, read_batches
from diffprune.errors import InputError
from diffprune.shards import index_shard

RNG = np.random.default_rng(0)


def photo(height: int, width: int, channels: int = 3) -> np.ndarray:
    ramp = np.linspace(0, 255, height * width * channels).reshape(height, width, channels)
    return ((ramp + RNG.normal(0, 20, ramp.shape)).clip(0, 255)).astype(np.uint8)


def encoded(pixels: np.ndarray, fmt: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, fmt, **options)
    return buffer.getvalue()


def test_lossless_formats_give_the_pixels_back():
    pixels = photo(13, 17)
    for fmt, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        assert np.array_equal(decode_image(encoded(pixels, fmt, **options)), pixels.transpose(2, 0, 1))
    gray = photo(9, 5, 1)
    assert np.array_equal(decode_image(encoded(gray, "PNG"), channels=1), gray.transpose(2, 0, 1))
    assert np.array_equal(decode_image(encoded(gray, "PNG"), channels=3), np.repeat(gray.transpose(2, 0, 1), 3, axis=0))


def test_jpeg_agrees_with_pillow():
    data = encoded(photo(64, 48), "JPEG", quality=90)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).transpose(2, 0, 1).astype(int)
    assert np.abs(decode_image(data) - expected).max() <= 2


def test_sixteen_bit_is_scaled_not_clipped():
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    assert np.array_equal(decode_image(buffer.getvalue(), channels=1)[0], np.arange(256).reshape(16, 16))


def test_cmyk_jpeg_decodes_through_pillow():
    buffer = io.BytesIO()
    Image.fromarray(photo(16, 16)).convert("CMYK").save(buffer, "JPEG")
    assert decode_image(buffer.getvalue()).shape == (3, 16, 16)


def test_resizing_crops_the_centre():
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200
    assert (decode_image(encoded(wide, "PNG"), size=10) == 200).all()
    assert decode_image(encoded(photo(33, 71), "PNG"), size=8).shape == (3, 8, 8)
    halved = np.asarray(center_crop(Image.fromarray(np.tile(np.uint8([[0, 100]]), (8, 4))), 4))
    assert (halved == 50).all()  # exact halving is a box mean


def test_damaged_images_raise_with_the_reason():
    jpeg, png = encoded(photo(64, 64), "JPEG"), encoded(photo(64, 64), "PNG")
    for data in (jpeg[: len(jpeg) // 2], png[: len(png) // 2], b"", b"hello", jpeg[:20]):
        with pytest.raises(DecodeError):
            decode_image(data)
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 4
    with pytest.raises(DecodeError, match="damaged"):
        decode_image(bytes(flipped))


def test_flipped_bits_in_a_jpeg_are_mostly_noticed():
    # Huffman data has little redundancy: a strict decoder notices most flips, none of them silently kills the run
    data = encoded(photo(96, 96), "JPEG", quality=95)
    noticed = 0
    for position in range(len(data) // 2, len(data) // 2 + 200):
        flipped = bytearray(data)
        flipped[position] ^= 0x10
        try:
            decode_image(bytes(flipped))
        except DecodeError:
            noticed += 1
    assert noticed >= 20


def test_a_bomb_is_refused_before_it_is_decoded():
    for fmt in ("JPEG", "PNG"):
        with pytest.raises(DecodeError, match="pixels"):
            decode_image(encoded(photo(64, 64), fmt), max_pixels=1000)


def test_load_images_reports_failures_by_row(tmp_path):
    good = encoded(photo(8, 8), "PNG")
    uid = "0123456789abcdef" * 2
    write_tar(
        tmp_path / "a.tar",
        [
            ("0.png", good),
            ("0.cls", b"3\n"),
            ("0.json", json.dumps({"uid": uid}).encode()),
            ("1.png", good[:40]),
            ("1.cls", b"4"),
            ("2.txt", b"no image"),
            ("3.png", good),
            ("3.cls", b"cat"),
            ("4.png", good),
        ],
    )
    table, images = load_images(tmp_path, size=8, channels=3)
    assert table["key"].to_pylist() == ["0", "1", "2", "3", "4"]
    assert table["status"].to_pylist() == ["ok", "failed", "failed", "failed", "ok"]
    assert table["label"].to_pylist() == [3, 4, None, None, None]
    assert table["uid"].to_pylist() == [uid, None, None, None, None]
    errors = table["error"].to_pylist()
    assert "damaged" in errors[1] and "2.txt" in errors[2] and "expected an integer" in errors[3]
    assert np.array_equal(images[0], images[4]) and images[0].any()
    assert not images[1:4].any()


@pytest.mark.parametrize("text", [b"0" * 70 + b"7", b"7" + b" " * 70 + b"9", b"1" * 5000])
def test_a_label_longer_than_any_is_no_label_and_not_its_first_digits(tmp_path, text):
    write_tar(tmp_path / "a.tar", [("0.png", encoded(photo(8, 8), "PNG")), ("0.cls", text)])
    [batch] = read_batches(index_shard(tmp_path / "a.tar"), size=8, channels=3)
    assert batch.labels == [None] and f"expected an integer, found {len(text):,} bytes" in batch.errors[0]


def test_load_images_of_keys(tmp_path):
    write_tar(tmp_path / "a.tar", [(f"{i}.png", encoded(np.full((4, 4, 3), i, np.uint8), "PNG")) for i in range(9)])
    table, images = load_images(tmp_path, size=4, channels=1, keys=["7", "2"])
    assert table["key"].to_pylist() == ["2", "7"]
    assert images[:, 0, 0, 0].tolist() == [2, 7]
    with pytest.raises(InputError, match="'nowhere'"):
        load_images(tmp_path, size=4, channels=1, keys=["7", "nowhere"])


@pytest.mark.parametrize("size", [None, 40])
@pytest.mark.parametrize("threads", [1, 3])
def test_pixels_of_a_batch_and_zeros_where_one_failed(tmp_path, size, threads):
    images = [encoded(photo(40, 40), "JPEG", quality=90) for _ in range(7)]
    images[3] = encoded(photo(40, 40), "PNG")
    expected = [decode_image(data) for data in images]
    for row in (0, 5):  # decoded in part before the damage is met
        images[row], expected[row] = images[row][: len(images[row]) // 2], np.zeros((3, 40, 40), np.uint8)
    write_tar(tmp_path / "a-0.tar", [(f"{row}.jpg", data) for row, data in enumerate(images)])
    [batch] = read_batches(index_shard(tmp_path / "a-0.tar"), size=size, channels=3, threads=threads)
    assert [error is not None for error in batch.errors] == [row in (0, 5) for row in range(7)]
    assert np.array_equal(batch.images, np.stack(expected))


def test_images_of_several_sizes_need_a_size(tmp_path):
    images = [encoded(photo(8, 12), "JPEG"), encoded(photo(8, 13), "PNG")]
    write_tar(tmp_path / "a-0.tar", [(f"{row}.jpg", data) for row, data in enumerate(images)])
    index = index_shard(tmp_path / "a-0.tar")
    with pytest.raises(InputError, match="key '1' is 13×8 pixels, another of the same batch 12×8: give a size"):
        list(read_batches(index, size=None, channels=3, threads=1))
    assert [b.images.shape for b in read_batches(index, size=None, channels=3, batch_size=1)] == [
        (1, 3, 8, 12),
        (1, 3, 8, 13),
    ]

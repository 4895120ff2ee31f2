"""Hostile and odd images: each ends as the right pixels, or as a failed row that says why; order never changes."""

from __future__ import annotations

import contextlib
import io
import struct
import threading
import zlib

import numpy as np
import pytest
from PIL import Image
from test_decode import encoded, photo
from test_shards import write_tar

import diffprune
from diffprune.cli import options as cli
from diffprune.decode import DecodeError, Decoding, decode_image, load_images, read_batches
from diffprune.pixels import MAX_PIXELS
from diffprune.shards import index_shard


def save(image: Image.Image, fmt: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


def jpeg_with_size(width: int, height: int) -> bytes:
    data = bytearray(encoded(photo(16, 16), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def webp_with_size(width: int, height: int) -> bytes:
    data = bytearray(encoded(photo(16, 16), "WEBP", lossless=True))
    at = data.index(b"VP8L") + 9
    bits = int.from_bytes(data[at : at + 4], "little") & ~((1 << 28) - 1)
    data[at : at + 4] = (bits | (width - 1) | (height - 1) << 14).to_bytes(4, "little")
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [png_header(60_000, 60_000), png_header(2**31 - 1, 2**31 - 1), jpeg_with_size(65_500, 65_500)],
    ids=["png", "largest png", "jpeg"],
)
def test_a_bomb_is_refused_by_its_header(data):
    with pytest.raises(DecodeError, match=r"pixels; expected 1 to 100,000,000"):
        decode_image(data)


def test_the_limit_counts_for_webp_and_can_be_raised_beyond_pillows():
    with pytest.raises(DecodeError, match="268435456 pixels"):
        decode_image(webp_with_size(16_384, 16_384))
    with pytest.raises(DecodeError, match="12000×10000 pixels; expected 1 to 100,000,000"):
        decode_image(webp_with_size(12_000, 10_000))
    for data in (png_header(20_000, 10_000), jpeg_with_size(20_000, 10_000)):  # Pillow's own limit is at 179 million
        with pytest.raises(DecodeError, match="damaged"):
            decode_image(data, max_pixels=200_000_000)
    assert cli.MAX_PIXELS == MAX_PIXELS


def test_zero_area_is_refused():
    for data in (jpeg_with_size(0, 16), jpeg_with_size(16, 0), png_header(0, 5), png_header(5, 0)):
        with pytest.raises(DecodeError):
            decode_image(data)


def test_a_thin_image_is_no_bomb_when_resized():
    thin = save(Image.new("L", (60_000, 1)), "PNG")
    assert decode_image(thin, channels=1).shape == (1, 1, 60_000)
    with pytest.raises(DecodeError, match="too thin"):
        decode_image(thin, size=256)


def test_cmyk_is_pillows_pixels_and_strict():
    data = save(Image.fromarray(photo(40, 40)).convert("CMYK"), "JPEG", quality=95)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(decode_image(data), expected)
    with pytest.raises(DecodeError):
        decode_image(data[: len(data) * 2 // 3] + b"\xff\xd9")


def test_sixteen_bit_colour_and_gray_keep_their_upper_byte():
    gray = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    assert np.array_equal(decode_image(save(Image.fromarray(gray), "PNG"))[1], np.arange(256).reshape(16, 16))


def test_of_an_animation_the_first_frame_counts():
    frames = [Image.new("RGB", (9, 7), colour) for colour in ("red", "green", "blue")]
    for fmt, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        data = save(frames[0], fmt, save_all=True, append_images=frames[1:], **options)
        pixels = decode_image(data)
        assert (pixels == np.uint8([255, 0, 0])[:, None, None]).all(), fmt


def test_an_exif_rotation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = photo(8, 20)
    data = save(Image.fromarray(pixels), "JPEG", exif=exif, quality=95)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decode_image(data), expected.transpose(2, 0, 1)) and expected.shape == (8, 20, 3)


def test_palettes_and_two_levels():
    pixels = photo(12, 12)
    palette = Image.fromarray(pixels).quantize(16)
    assert np.array_equal(decode_image(save(palette, "PNG")), np.asarray(palette.convert("RGB")).transpose(2, 0, 1))
    bits = Image.fromarray(photo(12, 12, 1)[..., 0]).convert("1")
    assert set(np.unique(decode_image(save(bits, "PNG")))) <= {0, 255}


def flipped_jpegs() -> list[bytes]:
    data = encoded(photo(96, 96), "JPEG", quality=95)
    flips = []
    for position in range(len(data) // 2, len(data) // 2 + 100):
        flipped = bytearray(data)
        flipped[position] ^= 0x10
        flips.append(bytes(flipped))
    return flips


def pillow(data: bytes) -> np.ndarray | None:
    """What Pillow, so webdataset's ``.decode("pil")``, makes of it; None if it refuses."""
    try:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).transpose(2, 0, 1)
    except OSError:
        return None


def test_not_strict_is_what_pillow_makes_of_it_with_a_note():
    loose = Decoding(strict=False)
    noted = 0
    for data in flipped_jpegs():
        expected = pillow(data)
        if expected is None:  # a flip may make a marker, at which Pillow gives up too
            with pytest.raises(DecodeError):
                loose.decode(data)
            continue
        pixels, note = loose.decode(data)
        try:
            assert np.array_equal(decode_image(data), expected)
            assert note is None
        except DecodeError as error:
            assert note == str(error) and "damaged JPEG" in note
            noted += 1
        assert np.array_equal(pixels, expected)
    assert noted >= 20
    whole = encoded(photo(96, 96), "JPEG")
    with pytest.raises(DecodeError):  # Pillow does not take half a file either
        loose.decode(whole[: len(whole) // 2])


def test_no_flipped_bit_and_no_cut_of_a_png_goes_unnoticed():
    """Pillow checks no CRC of the pixels, and neither their checksum nor the end once it has as many as it needs."""
    levels = np.random.default_rng(0).integers(0, 3, (9, 9, 3), np.uint8)
    data = save(Image.fromarray(100 * levels), "PNG")
    whole, silent = decode_image(data), 0
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DecodeError):
            decode_image(bytes(flipped))
        with contextlib.suppress(DecodeError):
            pixels, note = Decoding(strict=False).decode(bytes(flipped))
            assert "damaged PNG" in note
            silent += not np.array_equal(pixels, whole)
    assert silent > 10  # which Pillow alone would have taken for pixels
    for length in range(len(data)):
        with pytest.raises(DecodeError):
            decode_image(data[:length])
    assert np.array_equal(decode_image(data + b"more"), whole)  # as after the end of a JPEG


@pytest.fixture
def shard(tmp_path):
    """Good ones of many sizes and formats, with the hostile between them."""
    members = []
    for i in range(60):
        data = encoded(photo(20 + i, 70 - i), ("PNG", "JPEG")[i % 2])
        if i % 10 == 3:
            data = data[: len(data) // 2]
        if i % 10 == 7:
            data = png_header(60_000, 60_000)
        extension = "jpg" if i % 3 else "png"  # whatever it is
        members += [(f"{i:03d}.{extension}", data), (f"{i:03d}.cls", str(i).encode())]
    return write_tar(tmp_path / "a.tar", members)


@pytest.mark.parametrize("size", [16, None])
def test_any_number_of_threads_gives_the_same_in_the_same_order(shard, size):
    index = index_shard(shard)
    batch_size = 7 if size else 1
    expected = None
    for threads in (1, 2, 5):
        batches = list(read_batches(index, size=size, channels=3, batch_size=batch_size, threads=threads))
        found = [
            (sample.key, label, error, image.tobytes())
            for batch in batches
            for sample, label, error, image in zip(batch.samples, batch.labels, batch.errors, batch.images, strict=True)
        ]
        assert [key for key, *_ in found] == [f"{i:03d}" for i in range(60)]
        assert [label for _, label, *_ in found] == list(range(60))
        expected = expected or found
        assert found == expected
    assert [i for i, row in enumerate(found) if row[2]] == [i for i in range(60) if i % 10 in (3, 7)]
    for i in (0, 1, 58, 59):
        data = index_bytes(index, i)
        assert found[i][3] == decode_image(data, size=size).tobytes()


def index_bytes(index, row: int) -> bytes:
    member = index.samples[row].images()[0]
    return index.path.read_bytes()[member.data_offset :][: member.size]


def test_a_batch_left_half_way_leaves_no_thread(shard):
    batches = read_batches(index_shard(shard), size=16, channels=3, batch_size=4, threads=3)
    next(batches)
    batches.close()
    assert [thread for thread in threading.enumerate() if thread.name.startswith("decode")] == []


def test_flips_fail_by_default_and_are_kept_with_a_note_on_demand(tmp_path):
    flips = flipped_jpegs()
    write_tar(tmp_path / "a.tar", [(f"{i:03d}.jpg", data) for i, data in enumerate(flips)])
    strict, _ = load_images(tmp_path, size=96, channels=3)
    loose, images = load_images(tmp_path, size=96, channels=3, strict=False)
    failed = [status == "failed" for status in strict["status"].to_pylist()]
    expected = [pillow(data) for data in flips]
    refused = [pixels is None for pixels in expected]
    assert sum(failed) - sum(refused) >= 20 and sum(failed) < 100
    assert loose["status"].to_pylist() == ["failed" if no else "ok" for no in refused]
    for here, there, no in zip(loose["error"].to_pylist(), strict["error"].to_pylist(), refused, strict=True):
        assert no or here == there  # what was wrong is told in both
    assert all(pixels is None or np.array_equal(image, pixels) for image, pixels in zip(images, expected, strict=True))
    found = diffprune.verify(tmp_path, decode=True)
    assert (found["damaged"], found["damaged_but_decoded"]) == (sum(failed), 0)
    found = diffprune.verify(tmp_path, decode=True, strict_decode=False)
    assert (found["damaged"], found["damaged_but_decoded"]) == (sum(refused), sum(failed) - sum(refused))


def test_flipped_and_cut_bytes_of_every_format_end_well():
    """Whatever happens to the bytes: pixels of the right shape, or a DecodeError."""
    rng = np.random.default_rng(0)
    originals = [
        encoded(photo(24, 24), "JPEG"),
        encoded(photo(24, 24), "JPEG", progressive=True, subsampling=0),
        encoded(photo(24, 24, 1), "JPEG"),
        save(Image.fromarray(photo(24, 24)).convert("CMYK"), "JPEG"),
        encoded(photo(24, 24), "PNG"),
        save(Image.fromarray(photo(24, 24)).quantize(7), "PNG", transparency=1),
        encoded(photo(24, 24), "WEBP"),
        encoded(photo(24, 24), "WEBP", lossless=True),
    ]
    outcomes = {"pixels": 0, "refused": 0}
    for data in originals:
        for _ in range(150):
            damaged = bytearray(data)
            for _ in range(rng.integers(1, 4)):
                damaged[rng.integers(min(len(damaged), 400))] = rng.integers(256)
            if rng.random() < 0.2:
                damaged = damaged[: rng.integers(len(damaged))]
            for strict in (True, False):
                try:
                    pixels, _ = Decoding(8, 3, strict, max_pixels=1_000_000).decode(bytes(damaged))
                    assert pixels.shape == (3, 8, 8) and pixels.dtype == np.uint8
                    outcomes["pixels"] += 1
                except DecodeError:
                    outcomes["refused"] += 1
    assert min(outcomes.values()) > 100, outcomes

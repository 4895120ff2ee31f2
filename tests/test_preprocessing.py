"""Pixels are those of each model's published processor, on real photos of all shapes."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from photos import for_transformers, photos, published_processor
from PIL import Image
from torch.nn import functional as F

from diffprune.decode import DecodeError, decode_image
from diffprune.errors import InputError
from diffprune.models.preprocessing import Preprocessing, read_transformers_preprocessing

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
OPENAI = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
STEPS = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255}
# as in the preprocessor_config.json that these models were published with
CLIP = {"crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": 224}
CLIP |= {"feature_extractor_type": "CLIPFeatureExtractor", **OPENAI}
SIGLIP = {**STEPS, "resample": 3, "size": {"height": 224, "width": 224}, "image_processor_type": "SiglipImageProcessor"}
SIGLIP |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
DINOV2 = {**STEPS, **IMAGENET, "resample": 3, "size": {"shortest_edge": 256}, "do_center_crop": True}
DINOV2 |= {"crop_size": {"height": 224, "width": 224}, "image_processor_type": "BitImageProcessor"}
DINOV3 = {**STEPS, **IMAGENET, "resample": 2, "size": {"height": 224, "width": 224}, "do_center_crop": None}
DINOV3 |= {"crop_size": None, "image_processor_type": "DINOv3ViTImageProcessorFast", "do_convert_rgb": None}
ODD_CROP = {**DINOV2, "size": {"shortest_edge": 65}, "crop_size": {"height": 50, "width": 32}}


def read(tmp_path, config: dict) -> Preprocessing:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    return read_transformers_preprocessing(tmp_path)


def pixels(data: bytes, preprocessing: Preprocessing) -> np.ndarray:
    image = decode_image(data, size=preprocessing, channels=3)
    return preprocessing.normalize(torch.from_numpy(image)[None])[0].numpy()


@pytest.mark.parametrize(
    ("config", "processor"),
    [
        (CLIP, "CLIPImageProcessor"),
        (SIGLIP, "SiglipImageProcessor"),
        (DINOV2, "BitImageProcessor"),
        (ODD_CROP, "BitImageProcessor"),
    ],
    ids=["clip", "siglip", "dinov2", "odd crop"],
)
def test_pixels_are_the_published_processors(tmp_path, config, processor):
    pytest.importorskip("transformers")
    preprocessing = read(tmp_path, config)
    published = published_processor(processor)(**config)
    options = {"input_data_format": "channels_last"}  # version 4 takes one pixel for one channel
    for name, data in photos().items():
        expected = np.asarray(published(for_transformers(data), return_tensors="np", **options)["pixel_values"][0])
        found = pixels(data, preprocessing)
        assert found.shape == expected.shape, name
        unit = 1 / 255 / np.asarray(preprocessing.std)[:, None, None]  # one grey level
        assert np.abs((found - expected) / unit).max() < 1e-3, name


def test_dinov3_pixels_are_within_a_grey_level_of_its_float_resize(tmp_path):
    """Its processor resizes floats, antialiased, in PyTorch; ours resizes bytes with Pillow."""
    preprocessing = read(tmp_path, DINOV3)
    mean, std = (torch.tensor(DINOV3[name])[:, None, None] for name in ("image_mean", "image_std"))
    for name, data in photos().items():
        image = torch.tensor(decode_image(data, channels=3)).float() / 255
        resized = F.interpolate(image[None], (224, 224), mode="bilinear", antialias=True, align_corners=False)[0]
        found = torch.from_numpy(pixels(data, preprocessing)) * std + mean
        assert (found - resized).abs().max() <= 1.001 / 255, name
        assert (found - resized).abs().mean() < 0.4 / 255, name


def test_open_clip_rounds_half_a_pixel_to_even():
    image = Image.fromarray(np.arange(7 * 9, dtype=np.uint8).reshape(7, 9))
    floor = Preprocessing(7, (4, 4), (0,) * 3, (1,) * 3)
    even = Preprocessing(7, (4, 4), (0,) * 3, (1,) * 3, crop_rounding="even")
    # (7 - 4) / 2 = 1.5 and (9 - 4) / 2 = 2.5: torchvision's round gives 2 and 2
    assert np.asarray(floor(image))[0, 0] == 1 * 9 + 2
    assert np.asarray(even(image))[0, 0] == 2 * 9 + 2


def test_an_image_too_thin_to_resize_is_a_failed_image_not_a_dead_process(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((1, 60_000), np.uint8)).save(buffer, "PNG")
    with pytest.raises(DecodeError, match="60000×1 pixels: too thin"):
        decode_image(buffer.getvalue(), size=read(tmp_path, CLIP), channels=3)
    assert decode_image(buffer.getvalue(), size=read(tmp_path, SIGLIP), channels=3).shape == (3, 224, 224)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"image_mean": [0.5]}, "image_mean: expected 3 numbers"),
        ({"image_std": [0.5, 0.5, 0.0]}, "image_std: expected positive"),
        ({"resample": None}, "resample: expected"),
        ({"resample": 9}, "resample: expected"),
        ({"size": {"longest_edge": 224}}, "size: expected"),
        ({"size": None}, "size: expected"),
        ({"size": {"shortest_edge": 1_000_000_000}}, "at most 100,000,000 pixels"),
        ({"size": {"shortest_edge": 100}}, "fits into"),
        ({"do_rescale": False}, "do_rescale: expected true"),
        ({"rescale_factor": "a"}, "rescale_factor"),
        ({"crop_size": None}, "crop_size: expected"),
    ],
)
def test_a_config_that_is_not_understood_is_refused(tmp_path, change, complaint):
    with pytest.raises(InputError, match=complaint):
        read(tmp_path, {**DINOV2, **change})


def test_newer_folders_have_it_in_processor_config(tmp_path):
    with pytest.raises(InputError, match="no preprocessor_config"):
        read_transformers_preprocessing(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": DINOV2}))
    nested = read_transformers_preprocessing(tmp_path)
    assert nested == read(tmp_path, DINOV2)
    assert (nested.resize, nested.crop, nested.resample) == (256, (224, 224), "bicubic")

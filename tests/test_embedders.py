"""Embeddings are what each model's own library gives for the same image files: small random models, real photos."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from photos import for_transformers, published_processor, write_class_folder
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import diffprune
from diffprune.arrays import ArrayFolder
from diffprune.cli.app import app
from diffprune.errors import InputError, ResumeError
from diffprune.models.embedders import load_embedder
from diffprune.shards import index_shard
from diffprune.tables import read_folder

transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
RESIZE = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
SQUASH = {"size": {"height": 32, "width": 32}}


def make_clip():
    vision = {**LAYERS, "intermediate_size": 64, "projection_dim": 24}
    config = transformers.CLIPConfig(vision_config=vision, text_config=TEXT, projection_dim=24)
    return transformers.CLIPModel(config), "CLIPImageProcessor", RESIZE


def make_clip_tower():
    config = transformers.CLIPVisionConfig(**LAYERS, intermediate_size=64, projection_dim=24)
    return transformers.CLIPVisionModelWithProjection(config), "CLIPImageProcessor", RESIZE


def make_siglip():
    config = transformers.SiglipConfig(vision_config={**LAYERS, "intermediate_size": 64}, text_config=TEXT)
    return transformers.SiglipModel(config), "SiglipImageProcessor", SQUASH


def make_dinov2():
    config = transformers.Dinov2Config(**{**LAYERS, "image_size": 56}, mlp_ratio=2)  # made for other sizes than 32
    return transformers.Dinov2Model(config), "BitImageProcessor", RESIZE


def make_dinov2_with_registers():
    config = transformers.Dinov2WithRegistersConfig(**LAYERS, mlp_ratio=2)
    return transformers.Dinov2WithRegistersModel(config), "BitImageProcessor", RESIZE


def make_dinov3():
    config = transformers.DINOv3ViTConfig(**LAYERS, intermediate_size=64, num_register_tokens=2)
    # its own processor needs torchvision; the pixels are tested in test_preprocessing
    return transformers.DINOv3ViTModel(config), "SiglipImageProcessor", {**SQUASH, "resample": 2}


def make_dinov3_convnext():
    config = transformers.DINOv3ConvNextConfig(hidden_sizes=[8, 8, 16, 32], depths=[1, 1, 1, 1])
    return transformers.DINOv3ConvNextModel(config), "SiglipImageProcessor", SQUASH


MAKERS = [make_clip, make_clip_tower, make_siglip, make_dinov2, make_dinov2_with_registers, make_dinov3]
MAKERS += [make_dinov3_convnext]


def save(folder: Path, maker) -> tuple:
    """A random model and its image processor, saved as they are published; both returned."""
    torch.manual_seed(0)
    model, processor_name, options = maker()
    with torch.no_grad():
        for parameter in model.parameters():  # initial weights give every image nearly the same embedding
            parameter.copy_(torch.randn(parameter.shape) * (0.3 if parameter.dim() > 1 else 0.5))
    processor = published_processor(processor_name)(**options)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def published_embedding(model, processor, data: bytes) -> np.ndarray:
    pixels = processor(for_transformers(data), return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    with torch.inference_mode():
        if hasattr(model, "get_image_features"):
            output = model.get_image_features(pixel_values=pixels)
            output = getattr(output, "pooler_output", output)
        else:
            output = model(pixel_values=pixels)
            output = output.image_embeds if "image_embeds" in output else output.last_hidden_state[:, 0]
    return torch.nn.functional.normalize(output[0].double(), dim=0).numpy()


@pytest.fixture(scope="module")
def photo_shards(tmp_path_factory):
    """(shards, image bytes by key)"""
    root = tmp_path_factory.mktemp("photos")
    files = write_class_folder(root / "images")
    diffprune.pack(root / "images", root / "shards", shard_size=6)
    return root / "shards", files


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "clip"
    save(folder, make_clip)
    return folder


@pytest.mark.parametrize("maker", MAKERS)
def test_embeddings_are_the_published_models(maker, photo_shards, tmp_path):
    shards, files = photo_shards
    model, processor = save(tmp_path / "model", maker)
    result = diffprune.embed(shards, tmp_path / "out", model=str(tmp_path / "model"), batch_size=4)
    assert (result["samples"], result["failed"], result["shards"]) == (len(files), 0, 2)
    table, rows = ArrayFolder(tmp_path / "out", kind="embeddings").load()
    assert len({row.tobytes() for row in rows}) == len(files)
    for key, row in zip(table["key"].to_pylist(), rows, strict=True):
        expected = published_embedding(model, processor, files[key])
        assert np.abs(row - expected).max() < 6e-4, key  # float16 rounding of a number below 1
    apart = np.linalg.norm(rows[0] - rows[1])
    assert apart > 0.05  # so that the comparison says something


def test_open_clip_weights_give_what_transformers_clip_gives(photo_shards, tmp_path):
    """transformers' CLIP is another implementation of the same network; weights are renamed for it by hand."""
    shards, files = photo_shards
    for quick_gelu in (False, True):
        folder = tmp_path / f"open_clip_{quick_gelu}"
        tensors = write_open_clip(folder, quick_gelu)
        options = {
            "hidden_act": "quick_gelu" if quick_gelu else "gelu",
            "num_attention_heads": 3,
            "num_hidden_layers": 2,
        }
        config = transformers.CLIPVisionConfig(
            hidden_size=24, intermediate_size=60, image_size=32, patch_size=8, projection_dim=10, **options
        )
        model = transformers.CLIPVisionModelWithProjection(config).eval()
        model.load_state_dict(as_transformers(tensors))
        processor = published_processor("CLIPImageProcessor")(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        )
        images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        embedder = load_embedder(str(folder), CPU)
        with torch.inference_mode():
            expected = model(pixel_values=embedder.resize.normalize(images)).image_embeds
            assert torch.allclose(embedder.function(images), expected, rtol=1e-4, atol=1e-5)
        diffprune.embed(shards, tmp_path / f"out_{quick_gelu}", model=str(folder))
        table, rows = ArrayFolder(tmp_path / f"out_{quick_gelu}").load()
        for key, row in zip(table["key"].to_pylist(), rows, strict=True):
            width, height = Image.open(io.BytesIO(files[key])).size
            longer = int(32 * max(width, height) / min(width, height))
            if (longer - 32) % 4 == 3:  # where half a pixel goes another way, test_preprocessing has it
                continue
            assert np.abs(row - published_embedding(model, processor, files[key])).max() < 6e-4, key
    one, other = (ArrayFolder(tmp_path / f"out_{quick_gelu}").load()[1] for quick_gelu in (False, True))
    assert np.abs(one - other).max() > 2e-3


def write_open_clip(folder: Path, quick_gelu: bool = False, **vision) -> dict[str, torch.Tensor]:
    """A random checkpoint with OpenCLIP's names: width 24, 3 heads of 8, 2 layers, MLP 2.5 times as wide, output 10."""
    width, hidden, generator = 24, 60, torch.Generator().manual_seed(1)
    shapes = {"class_embedding": (width,), "positional_embedding": (17, width), "proj": (width, 10)}
    shapes |= {"conv1.weight": (width, 3, 8, 8)}
    for name in ("ln_pre", "ln_post"):
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for layer in range(2):
        block = f"transformer.resblocks.{layer}"
        for name in ("ln_1", "ln_2"):
            shapes |= {f"{block}.{name}.weight": (width,), f"{block}.{name}.bias": (width,)}
        shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        shapes |= {f"{block}.attn.out_proj.weight": (width, width), f"{block}.attn.out_proj.bias": (width,)}
        shapes |= {f"{block}.mlp.c_fc.weight": (hidden, width), f"{block}.mlp.c_fc.bias": (hidden,)}
        shapes |= {f"{block}.mlp.c_proj.weight": (width, hidden), f"{block}.mlp.c_proj.bias": (width,)}
    tensors = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    folder.mkdir(parents=True)
    text = {"text_projection": torch.zeros(4, 10), "logit_scale": torch.zeros(())}
    weights = {**{f"visual.{name}": tensor for name, tensor in tensors.items()}, **text}
    save_file(weights, folder / "open_clip_model.safetensors")
    vision = {"image_size": 32, "patch_size": 8, "width": 24, "layers": 2, "head_width": 8, "mlp_ratio": 2.5, **vision}
    model = {"embed_dim": 10, "vision_cfg": vision, "text_cfg": {"width": 4}, "quick_gelu": quick_gelu}
    preprocess = {"interpolation": "bicubic", "resize_mode": "shortest"}
    config = {"model_cfg": model, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return tensors


def as_transformers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {
        "visual_projection.weight": tensors["proj"].T.contiguous(),
        "vision_model.embeddings.class_embedding": tensors["class_embedding"],
        "vision_model.embeddings.position_embedding.weight": tensors["positional_embedding"],
        "vision_model.embeddings.patch_embedding.weight": tensors["conv1.weight"],
    }
    norms = {"ln_pre": "pre_layrnorm", "ln_post": "post_layernorm"}
    inner = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
    inner |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for kind in ("weight", "bias"):
        for theirs, ours in norms.items():
            renamed[f"vision_model.{ours}.{kind}"] = tensors[f"{theirs}.{kind}"]
        for layer in range(2):
            theirs, ours = f"transformer.resblocks.{layer}", f"vision_model.encoder.layers.{layer}"
            for a, b in inner.items():
                renamed[f"{ours}.{b}.{kind}"] = tensors[f"{theirs}.{a}.{kind}"]
            parts = tensors[f"{theirs}.attn.in_proj_{kind}"].chunk(3)
            for name, part in zip("qkv", parts, strict=True):
                renamed[f"{ours}.self_attn.{name}_proj.{kind}"] = part
    return renamed


def test_a_second_model_or_another_preprocessing_is_not_mixed_in(photo_shards, clip_folder, tmp_path):
    shards, _ = photo_shards
    out = tmp_path / "out"
    diffprune.embed(shards, out, model=str(clip_folder))
    stem = ArrayFolder(out).stems[1]
    before = np.array(ArrayFolder(out).array(stem))
    (out / f"{stem}.parquet").unlink()  # as after an interruption
    moved = shutil.copytree(clip_folder, tmp_path / "moved")
    again = diffprune.embed(shards, out, model=str(moved), batch_size=19)
    assert (again["shards_done_before"], again["samples"]) == (1, 10)
    assert before.tobytes() == ArrayFolder(out).array(stem).tobytes()
    config = json.loads((moved / "preprocessor_config.json").read_text())
    (moved / "preprocessor_config.json").write_text(json.dumps({**config, "size": {"shortest_edge": 40}}))
    with pytest.raises(ResumeError, match=r"preprocessing.resize was 36, is now 40"):
        diffprune.embed(shards, out, model=str(moved))
    tensors = load_file(moved / "model.safetensors")
    tensors["visual_projection.weight"] *= 2
    save_file(tensors, moved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ResumeError, match="model_sha256"):
        diffprune.embed(shards, out, model=str(moved))
    with pytest.raises(ResumeError, match="precision was 'float32', is now 'bf16'"):
        diffprune.embed(shards, out, model=str(clip_folder), precision="bf16")


def test_a_batch_of_nothing_but_a_damaged_image_is_a_failed_row(photo_shards, clip_folder, tmp_path):
    shards = shutil.copytree(photo_shards[0], tmp_path / "shards")
    shard = sorted(shards.glob("*.tar"))[0]
    sample = index_shard(shard).samples[2]
    data = bytearray(shard.read_bytes())
    middle = sample.images()[0].data_offset + sample.images()[0].size // 2
    data[middle : middle + 4] = b"\xff\xd9\xff\xd9"  # an end of image, to a JPEG; a wrong checksum, to a PNG
    shard.write_bytes(data)
    result = diffprune.embed(shards, tmp_path / "out", model=str(clip_folder), batch_size=1)
    assert (result["samples"], result["failed"], result["first_error"]["key"]) == (10, 1, sample.key)
    stem = shard.stem
    array = ArrayFolder(tmp_path / "out").array(stem)
    assert np.isnan(array[2]).all() and np.isfinite(np.delete(array, 2, axis=0)).all()


def test_embeddings_by_one_model_prepared_in_two_ways_are_not_compared(photo_shards, clip_folder, tmp_path):
    shards, _ = photo_shards
    other = shutil.copytree(clip_folder, tmp_path / "model")
    config = json.loads((other / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(json.dumps({**config, "resample": 2}))
    diffprune.embed(shards, tmp_path / "a", model=str(clip_folder))
    diffprune.embed(shards, tmp_path / "b", model=str(other))
    with pytest.raises(InputError, match="cannot be compared: preprocessing is"):
        diffprune.evaluate(tmp_path / "a", tmp_path / "b", tmp_path / "metrics.json")


def test_the_verb_takes_a_folder_and_fails_with_one_line(photo_shards, clip_folder, tmp_path):
    shards, files = photo_shards
    runner, out = CliRunner(), str(tmp_path / "out")
    arguments = ["embed", str(shards), "-o", out, "--precision", "bf16", "--json", "--model"]
    done = runner.invoke(app, [*arguments, str(clip_folder)])
    assert done.exit_code == 0 and json.loads(done.stdout)["samples"] == len(files)
    metadata = ArrayFolder(out).metadata
    assert (metadata["model"], metadata["precision"]) == ("clip", "bf16")
    refused = runner.invoke(app, [*arguments, str(tmp_path / "nothing")])
    assert refused.exit_code == 1 and refused.stderr.startswith("error: model") and refused.stderr.count("\n") == 1


def test_bf16_is_close_to_float32(photo_shards, clip_folder):
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    full, half = (load_embedder(str(clip_folder), CPU, precision) for precision in ("float32", "bf16"))
    with torch.inference_mode():
        a, b = full.function(images), half.function(images)
    assert a.dtype == torch.float32 and b.dtype == torch.bfloat16
    assert 0 < (a - b.float()).abs().max() < 0.05 * a.abs().max()
    assert load_embedder(str(clip_folder), CPU, "bfloat16").head == half.head
    assert load_embedder(str(clip_folder), CPU).head["precision"] == "float32"
    with pytest.raises(InputError, match="precision: expected"):
        load_embedder(str(clip_folder), CPU, "fp8")


def damage(folder: Path, what: str) -> None:
    weights = folder / "model.safetensors"
    if what == "no weights":
        weights.rename(folder / "pytorch_model.bin")
    elif what == "no preprocessor":
        (folder / "preprocessor_config.json").unlink()
    elif what == "no config":
        (folder / "config.json").unlink()
    elif what == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif what in ("lost tensor", "wrong shape"):
        tensors = load_file(weights)
        lost = tensors.pop("visual_projection.weight")
        save_file(tensors if what == "lost tensor" else {**tensors, "visual_projection.weight": lost[:5]}, weights)
    elif what == "index":
        weights.unlink()
        index = {"weight_map": {"a": "../../secret.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        path = folder / ("config.json" if what == "bert" else "preprocessor_config.json")
        change = {"model_type": "bert"} if what == "bert" else RESIZE | {"crop_size": {"height": 24, "width": 24}}
        path.write_text(json.dumps(json.loads(path.read_text()) | change))


@pytest.mark.parametrize(
    ("what", "complaint"),
    [
        ("no weights", r"expected model.safetensors; download it .*pytorch_model.bin is a pickle"),
        ("no preprocessor", r"no preprocessor_config.json.*download it"),
        ("no config", r"no config.json with a model_type.*a model's folder has config.json"),
        ("cut", "cannot be loaded as a CLIPVisionModelWithProjection"),
        ("lost tensor", "weights lack 1 tensors .*visual_projection"),
        ("wrong shape", "cannot be loaded as a CLIPVisionModelWithProjection"),
        ("index", "expected a weight_map of file names in this folder"),
        ("bert", "expected a model of type clip, .*found a model of type 'bert'"),
        ("other size", "config.json says images of 32×32, preprocessor_config.json makes them 24×24"),
    ],
)
def test_a_folder_that_is_no_whole_model_is_told(clip_folder, tmp_path, what, complaint):
    folder = shutil.copytree(clip_folder, tmp_path / "model")
    damage(folder, what)
    with pytest.raises(InputError, match=complaint):
        load_embedder(str(folder), CPU)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            {"timm_model_name": "vit_base_patch16_siglip_224"},
            "timm_model_name='vit_base_patch16_siglip_224' is not supp",
        ),
        ({"attentional_pool": True}, "attentional_pool=True is not supported"),
        ({"layers": [3, 4, 6, 3]}, "square vision transformer"),
        ({"head_width": 7}, "square vision transformer"),
        ({"layers": 3}, r"resblocks.2.* is missing"),
        ({"layers": 1}, r"resblocks.1.* is not part"),
    ],
)
def test_an_open_clip_tower_that_is_another_is_refused(tmp_path, change, complaint):
    write_open_clip(tmp_path / "model", **change)
    with pytest.raises(InputError, match=complaint):
        load_embedder(str(tmp_path / "model"), CPU)


def test_missing_open_clip_weights_are_named(tmp_path):
    write_open_clip(tmp_path / "model")
    (tmp_path / "model" / "open_clip_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"open_clip_model.safetensors: no such file; download it"):
        load_embedder(str(tmp_path / "model"), CPU)


def test_only_a_hub_id_asks_the_hub_and_says_what_to_do_without_it(tmp_path, monkeypatch, clip_folder):
    import huggingface_hub

    asked = []

    def offline(repo, **options):
        asked.append((repo, options.get("revision")))
        raise huggingface_hub.errors.LocalEntryNotFoundError("the network is down")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    for path in (str(tmp_path / "nothing"), "./models/clip", "models/clip/large", "inception"):
        with pytest.raises(InputError, match="expected a folder"):
            load_embedder(path, CPU)
    with monkeypatch.context() as without_network:
        without_network.setattr(socket.socket, "connect", lambda *_: pytest.fail("a local folder needs no network"))
        load_embedder(str(clip_folder), CPU)
    assert not asked
    with pytest.raises(InputError, match=r"download config.json.*model.safetensors.* of openai/clip.* into a folder"):
        load_embedder("openai/clip-vit-large-patch14", CPU)
    with pytest.raises(InputError, match="the network is down"):
        load_embedder("openai/clip-vit-large-patch14@v1.0", CPU)
    assert asked == [("openai/clip-vit-large-patch14", None), ("openai/clip-vit-large-patch14", "v1.0")]

    wanted = []
    cached = {"clip": clip_folder, "oc": tmp_path / "oc"}
    write_open_clip(tmp_path / "oc")

    def found(repo, allow_patterns, **options):
        wanted.append([pattern for pattern in allow_patterns if "safetensors" in pattern])
        return str(cached[repo.partition("/")[2]])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", found)
    assert load_embedder("me/clip", CPU).head == load_embedder(str(clip_folder), CPU).head
    assert load_embedder("me/oc", CPU).head["model"] == "open_clip"
    assert wanted[1][0] == "model.safetensors" and wanted[3] == ["open_clip_model.safetensors"]
    assert not wanted[0] and not wanted[2]  # settings first, so that no weights are fetched twice


FUNCTIONS = """
import numpy as np
import torch

def means(images):  # a documented function: uint8 [B, 3, 40, 40] -> [B, 3]
    assert images.dtype == torch.uint8 and images.shape[1:] == (3, 40, 40)
    return images.float().mean(dim=(2, 3)) + 1
means.image_size = 40
means.fingerprint = "v1"

def as_numpy(images):
    return images.numpy().mean(axis=(2, 3), dtype=np.float32) + 1

def bad(images):  # zero for dark images, NaN for the brightest, infinite in between
    brightness = images.float().mean(dim=(1, 2, 3))
    wrong = torch.where(brightness < 60, 0.0, torch.where(brightness > 200, torch.nan, torch.inf))
    rows = images.float().mean(dim=(2, 3))
    return torch.where(((brightness < 60) | (brightness > 100))[:, None], wrong[:, None].expand(-1, 3), rows)

def flat(images):
    return images.float().mean(dim=(1, 2, 3))

sizes = [1, 2]
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    """A module on the path, under a name of its own."""
    name = f"functions_{os.getpid()}_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_a_python_function_embeds(photo_shards, functions, tmp_path):
    shards, files = photo_shards
    diffprune.embed(shards, tmp_path / "out", model=f"{functions}:means")
    table, rows = ArrayFolder(tmp_path / "out").load()
    from diffprune.decode import decode_image

    for key, row in zip(table["key"].to_pylist(), rows, strict=True):
        expected = decode_image(files[key], size=40).mean(axis=(1, 2)) + 1
        assert np.abs(row - expected / np.linalg.norm(expected)).max() < 6e-4
    diffprune.embed(shards, tmp_path / "numpy", model=f"{functions}:as_numpy")
    first = load_embedder(f"{functions}:means", CPU).head
    assert first["model"] == f"{functions}:means"
    import sys

    sys.modules[functions].means.fingerprint = "v2"
    second = load_embedder(f"{functions}:means", CPU).head
    Path(sys.modules[functions].__file__).write_text(FUNCTIONS + "\n")
    third = load_embedder(f"{functions}:means", CPU).head
    assert len({head["model_sha256"] for head in (first, second, third)}) == 3
    with pytest.raises(ResumeError, match="model_sha256"):
        diffprune.embed(shards, tmp_path / "out", model=f"{functions}:means")


def test_embeddings_that_are_not_finite_or_all_zero_are_failed_rows_by_key(photo_shards, functions, tmp_path):
    shards, files = photo_shards
    result = diffprune.embed(shards, tmp_path / "out", model=f"{functions}:bad")
    table = read_folder(tmp_path / "out")
    from diffprune.decode import decode_image

    brightness = {key: decode_image(data, size=224).mean() for key, data in files.items()}
    good = {key for key, value in brightness.items() if 60 <= value <= 100}
    assert 0 < len(good) < len(files)
    for key, status, error in zip(*(table[name].to_pylist() for name in ("key", "status", "error")), strict=True):
        assert (status == "ok") == (key in good), key
        assert key in good or "gave NaN, only zeros" in error
    assert result["failed"] == len(files) - len(good) and result["first_error"]["key"] in files
    rows, embeddings = ArrayFolder(tmp_path / "out").load()
    assert set(rows["key"].to_pylist()) == good and np.isfinite(embeddings).all()


def test_functions_that_break_the_contract_are_told(photo_shards, functions, tmp_path):
    shards, _ = photo_shards
    with pytest.raises(InputError, match=r"expected floating-point features \[1, D\]"):
        diffprune.embed(shards, tmp_path / "out", model=f"{functions}:flat")
    with pytest.raises(InputError, match="expected a function sizes"):
        load_embedder(f"{functions}:sizes", CPU)
    with pytest.raises(InputError, match="expected a function gone"):
        load_embedder(f"{functions}:gone", CPU)
    with pytest.raises(InputError, match="PYTHONPATH"):
        load_embedder("no_such_package.models:embed", CPU)
    assert not (tmp_path / "out").exists()

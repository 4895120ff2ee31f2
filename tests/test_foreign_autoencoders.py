"""Autoencoders of other programs give what those programs give.

diffusers' own classes are compared with where diffusers is installed. For taming-transformers and LlamaGen, which are
no packages, their network is written down here a second time, over tensors of the published names.
"""

from __future__ import annotations

import json
import os
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

import diffprune
from diffprune import generation
from diffprune.arrays import ArrayFolder
from diffprune.checkpoints import load_vqvae
from diffprune.config import load_config
from diffprune.errors import InputError, ResumeError
from diffprune.models.kl import KLAutoencoder, build_autoencoder
from diffprune.models.vqvae import VQVAE

CONFIGS = Path(__file__).parent.parent / "configs"

# The published network


@dataclass(frozen=True)
class Names:
    """How a program calls the parts of its network; levels are numbered by resolution, the full one first."""

    down: Callable[[int, int], str]
    down_attention: Callable[[int, int], str]
    downsample: Callable[[int], str]
    up: Callable[[int, int], str]
    up_attention: Callable[[int, int], str]
    upsample: Callable[[int], str]
    middle: tuple[str, str, str]


TAMING = Names(
    down=lambda level, block: f"encoder.down.{level}.block.{block}",
    down_attention=lambda level, block: f"encoder.down.{level}.attn.{block}",
    downsample=lambda level: f"encoder.down.{level}.downsample.conv",
    up=lambda level, block: f"decoder.up.{level}.block.{block}",
    up_attention=lambda level, block: f"decoder.up.{level}.attn.{block}",
    upsample=lambda level: f"decoder.up.{level}.upsample.conv",
    middle=("block_1", "attn_1", "block_2"),
)
LEVELS = 2
LLAMAGEN = Names(  # its decoder's levels are numbered from the bottom
    down=lambda level, block: f"encoder.conv_blocks.{level}.res.{block}",
    down_attention=lambda level, block: f"encoder.conv_blocks.{level}.attn.{block}",
    downsample=lambda level: f"encoder.conv_blocks.{level}.downsample.conv",
    up=lambda level, block: f"decoder.conv_blocks.{LEVELS - 1 - level}.res.{block}",
    up_attention=lambda level, block: f"decoder.conv_blocks.{LEVELS - 1 - level}.attn.{block}",
    upsample=lambda level: f"decoder.conv_blocks.{LEVELS - 1 - level}.upsample.conv",
    middle=("0", "1", "2"),
)
WIDTHS, BLOCKS, Z, D, CODES = (32, 64), 2, 6, 4, 50


class Published:
    """Encoder and decoder of one block of widths, in float64, over a state dict that grows as names are first used."""

    def __init__(self, names: Names, moments: int = 1) -> None:
        self.names, self.moments, self.state = names, moments, {}
        self.generator = torch.Generator().manual_seed(7)
        self.encode(torch.zeros(1, 3, 8, 8).double())
        self.decode(torch.zeros(1, D, 4, 4).double())

    def encode(self, x: Tensor) -> Tensor:
        names = self.names
        x = self.conv("encoder.conv_in", x, WIDTHS[0])
        for level, width in enumerate(WIDTHS):
            for block in range(BLOCKS):
                x = self.block(names.down(level, block), x, width)
                if level == LEVELS - 1:
                    x = self.attention(names.down_attention(level, block), x)
            if level < LEVELS - 1:
                x = self.conv(names.downsample(level), F.pad(x, (0, 1, 0, 1)), width, stride=2, padding=0)
        x = self.end("encoder", self.mid("encoder", x), self.moments * Z)
        return self.conv("quant_conv", x, self.moments * D, size=1)

    def decode(self, z: Tensor) -> Tensor:
        names = self.names
        x = self.conv("decoder.conv_in", self.conv("post_quant_conv", z, Z, size=1), WIDTHS[-1])
        x = self.mid("decoder", x)
        for level in reversed(range(LEVELS)):
            for block in range(BLOCKS + 1):
                x = self.block(names.up(level, block), x, WIDTHS[level])
                if level == LEVELS - 1:
                    x = self.attention(names.up_attention(level, block), x)
            if level:
                x = self.conv(names.upsample(level), x.repeat_interleave(2, 2).repeat_interleave(2, 3), WIDTHS[level])
        return self.end("decoder", x, 3)

    def quantize(self, z: Tensor, unit: bool) -> tuple[Tensor, Tensor]:
        codebook = self.tensor("quantize.embedding.weight", (CODES, D))
        codebook = codebook / codebook.norm(dim=1, keepdim=True) if unit else codebook
        z = z / z.norm(dim=1, keepdim=True) if unit else z
        distances = (z[:, None] - codebook[None, :, :, None, None]).square().sum(dim=2)
        return z, codebook[distances.argmin(dim=1)].permute(0, 3, 1, 2)

    def mid(self, part: str, x: Tensor) -> Tensor:
        first, attention, second = (f"{part}.mid.{name}" for name in self.names.middle)
        return self.block(second, self.attention(attention, self.block(first, x, WIDTHS[-1])), WIDTHS[-1])

    def end(self, part: str, x: Tensor, width: int) -> Tensor:
        return self.conv(f"{part}.conv_out", swish(self.norm(f"{part}.norm_out", x)), width)

    def block(self, name: str, x: Tensor, width: int) -> Tensor:
        inner = self.conv(f"{name}.conv1", swish(self.norm(f"{name}.norm1", x)), width)
        inner = self.conv(f"{name}.conv2", swish(self.norm(f"{name}.norm2", inner)), width)
        return inner + (x if x.shape[1] == width else self.conv(f"{name}.nin_shortcut", x, width, size=1))

    def attention(self, name: str, x: Tensor) -> Tensor:
        width, normed = x.shape[1], self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", normed, width, size=1).flatten(2) for part in "qkv")
        weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / width**0.5, dim=-1)
        found = torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape)
        return x + self.conv(f"{name}.proj_out", found, width, size=1)

    def norm(self, name: str, x: Tensor) -> Tensor:
        groups = x.reshape(len(x), 32, -1)
        centred = groups - groups.mean(-1, keepdim=True)
        x = (centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()).reshape(x.shape)
        weight, bias = (self.tensor(f"{name}.{part}", (x.shape[1],)) for part in ("weight", "bias"))
        return x * weight[:, None, None] + bias[:, None, None]

    def conv(self, name: str, x: Tensor, width: int, size: int = 3, stride: int = 1, padding: int = -1) -> Tensor:
        weight = self.tensor(f"{name}.weight", (width, x.shape[1], size, size))
        bias = self.tensor(f"{name}.bias", (width,))
        return F.conv2d(x, weight, bias, stride, size // 2 if padding < 0 else padding)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self.state:
            fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 4
            self.state[name] = torch.randn(shape, generator=self.generator) / fan_in**0.5
        return self.state[name].double()


def swish(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def images(size: int = 16, count: int = 2) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)).double() * 2 - 1


def assert_agrees(model: torch.nn.Module, published: Published, unit: bool) -> None:
    """Encoder, codes and decoder, in float64."""
    x, model = images(), model.double()
    z, quantized = published.quantize(published.encode(x), unit)
    torch.testing.assert_close(model.latents(x), z, rtol=1e-9, atol=1e-9)
    model.latent_scale.fill_(3.0)
    torch.testing.assert_close(model.encode(x), 3 * z, rtol=1e-9, atol=1e-9)
    wanted = published.decode(quantized)
    assert (wanted.abs() < 1).double().mean() > 0.2  # not all clamped
    tolerance = 1e-6 if unit else 1e-8  # unit codes are rounded to float32
    torch.testing.assert_close(model.decode(3 * z), wanted.clamp(-1, 1), rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def taming() -> Published:
    published = Published(TAMING)
    published.quantize(torch.ones(1, D, 1, 1).double(), False)
    return published


@pytest.fixture(scope="module")
def llamagen() -> Published:
    published = Published(LLAMAGEN)
    published.quantize(torch.ones(1, D, 1, 1).double(), True)
    return published


def lightning_classes(monkeypatch) -> type:
    """A class as Lightning's, which is there when the file is written and gone when it is read."""
    callback = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["pytorch_lightning.callbacks.model_checkpoint"].ModelCheckpoint = callback
    return callback


def test_a_vqgan_of_taming_transformers_as_lightning_saved_it(taming, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        callback = lightning_classes(patch)
        extra = {
            "loss.discriminator.main.0.weight": torch.ones(2),
            "loss.perceptual_loss.lin0.model.1.weight": torch.ones(1),
        }
        checkpoint = {"epoch": 3, "state_dict": {**taming.state, **extra}, "optimizer_states": [{"lr": 1e-4}]}
        score = {"best_model_score": torch.tensor(0.5), "current_score": np.float64(0.5), "best_model_path": "/x"}
        checkpoint["callbacks"] = {callback: score}
        torch.save(checkpoint, tmp_path / "last.ckpt")
    assert "pytorch_lightning" not in sys.modules
    model, state = load_vqvae(f"{tmp_path / 'last.ckpt'}@16")
    assert isinstance(model, VQVAE) and state["format"] == "taming" and model.latent_scale.isnan()
    config = model.config
    assert (config.latent_channels, config.z_channels, config.codebook_size) == (D, Z, CODES)
    assert (config.channel_multipliers, config.attention_levels, config.blocks_per_level) == ((1, 2), (1,), BLOCKS)
    assert load_vqvae(tmp_path / "last.ckpt")[0].image_size == 256
    assert_agrees(model, taming, unit=False)


def test_a_first_stage_of_latent_diffusion(tmp_path):
    published = Published(TAMING, moments=2)
    state = {f"first_stage_model.{name}": value for name, value in published.state.items()}
    state |= {"model.diffusion_model.out.2.weight": torch.ones(3), "model_ema.decay": torch.ones(())}
    save_file(state, tmp_path / "model.safetensors")
    model, _ = load_vqvae(f"{tmp_path / 'model.safetensors'}@16")
    assert isinstance(model, KLAutoencoder)
    x, model = images(), model.double()
    mean, log_variance = published.encode(x).chunk(2, dim=1)
    torch.testing.assert_close(model.posterior(x)[0], mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.posterior(x)[1], log_variance, rtol=1e-9, atol=1e-9)
    wanted = published.decode(mean).clamp(-1, 1)
    torch.testing.assert_close(model.decode_unscaled(mean), wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("under", ["model", "ema", None])
def test_a_tokenizer_of_llamagen(llamagen, tmp_path, under):
    state = {**llamagen.state, "quantize.codebook_used": torch.zeros(65536)}
    state["quantize.embedding.weight"] = 3 * state["quantize.embedding.weight"]  # it is made unit when it is used
    torch.save({under: state, "steps": 5} if under else state, tmp_path / "vq_ds2_c2i.pt")
    model, found = load_vqvae(f"{tmp_path / 'vq_ds2_c2i.pt'}@16")
    assert found["format"] == "llamagen" and model.config.normalize_codes
    assert_agrees(model, llamagen, unit=True)


def test_files_that_are_something_else_are_told(taming, tmp_path):
    def saved(name: str, content) -> Path:
        torch.save(content, tmp_path / name)
        return tmp_path / name

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harmed"),)

    with pytest.raises(InputError, match=r"attack.pt: expected a state dict of tensors and nothing else"):
        load_vqvae(saved("attack.pt", {"state_dict": taming.state, "callbacks": Attack()}))
    assert not (tmp_path / "harmed").exists()
    (tmp_path / "cut.ckpt").write_bytes(saved("whole.ckpt", taming.state).read_bytes()[:5000])
    with pytest.raises(InputError, match=r"cut.ckpt: expected a state dict"):
        load_vqvae(tmp_path / "cut.ckpt")
    with pytest.raises(InputError, match=r"none.ckpt: no such file"):
        load_vqvae(tmp_path / "none.ckpt")
    for name, changes, message in [
        ("encoder.conv_in.weight", None, "expected a tensor 'encoder.conv_in.weight' of 4 axes, as in a VQGAN"),
        (
            "decoder.mid.block_1.conv1.bias",
            None,
            r"decoder.mid.block_1.conv1.bias' is missing: expected \[64\]",
        ),
        (
            "decoder.up.0.block.0.conv9.bias",
            torch.ones(2),
            r"block.0.conv9.bias' \[2\] float32 is not part",
        ),
        (
            "encoder.conv_out.bias",
            torch.full((Z,), float("nan")),
            "conv_out.bias' has values that are not finite",
        ),
        (
            "decoder.mid.block_1.conv1.bias",
            torch.ones(64).to(torch.float8_e4m3fn),
            r"conv1.bias': expected float32, float16 or bfloat16, found \[64\] float8_e4m3fn",
        ),
        ("encoder.down.1.block.0.conv1.weight", torch.ones(33, 32, 3, 3), r"found 32 and \[32, 33\]"),
        ("encoder.conv_out.weight", torch.ones(Z, 64, 3, 3).int(), r"conv_out.weight': expected float32 or half"),
        ("quant_conv.weight", torch.ones(9, Z, 1, 1), r"'codebook': expected \[50, 9\] float32, found \[50, 4\]"),
    ]:
        state = {key: value for key, value in {**taming.state, name: changes}.items() if value is not None}
        with pytest.raises(InputError, match=message):
            load_vqvae(saved("broken.pt", state))
    gumbel = {key: value for key, value in taming.state.items() if not key.startswith("quant")}
    gumbel |= {"quantize.embed.weight": torch.ones(8, 4)}
    with pytest.raises(InputError, match="Gumbel"):
        load_vqvae(saved("gumbel.ckpt", gumbel))
    with pytest.raises(InputError, match=r"image_size: expected a multiple of 2, got 17"):
        load_vqvae(f"{saved('good.ckpt', taming.state)}@17")
    with pytest.raises(InputError, match=r"image_size: expected at least 1, got 0"):
        load_vqvae(f"{saved('good.ckpt', taming.state)}@0")


# diffusers


def diffusers_model(kind: str, folder: Path, **changes):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(3)
    down, up = ("AttnDownEncoderBlock2D", "UpDecoderBlock2D"), ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
    options = {"down_block_types": ("DownEncoderBlock2D", down[0]), "up_block_types": (up[1], up[0])}
    options |= {"block_out_channels": (16, 32), "layers_per_block": 2, "norm_num_groups": 8, "sample_size": 16}
    model = getattr(diffusers, kind)(**{**options, **changes})
    with torch.no_grad():  # norms and biases that matter
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    model.eval().save_pretrained(folder)
    return model.double()


@pytest.mark.parametrize(
    "changes",
    [
        {"latent_channels": 4},
        {"latent_channels": 3, "use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 1.5,
         "shift_factor": 0.06},
        {"latent_channels": 2, "mid_block_add_attention": False, "layers_per_block": 1,
         "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3,
         "block_out_channels": (8, 8, 24)},
    ],
    ids=["usual", "without 1x1", "three levels"],
)  # fmt: skip
def test_an_autoencoder_kl_of_diffusers(tmp_path, changes):
    theirs = diffusers_model("AutoencoderKL", tmp_path / "vae", **changes)
    ours, state = load_vqvae(tmp_path / "vae")
    assert isinstance(ours, KLAutoencoder) and state["format"] == "diffusers" and ours.image_size == 16
    scale, shift = changes.get("scaling_factor", 0.18215), changes.get("shift_factor", 0.0)
    assert ours.latent_scale.item() == pytest.approx(scale)
    x = images(count=3)
    with torch.no_grad():
        posterior = theirs.encode(x).latent_dist
        single = ours.posterior(x.float())
        torch.testing.assert_close(single[0], posterior.mean.float(), rtol=1e-3, atol=1e-4)
        ours = ours.double()
        ours.latent_scale.fill_(scale)
        torch.testing.assert_close(ours.posterior(x)[0], posterior.mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(ours.posterior(x)[1], posterior.logvar, rtol=1e-9, atol=1e-9)
        latents = (posterior.mean - shift) * scale
        torch.testing.assert_close(ours.encode(x), latents, rtol=1e-9, atol=1e-9)
        wanted = theirs.decode(latents / scale + shift).sample
        assert (wanted.abs() < 1).double().mean() > 0.2
        torch.testing.assert_close(ours.decode(latents), wanted.clamp(-1, 1), rtol=1e-8, atol=1e-8)
    assert load_vqvae(tmp_path)[1]["sha256"] == state["sha256"]  # as a pipeline's folder
    assert sum(p.numel() for p in ours.parameters()) >= sum(p.numel() for p in theirs.parameters())


def test_a_vq_model_of_diffusers(tmp_path):
    theirs = diffusers_model("VQModel", tmp_path, latent_channels=5, vq_embed_dim=3, num_vq_embeddings=40)
    x = images(count=3)
    with torch.no_grad():  # codes where latents are
        points = theirs.encode(x).latents.permute(0, 2, 3, 1).reshape(-1, 3)
        theirs.quantize.embedding.weight.copy_(points[::4][:40])
        theirs.float().save_pretrained(tmp_path)
        theirs.double()
    ours, _ = load_vqvae(tmp_path)
    assert isinstance(ours, VQVAE) and ours.codebook.shape == (40, 3)
    ours = ours.double()
    ours.latent_scale.fill_(2.0)
    with torch.no_grad():
        latents = theirs.encode(x).latents
        torch.testing.assert_close(ours.encode(x), 2 * latents, rtol=1e-9, atol=1e-9)
        codes = torch.cdist(latents.permute(0, 2, 3, 1).reshape(-1, 3), ours.codebook).argmin(1)
        assert torch.equal(ours.quantize(latents)[1].flatten(), codes) and len(codes.unique()) > 5
        wanted = theirs.decode(latents).sample.clamp(-1, 1)
        torch.testing.assert_close(ours.decode(2 * latents), wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["imagenet", "celebahq"])
def test_the_presets_have_as_many_parameters_as_diffusers_model_of_the_same_shape(name):
    diffusers = pytest.importorskip("diffusers")
    config = load_config(CONFIGS / f"vqvae-f8-{name}.toml", "vqvae").model
    options = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
    options |= {"down_block_types": ("DownEncoderBlock2D",) * 3 + ("AttnDownEncoderBlock2D",)}
    options |= {"up_block_types": ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 3}
    with torch.device("meta"):
        model = build_autoencoder(config)
        theirs = diffusers.VQModel(
            latent_channels=config.latent_channels, num_vq_embeddings=config.codebook_size, **options
        )
    counts = [sum(p.numel() for p in part.parameters()) for part in (model, theirs)]
    assert counts[0] + model.codebook.numel() == counts[1]


def test_the_names_of_older_diffusers(tmp_path):
    diffusers_model("AutoencoderKL", tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    expected = load_vqvae(tmp_path)[0].state_dict()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(path)
    for new, name in old.items():
        tensors = {key.replace(f".{new}.", f".{name}."): value for key, value in tensors.items()}
    assert any("proj_attn" in key for key in tensors)
    save_file(tensors, path)
    assert all(torch.equal(value, expected[name]) for name, value in load_vqvae(tmp_path)[0].state_dict().items())


def test_a_diffusers_folder_that_is_something_else_is_told(tmp_path):
    diffusers_model("AutoencoderKL", tmp_path)
    path = tmp_path / "config.json"
    good = json.loads(path.read_text())
    for changes, message in [
        (
            {"_class_name": "AutoencoderDC"},
            "_class_name: expected AutoencoderKL or VQModel of diffusers, found",
        ),
        ({"act_fn": "relu"}, "act_fn: expected silu or swish, found 'relu'"),
        ({"scaling_factor": -1}, "scaling_factor: expected a positive number, found -1"),
        ({"shift_factor": "x"}, "shift_factor: expected a number or null, found 'x'"),
        ({"sample_size": [16, 8]}, r"sample_size: expected the side of a square, found \[16, 8\]"),
        ({"norm_num_groups": 0}, "norm_num_groups: expected a positive number, found 0"),
        ({"latents_mean": [0.1]}, r"latents_mean: \[0.1\] is not supported"),
        ({"norm_num_groups": 5}, "base_channels: expected a multiple of norm_groups 5, got 16"),
    ]:
        path.write_text(json.dumps({**good, **changes}))
        with pytest.raises(InputError, match=message):
            load_vqvae(tmp_path)
    path.write_text(json.dumps(good))
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"diffusion_pytorch_model.safetensors: no such file; download it from where"):
        load_vqvae(tmp_path)


# Through the pipeline


def test_shards_are_encoded_by_it_trained_on_and_sampled(llamagen, small_run, tmp_path, monkeypatch):
    torch.save({"model": llamagen.state}, tmp_path / "vq.pt")
    vqvae, latents = f"{tmp_path / 'vq.pt'}@16", tmp_path / "latents"
    diffprune.encode(small_run.shards, vqvae, latents)
    model, state = load_vqvae(vqvae)
    folder = ArrayFolder(latents)
    _, values = folder.load()
    assert values.shape == (120, D, 8, 8) and folder.metadata["model_sha256"] == state["sha256"]
    assert values.astype(np.float64).std() == pytest.approx(1, rel=1e-3)  # the scale was measured
    from diffprune.decode import load_images

    _, pixels = load_images(small_run.shards, size=16, channels=3)
    with torch.inference_mode():
        unscaled = model.latents(torch.from_numpy(pixels).float() / 127.5 - 1)
    expected = unscaled * folder.metadata["latent_scale"]
    torch.testing.assert_close(torch.from_numpy(values).float(), expected, atol=2e-3, rtol=2e-3)
    live = diffprune.LiveLatents(small_run.shards, vqvae)
    assert live.fingerprint == folder.fingerprint

    dit = ["model.input_size=8", f"model.in_channels={D}", "model.hidden_size=16", "model.depth=1", "train.steps=1"]
    diffprune.train_dit(load_config(None, "dit", dit), latents, tmp_path / "dit")
    loaded, real = [], generation.load_vqvae
    monkeypatch.setattr(generation, "load_vqvae", lambda *given: loaded.append(real(*given)) or loaded[-1])
    options = {"count": 3, "steps": 2, "grid": tmp_path / "grid.png", "labels": "null"}
    assert diffprune.sample(tmp_path / "dit", vqvae, tmp_path / "samples", **options)["written"] == 1
    assert loaded[0][0].latent_scale == pytest.approx(folder.metadata["latent_scale"])  # the DiT remembers it

    # The fingerprint covers the weights, and the size.
    changed = {**llamagen.state, "encoder.conv_out.bias": llamagen.state["encoder.conv_out.bias"] + 1e-3}
    torch.save({"model": changed}, tmp_path / "other.pt")
    with pytest.raises(ResumeError, match="model_sha256"):
        diffprune.encode(small_run.shards, f"{tmp_path / 'other.pt'}@16", latents)
    with pytest.raises(InputError, match="was trained on latents of the VQ-VAE with sha256"):
        diffprune.sample(tmp_path / "dit", f"{tmp_path / 'other.pt'}@16", tmp_path / "more", count=1)
    assert load_vqvae(f"{tmp_path / 'vq.pt'}@32")[1]["sha256"] != state["sha256"]

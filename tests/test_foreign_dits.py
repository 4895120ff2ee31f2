"""A DiT in diffusers' folder gives what diffusers gives, where diffusers runs the published network."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import diffprune
from diffprune.checkpoints import load_dit, load_foreign_dit
from diffprune.config import DitConfig, load_config
from diffprune.errors import InputError

diffusers = pytest.importorskip("diffusers")

CONFIG = DitConfig(
    input_size=8, patch_size=2, in_channels=3, hidden_size=16, depth=2, num_heads=4, num_classes=5, learn_sigma=True,
    time_scale=1.0,
)  # fmt: skip


class PublishedWaves(nn.Module):
    """The published embedding of a timestep: diffusers divides by 127 where it has 128, and computes in float32."""

    def forward(self, t: Tensor) -> Tensor:
        phase = t.double()[:, None] * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
        return torch.cat([phase.cos(), phase.sin()], dim=1)


def make(folder: Path, learn_sigma: bool = True, **options: int) -> diffusers.DiTTransformer2DModel:
    """A model of diffusers with random weights and one embedder for all blocks, as its conversions have, on disk."""
    sizes = {"num_attention_heads": 4, "attention_head_dim": 4, "in_channels": 3, "num_layers": 2, "sample_size": 8}
    sizes |= {"num_embeds_ada_norm": 5, "norm_eps": 1e-6} | options
    out_channels = sizes["in_channels"] * (2 if learn_sigma else 1)
    model = diffusers.DiTTransformer2DModel(**sizes, out_channels=out_channels)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_outputs_equal_those_of_diffusers(tmp_path, learn_sigma):
    theirs = make(tmp_path / "pipeline" / "transformer", learn_sigma).double().eval()
    ours = load_foreign_dit(tmp_path / "pipeline", DitConfig(**{**asdict(CONFIG), "learn_sigma": learn_sigma})).double()
    assert (theirs.pos_embed.pos_embed - ours.pos_embed).abs().max() < 1e-6  # computed in float32 there
    theirs.pos_embed.pos_embed.copy_(ours.pos_embed)
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t, y = torch.tensor([0, 3, 500, 999]), torch.tensor([0, 4, 5, 2])  # 5: no label
    with torch.no_grad():
        at_zero = theirs(x, torch.zeros_like(t), y).sample[:, :3]  # where their waves are the published ones
        assert (ours(x, torch.zeros_like(t), y) - at_zero).abs().max() < 1e-10
        for block in theirs.transformer_blocks:
            block.norm1.emb.time_proj = PublishedWaves()
        expected = theirs(x, t, y).sample[:, :3]
    found = ours(x, t, y)
    assert expected.abs().mean() > 0.1 and (found - expected).abs().max() < 1e-10


def test_a_config_of_before_the_class_had_its_name(tmp_path):
    """And the default epsilon, which the published copies have."""
    model = make(tmp_path)
    fields = {"_class_name": "Transformer2DModel", "norm_type": "ada_norm_zero", "cross_attention_dim": None}
    fields |= {"num_attention_heads": 4, "sample_size": 8, "activation_fn": "gelu-approximate", "norm_eps": 1e-5}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    found = load_foreign_dit(tmp_path, CONFIG).state_dict()
    assert torch.equal(found["final_layer.linear.weight"], model.proj_out_2.weight)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "_class_name",
            "UNet2DModel",
            r"_class_name: expected DiTTransformer2DModel of diffusers, found 'UNet2DModel'",
        ),
        ("norm_type", "layer_norm", r"norm_type: expected ada_norm_zero, found 'layer_norm'"),
        ("norm_eps", 0.1, r"norm_eps: expected 1e-05 or 1e-06, found 0.1"),
        ("num_attention_heads", 2, r"num_attention_heads: expected 4, the model's num_heads, found 2"),
        ("sample_size", 16, r"sample_size: expected 8, the model's input_size, found 16"),
    ],
)
def test_another_model_is_refused_by_file_and_field(tmp_path, field, value, message):
    make(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, field: value}))
    with pytest.raises(InputError, match=rf"config.json: {message}"):
        load_foreign_dit(tmp_path, CONFIG)


def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path):
    make(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    with pytest.raises(InputError, match=r"model.safetensors: tensor 'blocks.2.attn.qkv.weight' is missing"):
        load_foreign_dit(tmp_path, DitConfig(**{**asdict(CONFIG), "depth": 3}))
    with pytest.raises(InputError, match=r"embedding_table.weight': expected \[11, 16\] float32, found \[6, 16\]"):
        load_foreign_dit(tmp_path, DitConfig(**{**asdict(CONFIG), "num_classes": 10}))
    with pytest.raises(InputError, match=r"config.json: expected model.rope=false"):
        load_foreign_dit(tmp_path, DitConfig(**{**asdict(CONFIG), "rope": True}))
    name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias"
    save_file({**tensors, name: tensors[name] + 1}, file)
    with pytest.raises(InputError, match=rf"safetensors: tensor '{name}': expected block 0's values"):
        load_foreign_dit(tmp_path, CONFIG)
    gone = "transformer_blocks.1.attn1.to_k.weight"
    save_file({key: value for key, value in tensors.items() if key != gone}, file)
    with pytest.raises(InputError, match=r"tensor 'blocks.1.attn.qkv.weight' is missing"):
        load_foreign_dit(tmp_path, CONFIG)
    file.rename(tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(InputError, match=r"model.safetensors: no such file; .* is a pickle, and is not read"):
        load_foreign_dit(tmp_path, CONFIG)


def test_training_starts_from_a_folder_of_diffusers(small_run, tmp_path):
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 2, "sample_size": 4}
    model = make(tmp_path / "start" / "transformer", learn_sigma=False, **sizes, num_embeds_ada_norm=10)
    options = ["model.input_size=4", "model.hidden_size=16", "model.depth=2", "train.batch_size=7", "train.steps=1"]
    config = load_config(None, "dit", [*options, "train.lr=1e-12", "train.device=cpu"])
    diffprune.train_dit(config, small_run.latents, tmp_path / "run", start_from=tmp_path / "start")
    found = load_dit(tmp_path / "run", "model")[0].state_dict()
    assert (found["final_layer.linear.weight"] - model.proj_out_2.weight).abs().max() < 1e-7
    expected = model.transformer_blocks[1].attn1.to_v.weight
    assert (found["blocks.1.attn.qkv.weight"][-16:] - expected).abs().max() < 1e-7

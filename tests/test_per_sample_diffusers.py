"""Per-sample gradients of diffusers' models, against float64 autograd, one sample at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from model_gradients import Gradients, check, drawn_anew, sample_gradients
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers")

B = 3
HEADS = {"num_attention_heads": 2, "attention_head_dim": 4}
UNET = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
Inputs = dict[str, Any]
SHARED = ("img_ids", "txt_ids", "image_rotary_emb")  # without a batch


class Draws:
    """Inputs from one generator."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)


TIMESTEP = torch.tensor([7, 500, 999])
TIME = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
LABELS = torch.tensor([1, 4, 1])  # a row of the table that two samples hit
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
Made = tuple[nn.Module, Inputs]


def unet(randn: Draws) -> Made:
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    model = diffusers.UNet2DModel(**UNET, **blocks, attention_head_dim=4, num_class_embeds=5)
    return model, {"sample": randn(B, 3, 8, 8), "timestep": TIMESTEP, "class_labels": LABELS}


def unet_with_scale_and_shift(randn: Draws) -> Made:
    blocks = {
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    }
    options = {"resnet_time_scale_shift": "scale_shift", "downsample_type": "resnet", "upsample_type": "resnet"}
    learned = {"time_embedding_type": "learned", "num_train_timesteps": 1000}
    model = diffusers.UNet2DModel(**UNET, **blocks, **options, **learned, attention_head_dim=4)
    return model, {"sample": randn(B, 3, 8, 8), "timestep": TIMESTEP}


def stable_diffusion(randn: Draws) -> Made:
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    model = diffusers.UNet2DConditionModel(**UNET, **blocks, attention_head_dim=2, cross_attention_dim=6)
    return model, {"sample": randn(B, 4, 8, 8), "timestep": TIMESTEP, "encoder_hidden_states": randn(B, 5, 6)}


def stable_diffusion_xl(randn: Draws) -> Made:
    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    attention = {"attention_head_dim": (2, 4), "transformer_layers_per_block": (1, 2), "use_linear_projection": True}
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + 5,
    }
    model = diffusers.UNet2DConditionModel(**UNET, **blocks, **attention, **added, cross_attention_dim=6)
    conditions = {"text_embeds": randn(B, 5), "time_ids": randn(B, 6)}
    inputs = {"sample": randn(B, 4, 8, 8), "timestep": TIMESTEP, "encoder_hidden_states": randn(B, 5, 6)}
    return model, {**inputs, "added_cond_kwargs": conditions}


def unet_over_frames(randn: Draws) -> Made:
    blocks = {"down_block_types": ("CrossAttnDownBlock3D",), "up_block_types": ("CrossAttnUpBlock3D",)}
    sizes = UNET | {"block_out_channels": (8,)}
    model = diffusers.UNet3DConditionModel(**sizes, **blocks, attention_head_dim=4, cross_attention_dim=6)
    return model, {"sample": randn(B, 4, 2, 4, 4), "timestep": TIMESTEP, "encoder_hidden_states": randn(B, 5, 6)}


def dit(randn: Draws) -> Made:
    model = diffusers.DiTTransformer2DModel(
        **HEADS, in_channels=4, out_channels=8, num_layers=2, sample_size=4, num_embeds_ada_norm=5
    )
    return model, {"hidden_states": randn(B, 4, 4, 4), "timestep": TIMESTEP, "class_labels": LABELS}


def pixart(randn: Draws) -> Made:
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=6, num_layers=2, sample_size=4, cross_attention_dim=12,
        caption_channels=6, use_additional_conditions=True,
    )  # fmt: skip
    sizes = {"resolution": randn(B, 2).abs() * 9, "aspect_ratio": randn(B, 1).abs()}
    text = {"encoder_hidden_states": randn(B, 5, 6), "encoder_attention_mask": MASK}
    return model, {"hidden_states": randn(B, 4, 4, 4), "timestep": TIMESTEP, **text, "added_cond_kwargs": sizes}


def stable_diffusion_3(randn: Draws) -> Made:
    model = diffusers.SD3Transformer2DModel(
        **HEADS, sample_size=4, in_channels=4, out_channels=4, num_layers=3, joint_attention_dim=6,
        caption_projection_dim=8, pooled_projection_dim=5, pos_embed_max_size=4, dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )  # fmt: skip
    text = {"encoder_hidden_states": randn(B, 5, 6), "pooled_projections": randn(B, 5)}
    return model, {"hidden_states": randn(B, 4, 4, 4), "timestep": TIMESTEP, **text}


FLUX = {"in_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "joint_attention_dim": 6}


def flux(randn: Draws) -> Made:
    model = diffusers.FluxTransformer2DModel(
        **FLUX, num_layers=1, num_single_layers=2, pooled_projection_dim=5, guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    text = {"encoder_hidden_states": randn(B, 3, 6), "pooled_projections": randn(B, 5)}
    places = {"img_ids": randn(4, 3), "txt_ids": torch.zeros(B, 3)}  # as many rows as samples
    return model, {"hidden_states": randn(B, 4, 4), "timestep": TIME, "guidance": 1 + TIME, **text, **places}


def flux_2(randn: Draws) -> Made:
    model = diffusers.Flux2Transformer2DModel(
        **FLUX, num_layers=1, num_single_layers=1, timestep_guidance_channels=8, axes_dims_rope=(2, 2, 2, 2)
    )
    places = {"img_ids": randn(4, 4), "txt_ids": torch.zeros(5, 4)}
    text = {"encoder_hidden_states": randn(B, 5, 6)}
    return model, {"hidden_states": randn(B, 4, 4), "timestep": TIME, "guidance": 1 + TIME, **text, **places}


def sana(randn: Draws) -> Made:
    model = diffusers.SanaTransformer2DModel(
        **HEADS, in_channels=4, out_channels=4, num_layers=2, num_cross_attention_heads=2, cross_attention_head_dim=4,
        cross_attention_dim=8, caption_channels=6, sample_size=4, qk_norm="rms_norm_across_heads",
    )  # fmt: skip
    text = {"encoder_hidden_states": randn(B, 5, 6), "encoder_attention_mask": MASK}
    return model, {"hidden_states": randn(B, 4, 4, 4), "timestep": TIMESTEP, **text}


def auraflow(randn: Draws) -> Made:
    model = diffusers.AuraFlowTransformer2DModel(
        **HEADS, sample_size=4, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, joint_attention_dim=6,
        caption_projection_dim=8, out_channels=4, pos_embed_max_size=4,
    )  # fmt: skip
    return model, {"hidden_states": randn(B, 4, 4, 4), "timestep": TIME, "encoder_hidden_states": randn(B, 5, 6)}


def lumina_2(randn: Draws) -> Made:
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=4, in_channels=4, hidden_size=16, num_layers=1, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=4, axes_dim_rope=(4, 2, 2), axes_lens=(30, 30, 30), cap_feat_dim=6,
    )  # fmt: skip
    text = {"encoder_hidden_states": randn(B, 5, 6), "encoder_attention_mask": torch.ones(B, 5, dtype=torch.long)}
    return model, {"hidden_states": randn(B, 4, 4, 4), "timestep": TIME, **text}


def hunyuan(randn: Draws) -> Made:
    model = diffusers.HunyuanDiT2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, patch_size=2, sample_size=4, hidden_size=16,
        num_layers=2, cross_attention_dim=6, cross_attention_dim_t5=8, pooled_projection_dim=4, text_len=3,
        text_len_t5=2,
    )  # fmt: skip
    text = {
        "encoder_hidden_states": randn(B, 3, 6),
        "text_embedding_mask": torch.ones(B, 3, dtype=torch.long),
        "encoder_hidden_states_t5": randn(B, 2, 8),
        "text_embedding_mask_t5": torch.tensor([[1, 0], [1, 1], [1, 1]]),
    }
    sizes = {"image_meta_size": randn(B, 6), "style": torch.zeros(B, dtype=torch.long)}
    rotation = (randn(4, 8), randn(4, 8))
    inputs = {"hidden_states": randn(B, 4, 4, 4), "timestep": TIMESTEP.double(), **text, **sizes}
    return model, {**inputs, "image_rotary_emb": rotation}


def cogview_4(randn: Draws) -> Made:
    model = diffusers.CogView4Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, text_embed_dim=6,
        time_embed_dim=8, condition_dim=4, sample_size=4,
    )  # fmt: skip
    sizes = {name: randn(B, 2) for name in ("original_size", "target_size", "crop_coords")}
    text = {"encoder_hidden_states": randn(B, 3, 6)}
    return model, {"hidden_states": randn(B, 4, 4, 4), "timestep": TIMESTEP, **text, **sizes}


def latte(randn: Draws) -> Made:
    model = diffusers.LatteTransformer3DModel(
        **HEADS, in_channels=4, out_channels=4, num_layers=1, cross_attention_dim=8, attention_bias=True,
        sample_size=4, patch_size=2, caption_channels=6, video_length=2, activation_fn="gelu-approximate",
        norm_type="ada_norm_single", num_embeds_ada_norm=1000,
    )  # fmt: skip
    text = {"encoder_hidden_states": randn(B, 5, 6)}
    return model, {"hidden_states": randn(B, 4, 2, 4, 4), "timestep": TIMESTEP, **text}


def uvit(randn: Draws) -> Made:
    model = diffusers.UVit2DModel(
        hidden_size=8, cond_embed_dim=6, micro_cond_encode_dim=4, micro_cond_embed_dim=20, encoder_hidden_size=6,
        vocab_size=12, codebook_size=8, in_channels=8, block_out_channels=8, num_res_blocks=1, block_num_heads=2,
        num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, sample_size=4, downsample=True,
        upsample=True,
    )  # fmt: skip
    text = {"encoder_hidden_states": randn(B, 5, 6), "pooled_text_emb": randn(B, 6)}
    codes = torch.randint(0, 12, (B, 4, 4), generator=randn.generator)
    return model, {"input_ids": codes, "micro_conds": randn(B, 5), **text}


LEVELS = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}


def autoencoder_kl(randn: Draws) -> Made:
    return diffusers.AutoencoderKL(**LEVELS, latent_channels=2), {"sample": randn(B, 3, 8, 8)}


def vq_model(randn: Draws) -> Made:
    return diffusers.VQModel(**LEVELS, latent_channels=3, num_vq_embeddings=7), {"sample": randn(B, 3, 8, 8)}


def autoencoder_dc(randn: Draws) -> Made:
    kinds = ("ResBlock", "EfficientViTBlock")
    sides = {}
    for side in ("encoder", "decoder"):
        sides |= {f"{side}_block_types": kinds, f"{side}_block_out_channels": (8, 8)}
        sides |= {f"{side}_layers_per_block": (1, 1), f"{side}_qkv_multiscales": ((), (5,))}
    model = diffusers.AutoencoderDC(in_channels=3, latent_channels=4, attention_head_dim=4, **sides)
    return model, {"sample": randn(B, 3, 16, 16)}


MODELS: dict[str, Callable[[Draws], Made]] = {
    f.__name__: f
    for f in (
        unet, unet_with_scale_and_shift, stable_diffusion, stable_diffusion_xl, unet_over_frames, dit, pixart,
        stable_diffusion_3, flux, flux_2, sana, auraflow, lumina_2, hunyuan, cogview_4, latte, uvit, autoencoder_kl,
        vq_model, autoencoder_dc,
    )
}  # fmt: skip
IN_FLOAT32 = ("hunyuan", "uvit", "autoencoder_dc")  # a normalisation or attention of theirs is, whatever comes in
TEXT_OF_THE_LAST_BLOCK = ("add_q_proj", "norm_added_q")  # its queries go nowhere
UNUSED = {"stable_diffusion_3": TEXT_OF_THE_LAST_BLOCK}


def random_model(name: str) -> Made:
    model, inputs = MODELS[name](Draws())
    return drawn_anew(model), inputs


def losses_of(model: nn.Module, inputs: Inputs) -> Tensor:
    if isinstance(model, diffusers.UVit2DModel):
        y, added = model(**inputs), 0
    else:
        y, *others = model(**inputs, return_dict=False)
        added = sum(others)  # a VQ model's loss of codes, a mean over samples: B times it is their sum
    weights = torch.linspace(-1, 2, y[0].numel(), dtype=torch.float64).view(y.shape[1:])
    return (weights * y.sin()).flatten(1).sum(dim=1) + added


def sample(inputs: Inputs, i: int) -> Inputs:
    def pick(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return sample(value, i)
        return value if key in SHARED else value[i : i + 1]

    return {key: pick(key, value) for key, value in inputs.items()}


def reference(model: nn.Module, inputs: Inputs) -> Gradients:
    return sample_gradients(losses_of, model, (sample(inputs, i) for i in range(B)))


@pytest.mark.parametrize("name", MODELS)
def test_norms_dots_and_totals_of_every_parameter(name):
    model, inputs = random_model(name)
    gradients = reference(model, inputs)
    unused = [key for key in gradients[0] if all(row[key].abs().max() == 0 for row in gradients)]
    assert all(any(part in key for part in UNUSED.get(name, ())) for key in unused), unused  # the test means something
    check(losses_of, model, inputs, gradients, 1e-6 if name in IN_FLOAT32 else 1e-9)


@pytest.mark.parametrize("name", ["stable_diffusion", "dit", "pixart", "stable_diffusion_3", "flux", "sana"])
def test_gradient_checkpointing_in_training_mode(name, monkeypatch):
    model, inputs = random_model(name)
    gradients = reference(model, inputs)
    for module in model.modules():
        assert not isinstance(module, nn.Dropout) or module.p == 0
        if hasattr(module, "dropout_prob"):  # DiT's labels
            module.dropout_prob = 0
    calls, plain = [], torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **k: calls.append(1) or plain(*a, **k))
    model.train().enable_gradient_checkpointing()
    check(losses_of, model, inputs, gradients)
    assert calls and model.training


class LoRA(nn.Module):
    """What peft puts in a linear layer's place."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = (
            nn.Linear(base.in_features, rank, bias=False),
            nn.Linear(rank, base.out_features, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2 * self.up(self.down(x))


@pytest.mark.parametrize("name", ["stable_diffusion_xl", "stable_diffusion_3", "flux"])
def test_low_rank_adapters_on_a_frozen_model(name):
    model, inputs = random_model(name)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    places = [(key, layer) for key, layer in model.named_modules() if key.endswith(("to_q", "to_v", "add_k_proj"))]
    for key, layer in places:
        adapter = LoRA(layer).double()
        for weight in (adapter.down.weight, adapter.up.weight):
            weight.data = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        model.set_submodule(key, adapter)
    gradients = reference(model, inputs)
    assert len(gradients[0]) == 2 * len(places) and all(g.abs().max() > 0 for row in gradients for g in row.values())
    check(losses_of, model, inputs, gradients)

"""Per-sample gradients of models that were written elsewhere, against float64 autograd, one sample at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from model_gradients import Gradients, check, drawn_anew, sample_gradients
from torch import Tensor, nn

B = 3
HIDDEN = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
IMAGE = {"image_size": 8, "patch_size": 4}
Inputs = dict[str, Tensor]


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**HIDDEN, **IMAGE, num_labels=5))


def clip() -> nn.Module:
    return transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(**HIDDEN, **IMAGE, projection_dim=6)
    )


def siglip() -> nn.Module:
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**HIDDEN, **IMAGE))


def dinov2() -> nn.Module:
    del (sizes := dict(HIDDEN))["intermediate_size"]
    return transformers.Dinov2ForImageClassification(
        transformers.Dinov2Config(**sizes, **IMAGE, num_labels=5, drop_path_rate=0.0)
    )


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**HIDDEN, vocab_size=11, max_position_embeddings=9))


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=11, n_positions=9)
    )


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[32, 40], depths=[1, 2], num_labels=5, layer_type="bottleneck"
    )
    return transformers.ResNetForImageClassification(config)


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**HIDDEN, vocab_size=11, max_position_embeddings=9, num_key_value_heads=1)
    )


def swin() -> nn.Module:
    return transformers.SwinForImageClassification(
        transformers.SwinConfig(
            image_size=16, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=4, num_labels=5,
            drop_path_rate=0.0,
        )
    )  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {
    f.__name__: f for f in (vit, clip, siglip, dinov2, bert, gpt2, resnet, llama, swin)
}


def inputs_of(name: str) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    if name in ("bert", "gpt2", "llama"):
        ids = torch.randint(0, 11, (B, 5), generator=generator)
        ids[:, 3] = ids[:, 1]  # a row of the table that is hit twice
        return {"input_ids": ids}
    side = {"resnet": 32, "swin": 16}.get(name, 8)
    return {"pixel_values": torch.randn(B, 3, side, side, generator=generator, dtype=torch.float64)}


def losses_of(model: nn.Module, inputs: Inputs) -> Tensor:
    output = model(**inputs)
    y = next(output[name] for name in ("image_embeds", "logits", "pooler_output") if name in output)
    weights = torch.linspace(-1, 2, y[0].numel(), dtype=torch.float64).view(y.shape[1:]).to(y.dtype)
    return (weights * y.sin()).flatten(1).sum(dim=1)


def reference(model: nn.Module, inputs: Inputs) -> Gradients:
    samples = ({key: value[i : i + 1] for key, value in inputs.items()} for i in range(B))
    return sample_gradients(losses_of, model, samples)


@pytest.mark.parametrize("name", MODELS)
def test_norms_dots_and_totals_of_every_parameter(name):
    model, inputs = drawn_anew(MODELS[name]()), inputs_of(name)
    gradients = reference(model, inputs)
    unused = [key for key in gradients[0] if all(row[key].abs().max() == 0 for row in gradients)]
    assert all("mask_token" in key or "post_layernorm" in key for key in unused), unused  # the test means something
    check(losses_of, model, inputs, gradients)


def test_checkpointed_blocks_in_training_mode():
    model, inputs = drawn_anew(gpt2()), inputs_of("gpt2")
    gradients = reference(model, inputs)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    old_name = getattr(model, "gradient_checkpointing_enable", None)  # 5.17's, and an alias later
    getattr(model.train(), "activation_checkpointing_enable", old_name)()
    check(losses_of, model, inputs, gradients)
    assert model.training and all(block.training for block in model.transformer.h)


def test_frozen_parameters_of_a_tied_model_are_left_out():
    model, inputs = drawn_anew(bert()), inputs_of("bert")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layer.1" in name or "word_embeddings" in name)
    check(losses_of, model, inputs, reference(model, inputs))


@pytest.mark.parametrize("tokens", [B, 5])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_padded_samples(name, tokens):
    model, ids = drawn_anew(MODELS[name]()), inputs_of(name)["input_ids"][:, :tokens]
    mask = torch.ones_like(ids)
    mask[0, -1] = mask[1, -2:] = 0
    padded = {"input_ids": ids, "attention_mask": mask}
    check(losses_of, model, padded, reference(model, padded))

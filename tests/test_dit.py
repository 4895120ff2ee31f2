"""The DiT is the published architecture: names, shapes, values, initialisation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from diffprune.errors import InputError
from diffprune.models.dit import DiT
from diffprune.models.positions import sincos_position_embedding

# Tables 1 and 4 of arXiv 2212.09748: hidden size, depth, heads, millions of trainable parameters with patch 2.
TABLE = {"S": (384, 12, 6, 33), "B": (768, 12, 12, 130), "L": (1024, 24, 16, 458), "XL": (1152, 28, 16, 675)}


def published_layout(hidden: int, depth: int, patch: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a public 256×256 ImageNet state dict: 4×32×32 latents, 1000 classes + null, learned sigma."""
    layout = {
        "pos_embed": (1, (32 // patch) ** 2, hidden),
        "x_embedder.proj.weight": (hidden, 4, patch, patch),
        "x_embedder.proj.bias": (hidden,),
        "t_embedder.mlp.0.weight": (hidden, 256),
        "t_embedder.mlp.0.bias": (hidden,),
        "t_embedder.mlp.2.weight": (hidden, hidden),
        "t_embedder.mlp.2.bias": (hidden,),
        "y_embedder.embedding_table.weight": (1001, hidden),
        "final_layer.linear.weight": (patch * patch * 8, hidden),
        "final_layer.linear.bias": (patch * patch * 8,),
        "final_layer.adaLN_modulation.1.weight": (2 * hidden, hidden),
        "final_layer.adaLN_modulation.1.bias": (2 * hidden,),
    }
    for n in range(depth):
        for name, rows, columns in [
            ("attn.qkv", 3 * hidden, hidden),
            ("attn.proj", hidden, hidden),
            ("mlp.fc1", 4 * hidden, hidden),
            ("mlp.fc2", hidden, 4 * hidden),
            ("adaLN_modulation.1", 6 * hidden, hidden),
        ]:
            layout[f"blocks.{n}.{name}.weight"] = (rows, columns)
            layout[f"blocks.{n}.{name}.bias"] = (rows,)
    return layout


@pytest.mark.parametrize("size", TABLE)
@pytest.mark.parametrize("patch", [2, 4, 8])
def test_names_and_shapes_are_the_published_ones(size, patch):
    hidden, depth, heads, millions = TABLE[size]
    with torch.device("meta"):
        model = DiT.from_name(f"DiT-{size}/{patch}")
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert found == published_layout(hidden, depth, patch)
    assert {block.attn.num_heads for block in model.blocks} == {heads}
    assert not model.pos_embed.requires_grad
    if patch == 2:
        trainable = sum(math.prod(shape) for name, shape in found.items() if name != "pos_embed")
        assert round(trainable / 1e6) == millions


def test_the_parameter_count_of_xl_2_is_the_published_one():
    with torch.device("meta"):
        model = DiT.from_name("SiT-XL/2")
    assert sum(p.numel() for p in model.parameters()) == 675_129_632


def float64_dit(model: DiT, x: np.ndarray, t: np.ndarray, y: np.ndarray | None) -> np.ndarray:
    """The forward pass of one sample after the other, in plain NumPy, from the paper and SiT's published layout."""
    w = {name: tensor.detach().double().numpy() for name, tensor in model.state_dict().items()}
    p, heads = model.patch_size, model.blocks[0].attn.num_heads

    def linear(name, a):
        return a @ w[name + ".weight"].T + w[name + ".bias"]

    def silu(a):
        return a / (1 + np.exp(-a))

    def norm(a):
        return (a - a.mean(-1, keepdims=True)) / np.sqrt(a.var(-1, keepdims=True) + 1e-6)

    def gelu(a):
        return 0.5 * a * (1 + np.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))

    result = []
    for i in range(len(x)):
        side = x.shape[-1] // p
        tokens = []
        for row in range(side):
            for column in range(side):
                patch = x[i, :, row * p : (row + 1) * p, column * p : (column + 1) * p]
                kernel = w["x_embedder.proj.weight"]
                tokens.append((kernel * patch).sum((1, 2, 3)) + w["x_embedder.proj.bias"])
        h = np.stack(tokens) + w["pos_embed"][0]
        omega = np.exp(-math.log(10000) * np.arange(128) / 128)
        waves = np.concatenate(
            [np.cos(t[i] * model.config.time_scale * omega), np.sin(t[i] * model.config.time_scale * omega)]
        )
        c = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", waves)))
        if y is not None:
            c = c + w["y_embedder.embedding_table.weight"][y[i]]
        for n in range(len(model.blocks)):
            b = f"blocks.{n}."
            shift1, scale1, gate1, shift2, scale2, gate2 = np.split(linear(b + "adaLN_modulation.1", silu(c)), 6)
            qkv = linear(b + "attn.qkv", norm(h) * (1 + scale1) + shift1)
            dim = h.shape[1]
            out = np.zeros_like(h)
            for head in range(heads):
                s = slice(head * dim // heads, (head + 1) * dim // heads)
                q, k, v = qkv[:, :dim][:, s], qkv[:, dim : 2 * dim][:, s], qkv[:, 2 * dim :][:, s]
                a = np.exp(q @ k.T / math.sqrt(dim // heads))
                out[:, s] = a / a.sum(1, keepdims=True) @ v
            h = h + gate1 * linear(b + "attn.proj", out)
            h = h + gate2 * linear(b + "mlp.fc2", gelu(linear(b + "mlp.fc1", norm(h) * (1 + scale2) + shift2)))
        shift, scale = np.split(linear("final_layer.adaLN_modulation.1", silu(c)), 2)
        h = linear("final_layer.linear", norm(h) * (1 + scale) + shift)
        image = np.zeros((model.out_channels, side * p, side * p))
        for token in range(side * side):
            row, column = divmod(token, side)
            patch = h[token].reshape(p, p, model.out_channels).transpose(2, 0, 1)
            image[:, row * p : (row + 1) * p, column * p : (column + 1) * p] = patch
        result.append(image[: x.shape[1]])
    return np.stack(result)


def randomised(model: DiT, seed: int = 0) -> DiT:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.double()


SMALL = {"hidden_size": 24, "depth": 2, "num_heads": 3}


@pytest.mark.parametrize(
    "arguments",
    [
        {**SMALL, "input_size": 4, "in_channels": 3, "num_classes": 5, "learn_sigma": True},
        {**SMALL, "input_size": 9, "patch_size": 3, "num_heads": 1, "num_classes": 0, "time_scale": 9.0},
        {**SMALL, "input_size": 5, "patch_size": 1, "num_classes": 1, "class_dropout_prob": 0.0, "mlp_ratio": 1.5},
    ],
)
def test_forward_is_the_definition(arguments):
    model = randomised(DiT(**arguments))
    generator = torch.Generator().manual_seed(1)
    size, classes = arguments["input_size"], arguments["num_classes"]
    x = torch.randn(3, model.in_channels, size, size, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.0, 0.37, 1.0], dtype=torch.float64)
    y = torch.tensor([0, classes - 1, model.null_label or 0]) if classes else None
    expected = float64_dit(model, x.numpy(), t.numpy(), None if y is None else y.numpy())
    found = model.train()(x, t, y)  # training drops no labels
    assert found.shape == x.shape
    assert np.abs(found.detach().numpy() - expected).max() < 1e-10 * np.abs(expected).max()


def test_positions_are_columns_then_rows():
    found = sincos_position_embedding(3, 8)
    for row in range(3):
        for column in range(3):
            expected = []
            for coordinate in (column, row):
                angles = [coordinate / 10000 ** (k / 2) for k in range(2)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            assert found[3 * row + column].tolist() == pytest.approx(expected, abs=1e-7)
    assert torch.equal(DiT(6, 2, 1, 8, 1, 2).pos_embed[0], found)


def test_initial_weights_are_the_published_ones_and_depend_on_the_seed_alone():
    state = torch.get_rng_state()
    arguments = {"input_size": 8, "hidden_size": 192, "depth": 2, "num_heads": 3, "num_classes": 50}
    model, same, other = DiT(**arguments, seed=3), DiT(**arguments, seed=3), DiT(**arguments, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[name]), name
    assert not torch.equal(model.blocks[1].attn.qkv.weight, other.blocks[1].attn.qkv.weight)
    # Zero: what makes every block the identity and the output zero. So are all biases.
    zero = {name for name, tensor in model.named_parameters() if not tensor.any()}
    assert zero == {name for name, _ in model.named_parameters() if name.endswith("bias")} | {
        "blocks.0.adaLN_modulation.1.weight",
        "blocks.1.adaLN_modulation.1.weight",
        "final_layer.adaLN_modulation.1.weight",
        "final_layer.linear.weight",
    }
    for weight, bound in [
        (model.blocks[0].attn.qkv.weight, math.sqrt(6 / (4 * 192))),  # Xavier: sqrt(6 / (fan in + fan out))
        (model.blocks[1].mlp.fc2.weight, math.sqrt(6 / (5 * 192))),
        (model.x_embedder.proj.weight, math.sqrt(6 / (16 + 192))),  # of the flattened patch, not the convolution
    ]:
        assert 0.98 * bound < weight.abs().max() <= bound
    for weight in (model.t_embedder.mlp[0].weight, model.t_embedder.mlp[2].weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.y_embedder.embedding_table.weight.std().item() == pytest.approx(0.02, rel=0.05)
    small = DiT(**arguments, label_init_std=0.5)
    assert small.y_embedder.embedding_table.weight.std().item() == pytest.approx(0.5, rel=0.05)
    assert not model(torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 50])).any()


def test_null_label_and_label_rows():
    assert DiT(4, 2, 1, 8, 1, 2, num_classes=7).null_label == 7
    without = DiT(4, 2, 1, 8, 1, 2, num_classes=7, class_dropout_prob=0.0)
    assert without.null_label is None and without.y_embedder.embedding_table.weight.shape == (7, 8)
    unconditional = DiT(4, 2, 1, 8, 1, 2, num_classes=0)
    assert unconditional.null_label is None and not hasattr(unconditional, "y_embedder")


def test_half_precision_and_compile_keep_the_values():
    model = randomised(DiT(4, 2, 3, 24, 2, 3, num_classes=5)).float()
    x, t, y = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.rand(2), torch.tensor([0, 5])
    expected = model(x, t, y)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x, t, y), expected)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x, t, y)
    assert low.dtype == torch.bfloat16 and (low.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"input_size": 9, "patch_size": 2}, "input_size: expected a multiple of patch_size 2, got 9"),
        ({"hidden_size": 30, "num_heads": 4}, "hidden_size: expected a multiple of num_heads 4, got 30"),
        ({"hidden_size": 30, "num_heads": 3}, "hidden_size: expected a multiple of 4, got 30"),
        ({"depth": 0}, "depth: expected at least 1, got 0"),
        ({"num_classes": -1}, "num_classes: expected at least 0, got -1"),
        ({"class_dropout_prob": 1.0}, "class_dropout_prob: expected at least 0 and below 1, got 1.0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        DiT(**{"input_size": 8, "hidden_size": 24, "num_heads": 3, "depth": 1, **arguments})


def test_inputs_that_do_not_fit_are_refused():
    model, x, t = DiT(4, 2, 3, 24, 1, 3, num_classes=5), torch.zeros(2, 3, 4, 4), torch.zeros(2)
    for bad in (6, -1):
        with pytest.raises(InputError, match=f"expected labels from 0 to 5, got {bad}"):
            model(x, t, torch.tensor([0, bad]))
    with pytest.raises(InputError, match=r"expected labels \[2\] for 5 classes, got none"):
        model(x, t)
    with pytest.raises(InputError, match=r"expected latents \[B, 3, 4, 4\], got \(2, 3, 6, 6\)"):
        model(torch.zeros(2, 3, 6, 6), t, torch.tensor([0, 1]))
    with pytest.raises(InputError, match=r"expected t \[2\], got \(1,\)"):
        model(x, t[:1], torch.tensor([0, 1]))
    with pytest.raises(InputError, match="unconditional"):
        DiT(4, 2, 3, 24, 1, 3, num_classes=0)(x, t, torch.tensor([0, 1]))
    for name in ("DiT-XL/3", "DiT-M/2", "XL/2"):
        with pytest.raises(InputError, match="DiT name"):
            DiT.from_name(name)


def test_tokens_are_contiguous():
    """Compiled blocks in bfloat16 gave NaN on a CPU with AMX where they were not."""
    model = DiT(input_size=8, patch_size=2, in_channels=4, hidden_size=32, depth=1, num_heads=2, num_classes=0)
    assert model.x_embedder(torch.zeros(3, 4, 8, 8)).is_contiguous()

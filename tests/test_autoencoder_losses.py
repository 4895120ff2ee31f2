"""LPIPS by its definition, the discriminator's losses and weight by autograd, and weights that are not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import diffprune
from diffprune.adversary import Adversary
from diffprune.config import load_config
from diffprune.errors import InputError
from diffprune.models.lpips import LPIPS, load_lpips
from diffprune.models.patchgan import MOST_WEIGHT, PatchDiscriminator, adaptive_weight, discriminator_loss
from diffprune.ranks import Ranks

# torchvision's vgg16: widths of its 3×3 convolutions, each with a ReLU, and "M" for a 2×2 maximum.
VGG16 = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]
RELUS = [3, 8, 15, 22, 29]  # relu1_2, 2_2, 3_3, 4_3, 5_3


def vgg16_features() -> nn.Sequential:
    layers, width = [], 3
    for part in VGG16:
        if part == "M":
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(width, part, 3, padding=1), nn.ReLU()]
            width = part
    return nn.Sequential(*layers)


@pytest.fixture(scope="module")
def lpips_files(tmp_path_factory) -> Path:
    """Random weights under the published names."""
    folder, generator = tmp_path_factory.mktemp("lpips"), torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = vgg16_features().state_dict()
    weights = {"classifier.6.bias": torch.zeros(1000)}
    for name, shape in shapes.items():
        fan_in = shape[0].numel() if shape.dim() == 4 else 100
        weights[f"features.{name}"] = torch.randn(shape.shape, generator=generator) * (2 / fan_in) ** 0.5
    torch.save(weights, folder / "vgg16-397923af.pth")
    widths = (64, 128, 256, 512, 512)
    linear = {f"lin{i}.model.1.weight": torch.rand(1, w, 1, 1, generator=generator) for i, w in enumerate(widths)}
    torch.save(linear, folder / "vgg.pth")
    return folder


def test_lpips_is_its_definition(lpips_files):
    model, hashes = load_lpips(lpips_files, lpips_files)
    assert isinstance(model, LPIPS) and [len(text) for text in hashes] == [64, 64]
    assert not any(p.requires_grad for p in model.parameters())
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.rand(2, 3, 35, 32, generator=generator) * 2 - 1 for _ in range(2))
    network = vgg16_features()
    published = torch.load(lpips_files / "vgg16-397923af.pth", weights_only=True)
    network.load_state_dict({n.removeprefix("features."): v for n, v in published.items() if n.startswith("features.")})
    linear = torch.load(lpips_files / "vgg.pth", weights_only=True)
    expected = torch.zeros(2, dtype=torch.float64)
    means, deviations = [-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]
    a, b = (torch.stack([(batch[:, c] - means[c]) / deviations[c] for c in range(3)], 1).double() for batch in (x, y))
    with torch.no_grad():
        for number, layer in enumerate(network.double()):
            a, b = layer(a), layer(b)
            if number in RELUS:
                weights = linear[f"lin{RELUS.index(number)}.model.1.weight"].double()
                lengths = [(batch**2).sum(1, keepdim=True).sqrt() + 1e-10 for batch in (a, b)]
                difference = (a / lengths[0] - b / lengths[1]) ** 2
                expected += (difference * weights).sum(1).mean(dim=(1, 2))
        torch.testing.assert_close(model(x, y).double(), expected, rtol=1e-4, atol=0)
        assert torch.equal(model(x, x), torch.zeros(2))
        gray = x[:, :1]
        torch.testing.assert_close(model(gray, y[:, :1]), model(gray.repeat(1, 3, 1, 1), y[:, :1].repeat(1, 3, 1, 1)))
    z = y.clone().requires_grad_()
    z.data[0] = x[0]  # equal images, where differences are 0
    (gradient,) = torch.autograd.grad(model(x, z).sum(), z)
    assert gradient.isfinite().all() and gradient[1].abs().max() > 0
    with pytest.raises(InputError, match="at least 16 pixels a side"):
        model(x[..., :8, :8], y[..., :8, :8])


def test_features_that_are_all_zero_have_a_finite_gradient(lpips_files):
    model, _ = load_lpips(lpips_files, lpips_files)
    model.features["28"].bias.fill_(-1e6)
    x, y = torch.zeros(1, 3, 16, 16, requires_grad=True), torch.ones(1, 3, 16, 16)
    (gradient,) = torch.autograd.grad(model(x, y).sum(), x)
    assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_missing_or_wrong_weights_are_told(lpips_files, tmp_path):
    with pytest.raises(InputError, match=r"vgg.pth: no such file; LPIPS needs vgg.pth from .*PerceptualSimilarity"):
        load_lpips(tmp_path, lpips_files)
    with pytest.raises(InputError, match=r"here.pth: no such file; LPIPS needs vgg16-397923af.pth from .*pytorch.org"):
        load_lpips(lpips_files, tmp_path / "here.pth")
    torch.save({"lin0.model.1.weight": torch.ones(1, 64, 1, 1)}, tmp_path / "vgg.pth")
    with pytest.raises(InputError, match=r"tensor 'lin1.model.1.weight': expected \[1, 128, 1, 1\], found none"):
        load_lpips(tmp_path, lpips_files)
    with pytest.raises(InputError, match=r"vgg.pth: tensor 'features.0.weight': expected \[64, 3, 3, 3\], found none"):
        load_lpips(lpips_files, lpips_files / "vgg.pth")


def test_a_run_with_lpips_resumes_wherever_its_weights_lie(small_run, lpips_files, tmp_path):
    common = ["model.image_size=16", "model.base_channels=4", "train.batch_size=4", "train.log_every=1"]
    common += ["loss.lpips_weight=1", "train.device=cpu"]

    def train(steps: int, folder: Path) -> dict:
        where = [f'loss.lpips_linear="{folder}"', f'loss.lpips_vgg16="{folder}"', f"train.steps={steps}"]
        return diffprune.train_vqvae(load_config(None, "vqvae", common + where), small_run.shards, tmp_path / "run")

    report = train(1, lpips_files)
    assert report["lpips"] > 0
    assert report["loss"] > report["lpips"]  # as an error of pixels and a commitment are added
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("vgg.pth", "vgg16-397923af.pth"):
        (elsewhere / name).symlink_to(lpips_files / name)
    assert train(2, elsewhere)["first_step"] == 1
    with pytest.raises(InputError, match=r"LPIPS needs vgg.pth"):
        train(3, tmp_path)


# The discriminator


def test_the_discriminator_judges_patches_of_70_pixels_image_by_image():
    state = torch.get_rng_state()
    model = PatchDiscriminator(3, 8, 3, torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.randn(2, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    verdicts = model(x)
    assert verdicts.shape == (2, 1, 30, 30)
    torch.testing.assert_close(model(x[:1]), verdicts[:1])
    convolutions = nn.Sequential(*(layer for layer in model.layers if isinstance(layer, nn.Conv2d)))  # norms see all
    y = x[:1].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(convolutions(y)[0, 0, 15, 15], y)
    rows = gradient.abs().sum(dim=(0, 1, 3)).nonzero()
    assert rows.max() - rows.min() + 1 == 70
    assert [layer.stride[0] for layer in convolutions] == [2, 2, 2, 1, 1]


def test_the_hinge_loss():
    real, made = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.5, 0.0])
    assert discriminator_loss(real, made).item() == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1.5 + 1) / 3))


def test_the_adaptive_weight():
    assert adaptive_weight(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])).item() == pytest.approx(5 / 2.0001)
    assert adaptive_weight(torch.tensor([3.0, 4.0]), torch.zeros(2)).item() == MOST_WEIGHT
    assert adaptive_weight(torch.zeros(2), torch.ones(2)).item() == 0


def test_the_generator_term_and_a_step_of_the_discriminator_by_autograd():
    overrides = ["model.image_size=16", "loss.adversarial_weight=0.3", "loss.adversarial_start=1", "train.lr=0.01"]
    overrides += ["loss.discriminator_layers=2", "loss.discriminator_channels=4", "train.weight_decay=0.1"]
    adversary = Adversary(load_config(None, "vqvae", overrides), Ranks(), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 1, 16, 16, generator=generator)
    last = nn.Parameter(torch.randn(1, 2, 3, 3, generator=generator))
    features = torch.randn(5, 2, 16, 16, generator=generator)

    def reconstruct(weight: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(features, weight, padding=1)

    def errors(y: torch.Tensor) -> torch.Tensor:
        return (y - x).abs().flatten(1).mean(1)

    y = reconstruct(last)
    assert torch.equal(adversary.generator_term(x, y, errors(y), last), torch.zeros(5))  # before its start
    before = {name: p.detach().clone() for name, p in adversary.parameters.items()}
    adversary.learn()
    assert all(torch.equal(p, before[name]) for name, p in adversary.parameters.items())

    y = reconstruct(last)
    term = adversary.generator_term(x, y, errors(y), last)
    assert torch.equal(term, torch.zeros(5))  # in value
    (found,) = torch.autograd.grad(term.mean(), last)
    weight = last.detach().clone().requires_grad_()
    (reconstruction_gradient,) = torch.autograd.grad(errors(reconstruct(weight)).mean(), weight)
    (adversarial_gradient,) = torch.autograd.grad(-adversary.model(reconstruct(weight)).mean(), weight)
    expected = reconstruction_gradient.norm() / (adversarial_gradient.norm() + 1e-4)
    torch.testing.assert_close(found, 0.3 * expected * adversarial_gradient)
    assert adversary.metrics()["adaptive_weight"] == pytest.approx(expected.item(), rel=1e-5)

    reference = PatchDiscriminator(1, 4, 2, torch.Generator())
    reference.load_state_dict(before)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=0.01, betas=(0.5, 0.9), weight_decay=0.1, foreach=False)
    real, made = reference(x), reference(y.detach())
    loss = (real.neg().add(1).clamp(min=0).mean() + made.add(1).clamp(min=0).mean()) / 2
    loss.backward()
    optimizer.step()
    adversary.learn()
    assert adversary.metrics()["discriminator_loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(adversary.parameters[name], parameter, msg=name)
        assert parameter.dim() < 4 or not torch.equal(parameter, before[name])

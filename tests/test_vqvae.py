"""The VQ-VAE quantises to the nearest code, passes gradients straight through, and its codebook follows the data."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffprune.config import VqvaeConfig
from diffprune.errors import InputError
from diffprune.models.vqvae import DEAD_CODE_SHARE, VQVAE

CONFIG = VqvaeConfig(
    image_size=12, in_channels=3, base_channels=6, channel_multipliers=(1, 2), latent_channels=2, codebook_size=7
)


def small_vqvae(**changes) -> VQVAE:
    model = VQVAE(VqvaeConfig(**{**CONFIG.__dict__, **changes}), seed=5)
    model.codebook.copy_(torch.randn(model.codebook.shape, generator=torch.Generator().manual_seed(1)))
    return model


def images(batch: int, channels: int = 3, size: int = 12) -> torch.Tensor:
    return torch.rand(batch, channels, size, size, generator=torch.Generator().manual_seed(2)) * 2 - 1


@pytest.mark.parametrize("multipliers, side", [((1,), 6), ((1, 2), 3)])
def test_shapes_and_scale(multipliers, side):
    model = small_vqvae(channel_multipliers=multipliers)
    assert model.latent_shape == (2, side, side)
    latents = model.encode(images(5))
    assert latents.shape == (5, 2, side, side)
    torch.testing.assert_close(latents, model.encoder(images(5)))
    decoded = model.decode(latents)
    assert decoded.shape == (5, 3, 12, 12) and decoded.abs().max() <= 1
    model.latent_scale.fill_(4.0)
    torch.testing.assert_close(model.encode(images(5)), 4 * latents)
    torch.testing.assert_close(model.decode(4 * latents), decoded)


def test_codes_are_the_nearest_and_decoding_sees_only_codes():
    model = small_vqvae()
    latents = model.encoder(images(4)).detach()
    quantized, codes = model.quantize(latents)
    book = model.codebook.double().numpy()
    for b, i, j in np.ndindex(4, 3, 3):
        distances = ((latents[b, :, i, j].double().numpy() - book) ** 2).sum(1)
        assert distances[codes[b, i, j]] == pytest.approx(distances.min(), rel=1e-9)
        assert torch.equal(quantized[b, :, i, j], model.codebook[codes[b, i, j]])
    assert torch.equal(model.decode(latents), model.decoder(quantized).clamp(-1, 1))
    assert not torch.equal(model.decode(latents), model.decoder(latents).clamp(-1, 1))


def test_losses_and_the_straight_through_gradient():
    model = small_vqvae()
    x = images(4)
    output = model(x)
    latents = model.encoder(x)
    quantized, codes = model.quantize(latents)
    quantized = quantized.detach().requires_grad_()
    reconstruction = model.decoder(quantized)
    assert torch.equal(output.codes, codes)
    torch.testing.assert_close(output.reconstruction, reconstruction)
    for b in range(4):
        expected = (reconstruction[b].double() - x[b]).square().mean()
        assert output.reconstruction_error[b].item() == pytest.approx(expected.item(), rel=1e-5)
        expected = (latents[b].double() - quantized[b]).square().mean()
        assert output.commitment_error[b].item() == pytest.approx(expected.item(), rel=1e-5)
    # The encoder gets the gradient that arrives at the codes, as if quantisation were the identity.
    (wanted,) = torch.autograd.grad((reconstruction - x).square().mean(), quantized)
    (found,) = torch.autograd.grad(output.reconstruction_error.mean(), output.latents)
    torch.testing.assert_close(found, wanted)
    # The commitment pulls latents to their codes: 2 (z − e) / elements, and the codebook is not a parameter.
    output = model(x)
    (found,) = torch.autograd.grad(output.commitment_error.mean(), output.latents)
    torch.testing.assert_close(found, 2 * (output.latents - quantized).detach() / latents.numel())
    assert "codebook" not in dict(model.named_parameters())


def test_the_codebook_follows_its_latents_and_dead_codes_restart():
    model = small_vqvae(codebook_decay=0.75)
    size, even = 7, 4 * 9 / 7
    counts = torch.tensor([5.0, 5.0, 5.0, 0.1, 5.0, 0.0, 5.0])
    model.codebook[[3, 5]] = 100.0  # where no latent is
    sums = model.codebook * counts[:, None]
    model.code_counts.copy_(counts)
    model.code_sums.copy_(sums)
    output = model(images(4))
    points = output.latents.detach().permute(0, 2, 3, 1).reshape(-1, 2).double().numpy()
    codes = output.codes.flatten().numpy()
    model.update_codebook(output.latents, output.codes, torch.Generator().manual_seed(3))
    dead = []
    for code in range(size):
        mine = points[codes == code]
        count = 0.75 * counts[code].item() + 0.25 * len(mine)
        total = 0.75 * sums[code].double().numpy() + 0.25 * mine.sum(0)
        if count < DEAD_CODE_SHARE * even:
            dead.append(code)
            count = even
            nearest = np.abs(points - model.codebook[code].double().numpy()).max(1)
            assert nearest.min() < 1e-6  # a latent of this batch
        else:
            assert model.codebook[code].numpy() == pytest.approx(total / count, rel=1e-4, abs=1e-5)
        assert model.code_counts[code].item() == pytest.approx(count, rel=1e-5)
    assert dead == [3, 5]
    again = small_vqvae(codebook_decay=0.75)  # the same generator, the same codes
    again.code_counts.copy_(counts)
    again.code_sums.copy_(sums)
    again.update_codebook(output.latents, output.codes, torch.Generator().manual_seed(3))
    assert torch.equal(again.codebook, model.codebook)
    again.update_codebook(output.latents[:1], output.codes[:1], torch.Generator().manual_seed(3))
    assert again.codebook.isfinite().all()  # fewer latents than codes


def test_the_first_update_starts_the_codes_at_latents():
    model = VQVAE(CONFIG)
    latents = torch.randn(8, 2, 3, 3, generator=torch.Generator().manual_seed(0)) + 9
    _, codes = model.quantize(latents)
    model.update_codebook(latents, codes, torch.Generator().manual_seed(0))
    assert len(model.codebook.unique(dim=0)) > 3
    assert (model.codebook - 9).abs().max() < 5


@pytest.mark.parametrize("size, side", [(12, 3), (64, 8)])
def test_embeddings_are_latents_averaged_to_at_most_8_by_8(size, side):
    model = small_vqvae(image_size=size)
    model.latent_scale.fill_(3.0)  # of no effect
    x = images(2, size=size)
    found = model.embed(x)
    assert found.shape == (2, 2 * side * side)
    latents = model.encoder(x)
    grid = found.view(2, 2, side, side)
    if side == latents.shape[-1]:
        assert torch.equal(grid, latents)
    else:
        torch.testing.assert_close(grid[1, 0, 7, 0], latents[1, 0, 14:16, 0:2].mean())


def test_initial_weights_depend_on_the_seed_alone():
    state = torch.get_rng_state()
    one, same, other = VQVAE(CONFIG, seed=1), VQVAE(CONFIG, seed=1), VQVAE(CONFIG, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[name]) and tensor.isfinite().all(), name
    weight = "encoder.features.0.weight"
    assert not torch.equal(one.state_dict()[weight], other.state_dict()[weight])


def test_inputs_that_do_not_fit_are_refused():
    model = small_vqvae()
    with pytest.raises(InputError, match=r"expected images \[B, 3, 12, 12\], got \(2, 1, 12, 12\)"):
        model.encode(images(2, channels=1))
    with pytest.raises(InputError, match=r"expected images \[B, 3, 12, 12\], got \(2, 3, 16, 16\)"):
        model(images(2, size=16))
    with pytest.raises(InputError, match=r"expected latents \[B, 2, 3, 3\], got \(1, 2, 6, 6\)"):
        model.decode(torch.zeros(1, 2, 6, 6))
    with pytest.raises(InputError, match="image_size: expected a multiple of 4, got 14"):
        small_vqvae(image_size=14)

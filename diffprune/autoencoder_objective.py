"""What ``train_vqvae`` minimises: reconstruction, commitment or divergence, and perhaps LPIPS and a discriminator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from diffprune.adversary import Adversary
from diffprune.config import VqvaeRun
from diffprune.device import full_float32
from diffprune.errors import DiffpruneError, InputError
from diffprune.latent_scales import LatentMoments
from diffprune.learner import Objective
from diffprune.models.embedders import Embedder
from diffprune.models.kl import KLAutoencoder, build_autoencoder
from diffprune.models.lpips import load_lpips
from diffprune.models.vqvae import VQVAE
from diffprune.ranks import Ranks
from diffprune.reconstruction import RECONSTRUCTION_IMAGES, ReconstructionMeasure
from diffprune.storage import AnyPath
from diffprune.training_images import TrainingImages

_MEASURED_AT_A_TIME = 2**21  # elements of images, 32 of 256×256 RGB


class AutoencoderObjective(Objective):
    """Reconstruct images through a codebook, or through Gaussian latents."""

    kind = "vqvae"
    model: VQVAE | KLAutoencoder
    latents = None

    def __init__(
        self,
        run: VqvaeRun,
        ranks: Ranks,
        device: torch.device,
        images: TrainingImages,
        embedder: Embedder | None = None,
    ) -> None:
        self.ranks, self.device, self.train, self.loss = ranks, device, run.train, run.loss
        self.model = build_autoencoder(run.model, seed=run.train.seed).to(device)
        self.keys, self.images = images.keys, images.images
        self.data = {"samples": len(images.keys), "sha256": images.sha256}
        self.embedder = embedder
        self.lpips = self.adversary = None
        if run.loss.lpips_weight:
            self.lpips, files = load_lpips(run.loss.lpips_linear, run.loss.lpips_vgg16, device)
            self.data["lpips_sha256"] = " ".join(files)
        if run.loss.adversarial_weight:
            self.adversary = Adversary(run, ranks, device)
        self.parts: list[dict[str, Tensor]] = []  # what is kept of each part of this step's batch
        self.last: dict[str, Tensor] = {}  # the same of the last step, of the whole batch

    def draw(self, rows: Tensor, share: slice, generator: torch.Generator) -> tuple[Tensor, ...]:
        images = self.images[rows[share]]
        if self.train.flip:
            mirrored = torch.rand(len(rows), generator=generator)[share] < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        if isinstance(self.model, VQVAE):
            return (images,)
        return images, torch.randn((len(rows), *self.model.latent_shape), generator=generator)[share]

    def losses(self, model: nn.Module, images: Tensor, *noise: Tensor) -> Tensor:
        images = images.float() / 127.5 - 1
        output = model(images, *noise)
        reconstruction, error = output.reconstruction, output.reconstruction_error
        kept = {"reconstruction_error": error}
        if self.loss.pixel == "l1":
            error = (reconstruction - images).float().abs().flatten(1).mean(1)
        if self.lpips is not None:
            kept["lpips"] = self.lpips(reconstruction, images)
            error = error + self.loss.lpips_weight * kept["lpips"]
        if isinstance(self.model, VQVAE):
            kept |= {"latents": output.latents, "codes": output.codes, "commitment_error": output.commitment_error}
            losses = error + self.model.config.commitment_weight * output.commitment_error
        else:
            kept["divergence"] = output.divergence
            losses = error + self.loss.kl_weight * output.divergence / images[0].numel()
        self.parts.append({name: value.detach() for name, value in kept.items()})
        if self.adversary is None:
            return losses
        return losses + self.adversary.generator_term(images, reconstruction, error, self.model.last_weight)

    def after_step(self, generator: torch.Generator) -> None:
        names = list(self.parts[0])
        self.last = {name: self.ranks.gathered(torch.cat([part[name] for part in self.parts])) for name in names}
        self.parts = []
        if isinstance(self.model, VQVAE):
            self.model.update_codebook(self.last.pop("latents"), self.last["codes"], generator)
        if self.adversary is not None:
            self.adversary.learn()

    def metrics(self) -> dict[str, float]:
        found = {name: value.mean().item() for name, value in self.last.items() if name != "codes"}
        if "codes" in self.last:
            counts = torch.bincount(self.last["codes"].flatten(), minlength=self.model.config.codebook_size).double()
            found["code_perplexity"] = torch.special.entr(counts / counts.sum()).sum().exp().item()
        return found | (self.adversary.metrics() if self.adversary else {})

    @torch.no_grad()
    def before_checkpoint(self) -> None:
        """latent_scale = 1 / std of the latents' elements, over images evenly spread."""
        moments = LatentMoments()
        with full_float32():  # as `encode` does
            for images in self._spread():
                moments.add(self.model.latents(images.float() / 127.5 - 1))
        try:
            self.model.latent_scale.fill_(moments.scale)
        except InputError as error:
            raise DiffpruneError(
                f"{error}: the model has learned nothing, or its latents have grown too large"
            ) from None

    def summary(self) -> dict[str, Any]:
        measure = ReconstructionMeasure(self.model.eval(), self.embedder)
        for images in self._spread():
            measure.add(images)
        found = measure.result()
        number = found.pop("images")
        return {"measured_images": number, **found, "latent_scale": self.model.latent_scale.item()}

    def forward_of_one(self) -> None:
        model = build_autoencoder(self.model.config)
        shape = (1, model.in_channels, model.image_size, model.image_size)
        noise = () if isinstance(model, VQVAE) else (torch.zeros(1, *model.latent_shape),)
        model(torch.zeros(shape), *noise)

    def more_tensors(self) -> dict[str, dict[str, Tensor]]:
        return {} if self.adversary is None else self.adversary.tensors()

    def restore(self, checkpoint: AnyPath, state: dict[str, Any]) -> None:
        if self.adversary is not None:
            self.adversary.restore(checkpoint, state)

    def _spread(self) -> Iterator[Tensor]:
        """At most 10,000 images spread evenly, in batches, on the device."""
        count = min(len(self.keys), RECONSTRUCTION_IMAGES)
        rows = torch.arange(count) * len(self.keys) // count
        config = self.model.config
        each = max(1, min(500, _MEASURED_AT_A_TIME // (config.in_channels * config.image_size**2)))
        for part in rows.split(each):
            yield self.images[part].to(self.device)

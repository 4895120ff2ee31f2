"""The discriminator that an autoencoder is trained against, and its own optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffprune.checkpoints import read_tensors
from diffprune.config import VqvaeRun
from diffprune.learner import learning_rate
from diffprune.models.patchgan import PatchDiscriminator, adaptive_weight, discriminator_loss
from diffprune.ranks import Ranks
from diffprune.storage import AnyPath
from diffprune.training_order import step_generator
from diffprune.weight_files import check_tensors

_BETAS = (0.5, 0.9)  # AdamW's, as VQGAN's
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class Adversary:
    """Tells images from reconstructions, and says which way the autoencoder is to go to be taken for real.

    Both begin at step ``loss.adversarial_start``. Gradients are those of the whole batch, over all processes.
    """

    def __init__(self, run: VqvaeRun, ranks: Ranks, device: torch.device) -> None:
        loss, self.train, self.ranks = run.loss, run.train, ranks
        self.weight, self.start = loss.adversarial_weight, loss.adversarial_start
        generator = step_generator(run.train.seed, "discriminator", 0)
        shape = (run.model.in_channels, loss.discriminator_channels, loss.discriminator_layers)
        self.model = PatchDiscriminator(*shape, generator).to(device)
        self.parameters = dict(self.model.named_parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=run.train.lr, betas=_BETAS, weight_decay=run.train.weight_decay, fused=True
        )
        for parameter in self.parameters.values():  # from the first: a checkpoint always has the same tensors
            zeros = torch.zeros_like(parameter)
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), device=device),
                "exp_avg": zeros,
                "exp_avg_sq": zeros.clone(),
            }
        self.step = 0
        self.batch: tuple[Tensor, Tensor] | None = None
        self.last = {"adaptive_weight": 0.0, "generator_loss": 0.0, "discriminator_loss": 0.0}

    def generator_term(self, images: Tensor, reconstructions: Tensor, errors: Tensor, last_weight: Tensor) -> Tensor:
        """A term [b] of value 0 and with the adversarial loss' gradient: −λ·(the verdict on each reconstruction).

        λ is ``adversarial_weight`` times the adaptive weight. Its value is left out of the loss: it may be negative
        and depends on how good the discriminator is, so that it would tell nothing about the reconstructions.

        Args:
            errors: [b], what λ weighs it against: the reconstruction loss of each image, with its graph.
            last_weight: of the decoder.
        """
        if self.step < self.start:
            return torch.zeros_like(errors)
        self.model.requires_grad_(False)
        verdicts = -self.model(reconstructions).float().flatten(1).mean(dim=1)
        gradients = [torch.autograd.grad(v.mean(), last_weight, retain_graph=True)[0] for v in (errors, verdicts)]
        self.ranks.average(gradients)
        weight = adaptive_weight(*gradients)
        self.batch = images, reconstructions.detach()
        self.last["adaptive_weight"], self.last["generator_loss"] = weight, verdicts.detach().mean()
        term = self.weight * weight * verdicts
        return term - term.detach()

    def learn(self) -> None:
        """One step of the discriminator, on the images and reconstructions that ``generator_term`` saw."""
        if self.batch is not None:
            images, reconstructions = self.batch
            self.batch = None
            self.model.requires_grad_(True)
            low = reconstructions.dtype == torch.bfloat16
            with torch.autocast(images.device.type, torch.bfloat16, enabled=low):
                loss = discriminator_loss(self.model(images), self.model(reconstructions))
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.ranks.average([parameter.grad for parameter in self.parameters.values()])
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.train, self.step)
            self.optimizer.step()
            losses = torch.stack([self.last["generator_loss"], loss.detach()])
            self.ranks.average([losses])
            self.last["generator_loss"], self.last["discriminator_loss"] = losses
        self.step += 1

    def metrics(self) -> dict[str, float]:
        """Of the last step, zeros before the first."""
        return {name: float(value) for name, value in self.last.items()}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint keeps of it."""
        moments = {
            f"{moment}.{name}": self.optimizer.state[parameter][moment]
            for name, parameter in self.parameters.items()
            for moment in _MOMENTS
        }
        return {"discriminator": self.model.state_dict(), "discriminator_optimizer": moments}

    def restore(self, checkpoint: AnyPath, state: dict[str, Any]) -> None:
        """Put back what ``tensors`` gave."""
        for file, expected in self.tensors().items():
            found = read_tensors(checkpoint, state, file)
            check_tensors(found, expected, checkpoint / f"{file}.safetensors")
            for name, tensor in expected.items():
                tensor.detach().copy_(found[name])
        self.step = state["step"]

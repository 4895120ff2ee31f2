"""The networks: the diffusion transformer and the autoencoder of its latents."""

from diffprune.models.dit import DiT
from diffprune.models.vqvae import VQVAE

__all__ = ["VQVAE", "DiT"]

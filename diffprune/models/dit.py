"""The diffusion transformer, DiT with adaLN-Zero (Peebles & Xie 2023, arXiv 2212.09748), as a velocity model."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from diffprune.config import DitConfig
from diffprune.errors import InputError
from diffprune.kernels import adaln_modulate, attention, gated_residual, gated_residual_adaln
from diffprune.models.positions import rotary_turns, rotate, sincos_position_embedding

# hidden size, depth, heads of the published sizes (table 1 of the paper).
_SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
_PATCHES = (2, 4, 8)


class DiT(nn.Module):
    """Velocity of a latent at time t: ``forward(x, t, y)``.

    Modules and parameters bear the names and shapes of the published DiT and SiT, so their state dicts load
    (``checkpoints.load_foreign_dit``). SiT's (arXiv 2401.08740) are velocity models on this package's path (t=0
    noise, t=1 data, t fed to the embedding as it is) and can be used at once. DiT's predict the noise of a
    1000-step diffusion: their weights load, as a start for further training and to score with (``convert``), but are no
    velocity model yet.

    The arguments are the published ones with their defaults, and ``DitConfig`` explains them. ``num_classes=0``
    makes an unconditional model without ``y_embedder``. With ``class_dropout_prob > 0`` the label table has one row
    more, for the null label ``num_classes``; ``forward`` itself never drops labels: who trains replaces some by the
    null label. With ``learn_sigma`` the final layer has 2C channels, of which the first C are the velocity and the
    others are not returned.

    Weights are initialised as published (every block starts as the identity and the output as zero) from ``seed``;
    the global generator is left as it was. Two arguments help small models that train for minutes and not for days:
    ``time_scale``, by which t is multiplied before its embedding, and ``label_init_std``.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        time_scale: float = 1.0,
        label_init_std: float = 0.02,
        qk_norm: bool = False,
        rope: bool = False,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config = DitConfig(
            input_size=input_size,
            patch_size=patch_size,
            in_channels=in_channels,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            class_dropout_prob=class_dropout_prob,
            num_classes=num_classes,
            learn_sigma=learn_sigma,
            time_scale=time_scale,
            label_init_std=label_init_std,
            qk_norm=qk_norm,
            rope=rope,
        )
        self.activation_checkpointing = False
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.num_classes = num_classes
        self.out_channels = in_channels * (2 if learn_sigma else 1)

        tokens = (input_size // patch_size) ** 2
        # On the meta device the layers draw no initial weights of their own from the global generator.
        device = torch.get_default_device()
        with torch.device("meta"):
            self.x_embedder = PatchEmbedder(patch_size, in_channels, hidden_size)
            self.t_embedder = TimestepEmbedder(hidden_size, time_scale)
            if num_classes:
                self.y_embedder = LabelEmbedder(num_classes + (class_dropout_prob > 0), hidden_size)
            self.pos_embed = nn.Parameter(torch.zeros(1, tokens, hidden_size), requires_grad=False)
            self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio, qk_norm) for _ in range(depth))
            self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        if device.type != "meta":
            self.to_empty(device="cpu").init_weights(torch.Generator().manual_seed(seed))
            self.to(device)

    @classmethod
    def from_name(cls, name: str, **kwargs) -> DiT:
        """A published size by name: ``DiT-`` or ``SiT-``, S, B, L or XL, ``/`` and patch 2, 4 or 8."""
        match = re.fullmatch(r"[DS]iT-(S|B|L|XL)/(\d+)", name)
        if match is None or int(match[2]) not in _PATCHES:
            raise InputError(f"DiT name: expected DiT-{{S,B,L,XL}}/{{2,4,8}}, got {name!r}")
        hidden_size, depth, num_heads = _SIZES[match[1]]
        return cls(patch_size=int(match[2]), hidden_size=hidden_size, depth=depth, num_heads=num_heads, **kwargs)

    @property
    def null_label(self) -> int | None:
        """The label that means "no label", or None if the model was built without one."""
        return self.config.null_label

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Velocity at ``(x, t)`` given labels ``y``.

        Args:
            x: [B, in_channels, input_size, input_size] latents.
            t: [B] times in [0, 1].
            y: [B] int64 labels below ``num_classes``, or the null label; None for an unconditional model.

        Returns:
            [B, in_channels, input_size, input_size], in the dtype of the weights (or of autocast).

        Raises:
            InputError: another shape; labels missing; a label without a row (on the CPU: on a GPU that is a
                device-side assertion, so check labels before they go there).
        """
        expected = (self.in_channels, self.input_size, self.input_size)
        if x.ndim != 4 or tuple(x.shape[1:]) != expected:
            raise InputError(f"expected latents [B, {', '.join(map(str, expected))}], got {tuple(x.shape)}")
        if tuple(t.shape) != (x.shape[0],):
            raise InputError(f"expected t [{x.shape[0]}], got {tuple(t.shape)}")
        tokens = self.x_embedder(x) + self.pos_embed
        condition = self.t_embedder(t)
        if self.num_classes:
            condition = condition + self._embed_labels(y, x.shape[0])
        elif y is not None:
            raise InputError("this DiT is unconditional (num_classes=0): expected no labels")
        turns = self._turns(tokens.device) if self.config.rope else None
        again = self.activation_checkpointing and torch.is_grad_enabled()
        for block in self.blocks:
            if again:  # without a generator's state: a block draws nothing
                tokens = checkpoint(block, tokens, condition, turns, use_reentrant=False, preserve_rng_state=False)
            else:
                tokens = block(tokens, condition, turns)
        output = self._unpatchify(self.final_layer(tokens, condition))
        return output[:, : self.in_channels]

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Have torch.compile make one block's code, which all of them share; names of parameters stay."""
        for block in self.blocks:
            # The forward alone: FSDP's hooks around it stay outside.
            block.forward = torch.compile(block.forward, backend=backend, fullgraph=True)

    def use_ops(self, impl: str | None) -> None:
        """Run attention and the adaLN chain as this package's ops with this ``impl``, or with None as PyTorch's own.

        The same function but for rounding; see ``models.ops`` for which is faster. The ops have no forward-mode
        derivative: for ``torch.func.jvp`` of the model it has to be None.
        """
        for module in self.modules():
            if isinstance(module, (Attention, Block, FinalLayer)):
                module.impl = impl

    def init_weights(self, generator: torch.Generator) -> None:
        """Initialise every parameter as published; the draws come from ``generator``, in module order."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        patch_weight = self.x_embedder.proj.weight
        nn.init.xavier_uniform_(patch_weight.view(patch_weight.shape[0], -1), generator=generator)
        nn.init.zeros_(self.x_embedder.proj.bias)
        if self.num_classes:
            std = self.config.label_init_std
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=std, generator=generator)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02, generator=generator)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02, generator=generator)
        zero = [block.adaLN_modulation[1] for block in self.blocks]
        for linear in [*zero, self.final_layer.adaLN_modulation[1], self.final_layer.linear]:
            nn.init.zeros_(linear.weight)
        side = self.input_size // self.patch_size
        self.pos_embed.data.copy_(sincos_position_embedding(side, self.pos_embed.shape[-1]).unsqueeze(0))

    def _turns(self, device: torch.device) -> tuple[Tensor, Tensor]:
        head_size = self.config.hidden_size // self.config.num_heads
        return rotary_turns(self.input_size // self.patch_size, head_size, device)

    def _embed_labels(self, y: Tensor | None, batch: int) -> Tensor:
        rows = self.y_embedder.embedding_table.num_embeddings
        if y is None or tuple(y.shape) != (batch,):
            found = "none" if y is None else tuple(y.shape)
            raise InputError(f"expected labels [{batch}] for {self.num_classes} classes, got {found}")
        try:
            return self.y_embedder(y)
        except IndexError:
            bad = y[(y < 0) | (y >= rows)][0].item()
            raise InputError(f"expected labels from 0 to {rows - 1}, got {bad}") from None

    def _unpatchify(self, tokens: Tensor) -> Tensor:
        """[B, T, p*p*C] -> [B, C, H, W]; within a token the order is row, column, channel."""
        side, p, channels = self.input_size // self.patch_size, self.patch_size, self.out_channels
        grid = tokens.reshape(-1, side, side, p, p, channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, side * p, side * p)


class PatchEmbedder(nn.Module):
    """[B, C, H, W] -> [B, T, hidden]: one linear map per patch."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        # Contiguous: else Inductor (PyTorch 2.13) makes wrong code of a block in bfloat16 on some CPUs.
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()


class TimestepEmbedder(nn.Module):
    """[B] times -> [B, hidden]: 256 cosines and sines, then a two-layer MLP."""

    frequencies = 256

    def __init__(self, hidden_size: int, time_scale: float) -> None:
        super().__init__()
        self.time_scale = time_scale
        self.mlp = nn.Sequential(
            nn.Linear(self.frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        # In float64: the phase t·ω reaches time_scale radians, where float32 and bfloat16 have too few digits left.
        t = t.double() * self.time_scale
        half = self.frequencies // 2
        omega = torch.exp(torch.arange(half, dtype=t.dtype, device=t.device) * (-math.log(10000) / half))
        phase = t[:, None] * omega
        waves = torch.cat([phase.cos(), phase.sin()], dim=1)
        return self.mlp(waves.to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """[B] labels -> [B, hidden]."""

    def __init__(self, rows: int, hidden_size: int) -> None:
        super().__init__()
        # Not drawn: on the meta device that would import Dynamo, a second.
        self.embedding_table = nn.Embedding.from_pretrained(torch.empty(rows, hidden_size), freeze=False)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class Attention(nn.Module):
    """Multi-head self-attention over [B, T, hidden], not causal."""

    impl: str | None = None

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads, self.qk_norm = num_heads, qk_norm
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        if qk_norm:
            self.q_norm = nn.LayerNorm(hidden_size // num_heads, eps=1e-6)
            self.k_norm = nn.LayerNorm(hidden_size // num_heads, eps=1e-6)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor] | None = None) -> Tensor:
        batch, tokens, hidden = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, hidden // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        if turns is not None:
            query, key = rotate(query, *turns), rotate(key, *turns)
        if query.dtype != value.dtype:  # under autocast norms and turns give float32
            query, key = query.to(value.dtype), key.to(value.dtype)
        if self.impl is None:
            attended = F.scaled_dot_product_attention(query, key, value)
        else:
            attended = attention(query, key, value, impl=self.impl)
        return self.proj(attended.transpose(1, 2).reshape(batch, tokens, hidden))


class Mlp(nn.Module):
    """[B, T, hidden] -> the same, through a GELU (tanh form) layer."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, inner_size)
        self.fc2 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """A transformer block whose LayerNorms are shifted, scaled and gated by the condition (adaLN-Zero)."""

    impl: str | None = None

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, qk_norm: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads, qk_norm)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, condition: Tensor, turns: tuple[Tensor, Tensor] | None = None) -> Tensor:
        modulation = self.adaLN_modulation(condition)
        if self.impl is None:
            shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unsqueeze(1).chunk(6, dim=2)
            x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), turns)
            return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=1)
        branch = self.attn(adaln_modulate(x, shift1, scale1, impl=self.impl), turns)
        x, y = gated_residual_adaln(x, branch, gate1, shift2, scale2, impl=self.impl)
        return gated_residual(x, self.mlp(y), gate2, impl=self.impl)


class FinalLayer(nn.Module):
    """[B, T, hidden] -> [B, T, p*p*C], after a last modulated LayerNorm."""

    impl: str | None = None

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        modulation = self.adaLN_modulation(condition)
        if self.impl is not None:
            return self.linear(adaln_modulate(x, *modulation.chunk(2, dim=1), impl=self.impl))
        shift, scale = modulation.unsqueeze(1).chunk(2, dim=2)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``x * (1 + scale) + shift``; x [B, T, D], shift and scale [B, 1, D]."""
    return x * (1 + scale) + shift

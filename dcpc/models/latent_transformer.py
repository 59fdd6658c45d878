"""A causal transformer with Gaussian latents between its blocks: an ordinary Pyro program."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from dcpc.distributions import OrderedCategorical
from dcpc.errors import DataError, OptionError, require_at_least

__all__ = ["CausalBlock", "LatentTransformer"]

MASKED = -1e9
"""Added to the attention's logits of later positions, whose exponentials are then zero."""


class CausalBlock(nn.Module):
    """A transformer's block: attention to positions that are not later, then two layers.

        h   = u + attention(norm(u))
        out = h + W_2 gelu(W_1 norm(h))

    Written with matrix products, since fused attention cannot be captured under `vmap`. No dropout:
    a captured program is a function of values and parameters.

    Args:
        width: Size D of every position's vector.
        num_heads: Heads of the attention, a divisor of D.
        length: Largest number of positions T.
    """

    mask: Tensor

    def __init__(self, width: int, num_heads: int, length: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.first_norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)
        self.hidden = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.register_buffer("mask", torch.full((length, length), MASKED).triu(1), persistent=False)

    def forward(self, stream: Tensor) -> Tensor:
        """Maps `(N, T, D)` to `(N, T, D)`; what is at a position depends on no later one."""
        stream = stream + self._attention(self.first_norm(stream))
        return stream + self.hidden(self.second_norm(stream))

    def _attention(self, stream: Tensor) -> Tensor:
        count, length, width = stream.shape
        split = self.queries_keys_values(stream).reshape(count, length, 3, self.num_heads, -1)
        queries, keys, values = split.permute(2, 0, 3, 1, 4)  # (N, heads, T, D / heads) each
        logits = queries @ keys.transpose(-1, -2) / math.sqrt(width // self.num_heads)
        shares = (logits + self.mask[:length, :length]).softmax(-1)
        return self.merge((shares @ values).transpose(1, 2).reshape(count, length, width))


class LatentTransformer(nn.Module):
    """A decoder-only transformer over sequences, with a Gaussian latent after some of its blocks.

    With `B` blocks, `h_0` the embedding of a start symbol followed by `x_1, ..., x_{T-1}`, and a
    latent after every block,

        z_l ~ N(block_l(h_{l-1}) / s_l, I),    h_l = s_l z_l      l = 1, ..., B
        x_t ~ Categorical(logits = head(norm(h_B))_t)             t = 1, ..., T

    so that the residual stream is `h_l ~ N(block_l(h_{l-1}), s_l^2 I)`, and latents are in units of
    their own noise, in which one step size suits all. The `h_l` are deterministic values, sites
    `stream1` to `streamB` beside the latents `z1` to `zB`. A block without a latent after it is
    composed with the next one. Blocks look at no later positions: `h_{l,t}` depends on
    `h_{l-1,<=t}`, and these on symbols before `x_t`, so that the joint density is

        p(x, z) = prod_t p(x_t | z_{B,t}) prod_l p(z_{l,t} | h_{l-1,<=t}, x_{<t}),

    a generative model of whole sequences, with an evidence `p(x)`. Run on symbols, the program
    draws latents given all of them as inputs, which is no draw from the model; `generate`, and the
    program without symbols, draw position by position.

    Why the noise falls towards the input (`scale_ratio`): at a forward pass no latent has an error,
    and one sequential sweep from the last latent to the first, of gradient steps of size 1, leaves
    in every `z_l` the displacement `s_l g_l`, `g_l` the gradient of the log-likelihood with respect
    to `h_l`. The error of `h_{l+1}`, on which block `l + 1` learns, is then
    `s_{l+1}^2 g_{l+1} - s_l^2 J g_l`, with `J` the Jacobian of the block: where the scales are
    equal and `J` is about the identity, as of residual blocks, the second term takes the first
    away; where they fall, every block learns by the gradient of backpropagation, to second order in
    the ratio, from its own factor alone.

    Args:
        num_symbols: Number of symbols, S.
        length: Symbols per sequence, T.
        width: Size D of every position's vector, and of a latent at a position.
        num_blocks: B.
        num_heads: Heads of the attention, a divisor of D.
        latent_after: Blocks after which there is a latent, of 1 to B; null for all of them, the
            empty list for an ordinary transformer.
        scale: `s_B`, standard deviation of the last latent's noise, in units of the residual
            stream.
        scale_ratio: `s_l / s_{l+1}`, of a latent's standard deviation to the next one's.
        embedding_scale: Standard deviation, at first, of the embeddings of symbols and of
            positions. Blocks normalise what they read, so that the larger the stream is, the
            closer they are to the identity, as the above wants them to be.

    Attributes:
        scales: `s_l` by the number of the block.
        image_shape: `(T,)`, with which the shape of data is compared.

    Raises:
        OptionError: A number out of range.
    """

    def __init__(
        self,
        num_symbols: int,
        length: int,
        width: int = 32,
        num_blocks: int = 4,
        num_heads: int = 4,
        latent_after: Sequence[int] | None = None,
        scale: float = 1.0,
        scale_ratio: float = 0.2,
        embedding_scale: float = 1.0,
    ) -> None:
        super().__init__()
        require_at_least("num_symbols", num_symbols, 2)
        require_at_least("length", length, 1)
        require_at_least("width", width, 1)
        require_at_least("num_blocks", num_blocks, 1)
        require_at_least("num_heads", num_heads, 1)
        scales = {"scale": scale, "scale_ratio": scale_ratio, "embedding_scale": embedding_scale}
        for name, value in scales.items():
            if not 0.0 < value < math.inf:
                raise OptionError(f"{name} must be a positive number, got {value}")
        if width % num_heads:
            raise OptionError(
                f"num_heads must divide width, {width}, got {num_heads}; choose a divisor"
            )
        places = range(1, num_blocks + 1) if latent_after is None else latent_after
        if not set(places) <= set(range(1, num_blocks + 1)) or len(set(places)) < len(places):
            raise OptionError(
                f"latent_after must hold different numbers of blocks, from 1 to {num_blocks}, got "
                f"{list(places)}"
            )
        self.num_symbols = num_symbols
        self.length = length
        self.image_shape = (length,)
        self.latent_after = tuple(sorted(places))
        above = range(len(self.latent_after) - 1, -1, -1)
        self.scales = {
            number: scale * scale_ratio**power
            for number, power in zip(self.latent_after, above, strict=True)
        }
        self.symbols = nn.Embedding(num_symbols + 1, width)  # the last one is the start symbol
        self.symbols.weight.data.mul_(embedding_scale)
        self.positions = nn.Parameter(embedding_scale * torch.randn(length, width))
        self.blocks = nn.ModuleList(
            CausalBlock(width, num_heads, length) for _ in range(num_blocks)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_symbols)

    def forward(self, x: Tensor | None = None, num_sequences: int = 1) -> Tensor:
        """The Pyro program.

        Args:
            x: Observed symbols `(num_sequences, *shape)`, integers from 0 to S - 1, with T of them
                in a sequence; None to draw them.
            num_sequences: Number of sequences to draw.

        Returns:
            The symbols, `(num_sequences, T)`.

        Raises:
            DataError: Symbols that are no integers, or sequences of another length.
        """
        pyro.module("latent_transformer", self)
        if x is not None:
            symbols = self._checked(x)
            return self._program(symbols, symbols)
        symbols, _, latents = self._draw(num_sequences)
        drawn = pyro.poutine.Trace()
        for name, value in {**latents, "x": symbols}.items():
            drawn.add_node(name, name=name, type="sample", is_observed=False, value=value, infer={})
        return pyro.poutine.replay(self._program, trace=drawn)(symbols)

    def network(self, x: Tensor) -> Tensor:
        """Logits `(N, T, S)` of an ordinary transformer of these weights: latents at their means.

        Args:
            x: Symbols, `(N, *shape)`.
        """
        stream = self.embed(self._checked(x))
        for block in self.blocks:
            stream = block(stream)
        return self.logits(stream)

    def generate(self, num_sequences: int) -> tuple[Tensor, Tensor]:
        """Draws sequences from the model, position by position.

        Costs T runs of the blocks, on all positions so far.

        Returns:
            Symbols, `(num_sequences, T)`, and the mean of each given those before it, as levels.
        """
        symbols, means, _ = self._draw(num_sequences)
        return symbols, means

    @torch.no_grad()
    def _draw(self, num_sequences: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Symbols and their means `(N, T)`, and the latents that they were drawn with."""
        like = self.positions
        shape = (num_sequences, *like.shape)
        noise = {number: torch.randn(shape).to(like) for number in self.latent_after}
        symbols = torch.zeros(shape[:2], dtype=torch.long, device=like.device)
        means = like.new_zeros(shape[:2])
        for t in range(self.length):
            stream, latents = self.embed(symbols[:, : t + 1]), {}
            for number, block in enumerate(self.blocks, start=1):
                stream = block(stream)
                if number in noise:
                    # Of the first positions it is what it was in the runs before.
                    scale = self.scales[number]
                    latents[f"z{number}"] = stream / scale + noise[number][:, : t + 1]
                    stream = scale * latents[f"z{number}"]
            told = OrderedCategorical(logits=self.logits(stream[:, t]))
            symbols[:, t], means[:, t] = told.sample(), told.mean
        return symbols, means, latents

    def _program(self, symbols: Tensor, observed: Tensor | None = None) -> Tensor:
        """The program given the symbols `(N, T)` that blocks look at."""
        with pyro.plate("sequences", len(symbols)):
            stream = self.embed(symbols)
            for number, block in enumerate(self.blocks, start=1):
                stream = block(stream)
                if number in self.scales:
                    scale = self.scales[number]
                    z = pyro.sample(f"z{number}", dist.Normal(stream / scale, 1.0).to_event(2))
                    stream = pyro.deterministic(f"stream{number}", scale * z, event_dim=2)
            told = OrderedCategorical(logits=self.logits(stream)).to_event(1)
            return pyro.sample("x", told, obs=observed)

    def logits(self, stream: Tensor) -> Tensor:
        """Logits `(..., S)` of symbols, from the residual stream `(..., D)` after the blocks."""
        return self.head(self.norm(stream))

    def embed(self, symbols: Tensor) -> Tensor:
        """`h_0` of symbols `(N, T)`: those before each position, and the position; `(N, T, D)`."""
        start = torch.full_like(symbols[:, :1], self.num_symbols)
        before = torch.cat([start, symbols[:, :-1]], 1)
        return self.symbols(before) + self.positions[: symbols.shape[1]]

    def _checked(self, x: Tensor) -> Tensor:
        if x.is_floating_point() or x[0].numel() != self.length:
            raise DataError(
                f"a LatentTransformer takes integers, {self.length} in a sequence (its length), "
                f"got {tuple(x.shape)} of {x.dtype}; set length, or take symbols from "
                "dcpc.training.data.PixelSequences"
            )
        return x.flatten(1)

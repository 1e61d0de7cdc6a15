"""Makes the latents narrow, first layer to last, each fitted to what the narrow layers before it have left.

Two streams of hidden states run side by side: x of the original, and x' of the narrow layers. In each layer the latent
of full rank is z of the one and z' of the other. The heads read `B A z'`, where z is wanted (see `latent`). Then least
squares fit the output projection, which reads the narrow heads, to what the original's attention adds to its stream,
and to a share of the error that the stream has already: `y + PULL (x - x')`. Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..base_model.activations import evaluating
from . import latent
from .latent import LatentMoments
from .layerwise import Layerwise
from .temporary import TemporaryTensors

# Both were chosen on validation text of SmolLM2-135M.
PULL = 0.25
RIDGE = 0.01  # what a change of the output projection costs, in units of the heads' mean square

Batch = Mapping[str, Any]


@torch.no_grad()
def narrow_layers(target: Layerwise, batches: Sequence[Batch], rank: int, files: TemporaryTensors) -> Generator[int]:
    """Give each layer its final weights, and yield its number; its original may be released then.

    Args:
        target: the stock model, all of its layers empty.
        batches: keyword arguments; rows are texts.
        rank: of the narrow latents.
        files: have the Fisher information of each layer's latent as "fisher-i", and get all hidden states, twice.
    """
    for b, batch in enumerate(batches):
        files.write(f"narrow-{b}", target.start(batch)[0])
        files.write(f"original-{b}", target.start_original(batch)[0])
    bar = tqdm(total=len(target.layers) * len(batches), desc="CLOVER fit", unit=" batches", delay=3, leave=False)
    with bar as progress:
        for i in range(len(target.layers)):
            layer = _Layer(target, i)
            for b, batch in enumerate(batches):
                layer.add_latents(batch, files.read(f"narrow-{b}"), files.read(f"original-{b}"))
            layer.narrow(files.read(f"fisher-{i}", last=True).to("cpu", torch.float64), rank)
            for b, batch in enumerate(batches):
                after = layer.add_heads(batch, files.read(f"narrow-{b}"), files.read(f"original-{b}"))
                files.write(f"original-{b}", after)
            layer.fit_output()
            for b, batch in enumerate(batches):
                files.write(f"narrow-{b}", layer.run(batch, files.read(f"narrow-{b}")))
                progress.update()
            yield i


def stored_bytes(config: Any, batches: Sequence[Batch], itemsize: int) -> int:
    """Bytes of the temporary files: the Fisher information in float32, and two streams of hidden states.

    Args:
        config: of the stock model with latents of full rank.
        batches: as above.
        itemsize: of the model's dtype.
    """
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    return 4 * config.num_hidden_layers * config.kv_lora_rank**2 + 2 * tokens * config.hidden_size * itemsize


class _Layer:
    """One layer of the stock model at work, beside the original's; hidden states are (B, T, D)."""

    def __init__(self, target: Layerwise, i: int) -> None:
        self.target, self.stock, self.original = target, target.fill(i), target.original_layers[i]
        self.output: nn.Linear = self.stock.self_attn.o_proj
        n, width = self.stock.self_attn.kv_lora_rank, self.output.in_features
        self.second, self.cross = (torch.zeros(n, n, dtype=torch.float64) for _ in range(2))
        self.errors = torch.zeros_like(self.output.weight, dtype=torch.float64)
        self.heads, self.tokens = self.errors.new_zeros(width, width), 0

    def add_latents(self, batch: Batch, narrow: Tensor, original: Tensor) -> None:
        """Add a batch's latents of full rank to the sums of `narrow`, from what enters the layer."""
        attention, mask = self.stock.self_attn, self.target.mask(batch)
        hidden = self.stock.input_layernorm(torch.cat([narrow, original * self.target.scale]))
        found = attention.kv_a_proj_with_mqa(hidden)[..., : attention.kv_lora_rank]
        here, wanted = (z[mask] for z in attention.kv_a_layernorm(found).float().chunk(2))
        self.second += (here.T @ here).to(self.second)
        self.cross += (wanted.T @ here).to(self.cross)
        self.tokens += len(here)

    def narrow(self, fisher: Tensor, rank: int) -> None:
        """Make the latent narrow, with (n, n) sums on the CPU."""
        moments = LatentMoments(self.second.div_(self.tokens), self.cross.div_(self.tokens), fisher)
        del self.second, self.cross, fisher
        latent.narrow(self.stock.self_attn, *latent.fitted_bases(moments, rank))

    def add_heads(self, batch: Batch, narrow: Tensor, original: Tensor) -> Tensor:
        """Add a batch's heads, and what their output lacks, to the sums of `fit_output`.

        Returns:
            What leaves the original layer.
        """
        _, options, mask = self.target.start(batch)
        heads, added = list[Tensor](), list[Tensor]()
        with self.output.register_forward_pre_hook(lambda module, inputs: heads.append(inputs[0])):
            output = self.stock.self_attn(hidden_states=self.stock.input_layernorm(narrow), **options)[0]
        with (
            evaluating(self.original),
            self.original.self_attn.register_forward_hook(lambda module, inputs, output: added.append(output[0])),
        ):
            after: Tensor = self.original(original, **self.target.start_original(batch)[1])
        wanted = added[0] * self.target.scale + PULL * (original * self.target.scale - narrow)
        h, errors = (t[mask].float() for t in (heads[0], wanted - output))
        self.heads += (h.T @ h).to(self.heads)
        self.errors += (errors.T @ h).to(self.errors)
        return after

    def fit_output(self) -> None:
        """Change the output projection by the solution of least squares."""
        penalty = (RIDGE * self.heads.diagonal().mean()).clamp(min=1e-30)  # heads without values are zero
        self.heads.diagonal().add_(penalty)
        change = torch.linalg.solve(self.heads, self.errors, left=False)
        self.output.weight = nn.Parameter((self.output.weight.double() + change).to(self.output.weight.dtype), False)

    def run(self, batch: Batch, narrow: Tensor) -> Tensor:
        """What leaves the narrow layer."""
        result: Tensor = self.stock(narrow, **self.target.start(batch)[1])
        return result

"""One step's gradients while blocks come and go: forwards with only the inputs of blocks kept, then backwards, where
each block is computed once more and its gradients at once, while its weights are there.

So memory holds one block's activations, and no weight has to stay. The numbers are those of plain backpropagation, bit
for bit: the same operations in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PATCH_SIZE, SEQUENCE_MULTIPLE
from ..model.linear import Stream
from ..model.transformer import Caption, Modulation, Transformer
from ..units import round_up
from .lora import GROUP, TrainedLora


@dataclass(frozen=True)
class Batch:
    """The pictures of one step, each at its own time and in its own size. latents, noises: [channels, height/8,
    width/8] float32; sigmas: of each; modulations: of their times, in the compute dtype. preserved: so many, the last,
    are to be answered as without the LoRA; weight: of each of these in the loss."""

    latents: Sequence[Tensor]
    noises: Sequence[Tensor]
    sigmas: Sequence[float]
    captions: Sequence[Caption]
    modulations: Sequence[Modulation]
    preserved: int = 0
    weight: float = 1.0

    @property
    def asked(self) -> Batch:
        """What is preserved comes once more at the end, for the answer without the LoRA."""
        new = len(self.latents) - self.preserved
        return Batch(
            [*self.latents, *self.latents[new:]],
            [*self.noises, *self.noises[new:]],
            [*self.sigmas, *self.sigmas[new:]],
            [*self.captions, *self.captions[new:]],
            [*self.modulations, *self.modulations[new:]],
        )

    def noisy(self, dtype: torch.dtype) -> list[Tensor]:
        """What the model sees."""
        triples = zip(self.latents, self.noises, self.sigmas, strict=True)
        return [((1 - sigma) * latent + sigma * noise).to(dtype) for latent, noise, sigma in triples]

    def loss(self, answers: Sequence[Tensor]) -> Tensor:
        """The mean over pictures. answers: to what is `asked`. Of flow matching: to answer data - noise."""
        count = len(self.latents)
        new, before = count - self.preserved, [answer.detach().float() for answer in answers[count:]]
        flows = [latent - noise for latent, noise in zip(self.latents[:new], self.noises[:new], strict=True)]
        pairs = zip(answers[:count], [*flows, *before], strict=True)
        losses = [(answer.float() - wanted).square().mean() for answer, wanted in pairs]
        losses[new:] = [self.weight * loss for loss in losses[new:]]
        return torch.stack(losses).mean()

    @property
    def modulation(self) -> Modulation:
        """Of several pictures, a row for each: [blocks, 4, pictures, dim], which `of_tokens` repeats, and for the final
        layer [tokens, dim]."""
        if len(self.modulations) == 1:
            return self.modulations[0]
        refiner, layers = (
            torch.stack([getattr(own, name) for own in self.modulations], dim=2) for name in ("noise_refiner", GROUP)
        )
        final = torch.stack([own.final for own in self.modulations])
        return Modulation(refiner, layers, of_tokens(final, self._lengths))

    @property
    def _lengths(self) -> list[int]:
        """Tokens of each picture with its caption."""
        images = [latent[0].numel() // PATCH_SIZE**2 for latent in self.latents]
        pairs = zip(images, self.captions, strict=True)
        return [round_up(image, SEQUENCE_MULTIPLE) + len(caption.tokens) for image, caption in pairs]


def of_tokens(rows: Tensor, lengths: Sequence[int]) -> Tensor:
    """[..., pictures, dim] -> [..., tokens, dim]: each picture's row for all of its tokens. Not by repeat_interleave,
    for which a GPU is asked how many there are: the next launches would wait for all that it was asked before."""
    of_each = rows.unsqueeze(-2).unbind(-3)
    return torch.cat([own.expand(*own.shape[:-2], n, -1) for own, n in zip(of_each, lengths, strict=True)], dim=-2)


@dataclass(frozen=True)
class _Visit:
    """A block's input, and how its output comes of it."""

    x: Tensor
    forward: Callable[[Tensor], Tensor]


class _Recorder:
    """Brings blocks that compute without a graph, and keeps what the layers saw. last: what came out of the last one,
    where the graph of what follows begins. untaught: so many pictures, the last, pass the layers without the LoRA, and
    no gradient comes of them."""

    def __init__(
        self, model: Transformer, lora: TrainedLora, dtype: torch.dtype, stream: Stream, untaught: int
    ) -> None:
        self.lora, self.dtype, self.stream, self.untaught = lora, dtype, stream, untaught
        self.names = {block: f"{GROUP}.{i}" for i, block in enumerate(model.layers)}
        self.visits: list[_Visit] = []
        self.last = self._apart = torch.empty(0)

    def __call__(self, blocks: Iterable[nn.Module]) -> Iterator[Any]:
        for block in self.stream(blocks):
            yield partial(self._run, block)

    def _run(self, block: nn.Module, x: Tensor, rope: Any, lengths: list[int], vectors: Tensor, compute: Any) -> Tensor:
        name = self.names.get(block)
        if not name:
            with torch.no_grad():
                return block(x, rope, lengths, _of_all(vectors, lengths), compute)
        taught, *apart = _parted(rope, lengths, vectors, len(lengths) - self.untaught)
        if not self.visits:
            tokens = sum(taught[1])
            x, self._apart = x.split([tokens, len(x) - tokens])

        def computed(x: Tensor, part: _Part) -> Tensor:
            """Rows are repeated here: for all tokens they are as much as four inputs of a block, and each visit would
            keep its own."""
            rope, lengths, rows = part
            return block(x, rope, lengths, _of_all(rows, lengths), compute)

        def forward(x: Tensor) -> Tensor:
            with self.lora.beside(name, self.dtype):
                return computed(x, taught)

        with torch.no_grad():
            y = forward(x)
            for aside in apart:
                self._apart = computed(self._apart, aside)
        self.visits.append(_Visit(x, forward))
        if len(self.visits) < len(self.names):
            return y
        self.last = y.requires_grad_()
        return torch.cat([self.last, self._apart])


_Part = tuple[Any, list[int], Tensor]  # what a block takes beside x, of some pictures


def _of_all(vectors: Tensor, lengths: Sequence[int]) -> Tensor:
    """[4, dim] as it is, or [4, pictures, dim] -> [4, tokens, dim]."""
    return of_tokens(vectors, lengths) if vectors.ndim == 3 else vectors


def _parted(rope: Any, lengths: list[int], vectors: Tensor, count: int) -> list[_Part]:
    """Of the first `count` pictures, and of the others if there are any."""
    if count == len(lengths):
        return [(rope, lengths, vectors)]
    tokens = sum(lengths[:count])
    cuts = (slice(tokens), slice(count)), (slice(tokens, None), slice(count, None))
    return [(tuple(part[own] for part in rope), lengths[pictures], vectors[:, pictures]) for own, pictures in cuts]


def gradients(model: Transformer, lora: TrainedLora, batch: Batch, dtype: torch.dtype, stream: Stream) -> float:
    """Add the loss's to the LoRA's parameters. stream: is asked for the blocks of one pass forwards, and for the layers
    once more backwards. Returns the loss."""
    recorder, asked = _Recorder(model, lora, dtype, stream, batch.preserved), batch.asked
    answers = model(asked.noisy(dtype), list(asked.captions), asked.modulation, recorder)
    loss = batch.loss(answers)
    loss.backward()
    del answers
    visits, grad = recorder.visits, recorder.last.grad
    for _ in stream(list(model.layers)[::-1]):
        visit = visits.pop()
        x = visit.x.detach().requires_grad_(bool(visits))  # no gradient goes further back than the first layer
        visit.forward(x).backward(grad)
        grad = x.grad
    return loss.item()

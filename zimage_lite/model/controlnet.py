"""ControlNet of the Fun Union family: blocks beside the transformer's that also see a picture, as their authors
(VideoX-Fun) run them.

    latents of the picture -> patches -> embed, pad -> refiner -> [., caption] -> control layers
                                                          |                             |
                                            after blocks of noise_refiner      after the layers at `places`

Block k makes a state c of the state before, and of c a hint, which is added to the residual stream of the transformer
after the block at place k, on image and caption alike. The stream itself is seen once, by the first block of each list:

    c = before_proj(c) + x;  c = block_0(c);  hint_0 = after_proj(c);  c = block_1(c);  hint_1 = after_proj(c);  ...

So hints can be made in order, each right before the block that it follows, and one tensor waits at a time. 1.0 has a
refiner of plain blocks, which neither see the stream nor give hints; 2.0 none of its own: the control layers run twice.

Times, captions, positions and pad tokens are the transformer's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..config import PATCH_SIZE, ControlConfig
from .compute import REFERENCE, Compute
from .linear import Linear, Stream
from .rope import Rope
from .transformer import Beside, Block, Caption, interleaved, pad, patchify, residual


class ControlBlock(Block):
    """A block whose output is also projected to a hint; the first of a list takes in the stream."""

    def __init__(self, config: ControlConfig, first: bool) -> None:
        super().__init__(config)
        self.before_proj = Linear(config.dim, config.dim, bias=True) if first else None
        self.after_proj = Linear(config.dim, config.dim, bias=True)

    def entered(self, c: Tensor, x: Tensor, compute: Compute) -> Tensor:
        """c, x: [tokens, dim], the state and the residual stream -> what the first block gets."""
        assert self.before_proj is not None
        return _projected(c, self.before_proj, compute).add_(x)

    def hint(self, c: Tensor, compute: Compute) -> Tensor:
        """c: [tokens, dim], the block's output -> the same shape and dtype."""
        return _projected(c, self.after_proj, compute)


def _projected(c: Tensor, linear: Linear, compute: Compute) -> Tensor:
    """[tokens, dim] in the dtype of the residual stream, in which it is multiplied unless the weight is int8: beside
    float16 that is float32, for no norm stands between the stream and these linears, and it leaves float16's range."""
    return linear(compute.accepted(c, linear), 0, compute.backend, c.dtype)


@dataclass(frozen=True)
class ControlModulation:
    """What a step of that time does to the blocks: [blocks, 4, dim] each, see `Block.modulation`."""

    refiner: Tensor
    layers: Tensor

    def to(self, device: torch.device) -> ControlModulation:
        return ControlModulation(self.refiner.to(device), self.layers.to(device))


class ControlNet(nn.Module):
    """The skeleton, under its authors' names. compute: of its blocks."""

    def __init__(self, config: ControlConfig, compute: Compute = REFERENCE) -> None:
        super().__init__()
        self.config, self.compute = config, compute
        embedder = Linear(config.patch_dim, config.dim, bias=True)
        self.control_all_x_embedder = nn.ModuleDict({f"{PATCH_SIZE}-1": embedder})
        self.control_noise_refiner = nn.ModuleList(_own_refiner(config))
        self.control_layers = nn.ModuleList(
            ControlBlock(config, k == 0) for k in range(len(config.control_layers_places))
        )

    @property
    def refiner(self) -> nn.ModuleList:
        """What the image tokens pass before captions join them."""
        borrows = self.config.add_control_noise_refiner == "control_layers"
        return self.control_layers if borrows else self.control_noise_refiner

    @property
    def refiner_places(self) -> tuple[int, ...]:
        """Blocks of the noise refiner after which hints are added."""
        gives = self.config.add_control_noise_refiner is not None
        return self.config.control_refiner_layers_places if gives else ()

    def modulations(self, condition: Tensor, dtype: torch.dtype, stream: Stream = iter) -> list[ControlModulation]:
        """condition: [T, conditioning_dim] float32, of the transformer. As `Transformer.modulations`: one for each
        time, computed in float32, with nothing but the time weights."""
        own = len(self.control_noise_refiner)
        blocks = stream([*self.control_noise_refiner, *self.control_layers])
        vectors = torch.stack([block.modulation(condition).to(dtype) for block in blocks], dim=1)  # type: ignore[operator]
        refiner, layers = vectors[:, :own] if own else vectors, vectors[:, own:]
        return [ControlModulation(*step) for step in zip(refiner, layers, strict=True)]

    def embedded(self, contexts: Sequence[Tensor], pad_token: Tensor) -> Tensor:
        """contexts: [control_in_dim, height, width] each -> [tokens, dim], like the residual stream of the images."""
        (embed,) = self.control_all_x_embedder.values()
        return residual([pad(embed(patchify(context)), pad_token) for context in contexts])


def _own_refiner(config: ControlConfig) -> Iterator[Block]:
    if config.add_control_noise_refiner == "control_layers":
        return
    for k in range(config.n_refiner_layers):
        yield Block(config) if config.add_control_noise_refiner is None else ControlBlock(config, k == 0)


@dataclass(kw_only=True)
class Control(Beside):
    """What a ControlNet adds in one evaluation of the transformer.

    contexts: the latents that it sees, [control_in_dim, height, width] for each sequence of the evaluation, in the
    compute dtype; captions: of each; pad_token: the transformer's x_pad_token; scale: of hints.
    """

    net: ControlNet
    contexts: Sequence[Tensor]
    captions: Sequence[Caption]
    modulation: ControlModulation
    pad_token: Tensor
    scale: float = 1.0
    _state: Tensor = field(init=False, repr=False)
    _images: list[int] = field(init=False)  # lengths of the images among the tokens
    _hint: Tensor | None = field(default=None, init=False, repr=False)

    def along(self, group: str, x: Tensor, rope: Rope, lengths: list[int], stream: Stream) -> Stream:
        net, modulation = self.net, self.modulation
        if group == "noise_refiner":
            self._state, self._images = net.embedded(self.contexts, self.pad_token), lengths
            return self._between(net.refiner, net.refiner_places, modulation.refiner, x, rope, lengths, stream)
        self._state, places = self._captioned(self._state), net.config.control_layers_places
        return self._between(net.control_layers, places, modulation.layers, x, rope, lengths, stream)

    def added(self, x: Tensor) -> Tensor:
        hint, self._hint = self._hint, None
        return x if hint is None else x.add_(hint, alpha=self.scale)

    def _captioned(self, x: Tensor) -> Tensor:
        return interleaved(x.split(self._images), [caption.tokens for caption in self.captions])

    def _between(
        self, own: nn.ModuleList, places: Sequence[int], modulation: Tensor, x: Tensor, rope: Rope, lengths: list[int],
        stream: Stream,
    ) -> Stream:  # fmt: skip
        """The ControlNet's blocks run between those that it brings."""
        vectors, hinting = dict(zip(own, modulation, strict=True)), set(own[: len(places)])
        seen = [x]  # until the first block has seen it

        def brought(blocks: Iterable[nn.Module]) -> Iterator[nn.Module]:
            for block in stream(_merged(blocks, own, places)):
                if block not in vectors:
                    yield block
                    continue
                assert isinstance(block, Block)
                if isinstance(block, ControlBlock) and block.before_proj is not None:
                    self._state = block.entered(self._state, seen.pop(), self.net.compute)
                self._state = block(self._state, rope, lengths, vectors[block], self.net.compute)
                if isinstance(block, ControlBlock) and block in hinting:
                    self._hint = block.hint(self._state, self.net.compute)

        return brought


@dataclass(kw_only=True)
class DiffusersControl(Control):
    """The same as diffusers 0.42.1 has it, to compare with: hints of the refiner reach a copy of the stream
    alone, which the control layers then see instead of the stream. Costs the noise refiner once more.

    refiner: the transformer's `Modulation.noise_refiner`."""

    refiner: Tensor
    _copy: Tensor = field(init=False, repr=False)

    def along(self, group: str, x: Tensor, rope: Rope, lengths: list[int], stream: Stream) -> Stream:
        if group == "layers":
            return super().along(group, self._captioned(self._copy), rope, lengths, stream)
        self._copy, brought = x, super().along(group, x, rope, lengths, stream)

        def copied(blocks: Iterable[nn.Module]) -> Iterator[nn.Module]:
            for block, vectors in zip(brought(blocks), self.refiner, strict=True):
                self._copy = self.added(block(self._copy, rope, lengths, vectors, self.net.compute))
                yield block

        return copied


def _merged(blocks: Iterable[nn.Module], own: Iterable[nn.Module], places: Sequence[int]) -> Iterator[nn.Module]:
    """Each of `own` in front of the block at its place; those without a place at the end."""
    left = iter(own)
    for place, block in enumerate(blocks):
        if place in places:
            yield next(left)
        yield block
    yield from left

"""ControlNet of the Fun Union family: blocks beside the transformer's that also see a picture, as their authors
(VideoX-Fun) run them.

    latents of the picture -> patches -> embed, pad -> refiner -> [., caption] -> control layers
                                                          |                             |
                                            after blocks of noise_refiner      after the layers at `places`

Block k makes a state c of the state before, and of c a hint, which is added to the residual stream of the transformer
after the block at place k, on image and caption alike. The stream itself is seen once, by the first block of each list:

    c = before_proj(c) + x;  c = block_0(c);  hint_0 = after_proj(c);  c = block_1(c);  hint_1 = after_proj(c);  ...

So hints can be made in order, each right before the block that it follows, and one tensor waits at a time. 1.0 has a
refiner of plain blocks, which neither see the stream nor give hints; 2.0 none of its own: the control layers run twice,
and are drawn with as `unrolled` has them.

Times, captions, positions and pad tokens are the transformer's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..config import PATCH_SIZE, ControlConfig, TransformerConfig
from .compute import REFERENCE, Compute
from .linear import Linear, Stream
from .rope import Rope
from .tokens import interleaved, pad, patchify, residual
from .transformer import Beside, Block, Caption, Transformer

_Block = TypeVar("_Block")
CONTROLS = "controls"  # of `ControlledTransformer`: where its ControlNets are
_REFINER, _LAYERS = "control_noise_refiner", "control_layers"


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
    """The skeleton, under its authors' names. compute: of its blocks. One of 2.0 is drawn with as `unrolled` has it."""

    def __init__(self, config: ControlConfig, compute: Compute = REFERENCE) -> None:
        super().__init__()
        self.config, self.compute = config, compute
        embedder = Linear(config.patch_dim, config.dim, bias=True)
        self.control_all_x_embedder = nn.ModuleDict({f"{PATCH_SIZE}-1": embedder})
        self.control_noise_refiner = nn.ModuleList(_own_refiner(config))
        self.control_layers = nn.ModuleList(
            ControlBlock(config, k == 0) for k in range(len(config.control_layers_places))
        )

    def modulations(self, condition: Tensor, dtype: torch.dtype, stream: Stream = iter) -> list[ControlModulation]:
        """condition: [T, conditioning_dim] float32, of the transformer. As `Transformer.modulations`: one for each
        time, computed in float32, with nothing but the time weights."""
        blocks = stream([*self.control_noise_refiner, *self.control_layers])
        vectors = torch.stack([block.modulation(condition).to(dtype) for block in blocks], dim=1)  # type: ignore[operator]
        refiner, layers = vectors.split((len(self.control_noise_refiner), len(self.control_layers)), dim=1)
        return [ControlModulation(*step) for step in zip(refiner, layers, strict=True)]

    def embedded(self, contexts: Sequence[Tensor], pad_token: Tensor) -> Tensor:
        """contexts: [control_in_dim, height, width] each -> [tokens, dim], like the residual stream of the images."""
        (embed,) = self.control_all_x_embedder.values()
        return residual([pad(embed(patchify(context)), pad_token) for context in contexts])


def _own_refiner(config: ControlConfig) -> Iterator[Block]:
    if config.add_control_noise_refiner == _LAYERS:
        return
    for k in range(config.n_refiner_layers):
        yield Block(config) if config.add_control_noise_refiner is None else ControlBlock(config, k == 0)


def unrolled(config: ControlConfig) -> ControlConfig:
    """2.0, whose control layers run twice, as 2.1 with a refiner of as many blocks, the first of which give hints: so
    each block is visited once in a pass."""
    if config.add_control_noise_refiner != _LAYERS:
        return config
    return replace(config, add_control_noise_refiner=_REFINER, n_refiner_layers=len(config.control_layers_places))


def unrolled_weights(config: ControlConfig, tensors: Mapping[str, _Block]) -> dict[str, _Block]:
    """tensors: of a file, by their names -> those of the unrolled skeleton. The refiner of 2.0 are the file's control
    layers by a second name: one that stays in memory takes its place twice, and one that streams comes twice. That is
    2.0's price; 2.1 has replaced it."""
    if config.add_control_noise_refiner != _LAYERS:
        return dict(tensors)
    again = {name.replace(_LAYERS, _REFINER): tensor for name, tensor in tensors.items() if name.startswith(_LAYERS)}
    return {**tensors, **again}


class ControlledTransformer(Transformer):
    """A transformer with ControlNets beside it, as `controls.0` and on. configs: unrolled."""

    def __init__(
        self, config: TransformerConfig, configs: Iterable[ControlConfig], compute: Compute = REFERENCE
    ) -> None:
        super().__init__(config, compute)
        self.controls = nn.ModuleList(ControlNet(own, compute) for own in configs)


def control_lists(count: int) -> tuple[str, ...]:
    """Names of the lists of blocks that so many ControlNets have in a `ControlledTransformer`."""
    return tuple(f"{CONTROLS}.{i}.{own}" for i in range(count) for own in (_REFINER, _LAYERS))


def visits(group: str, blocks: Iterable[str], configs: Sequence[ControlConfig]) -> Iterator[str]:
    """The names of a group of the transformer's blocks ("noise_refiner" or "layers") with those beside them, in the
    order of a pass. configs: unrolled."""
    return merged(blocks, [_beside(group, i, config) for i, config in enumerate(configs)])


def _beside(group: str, number: int, config: ControlConfig) -> tuple[list[str], Sequence[int]]:
    refines = group == "noise_refiner"
    own, places = (_REFINER, refiner_places(config)) if refines else (_LAYERS, config.control_layers_places)
    count = config.n_refiner_layers if refines else len(places)
    return [f"{CONTROLS}.{number}.{own}.{i}" for i in range(count)], places


def refiner_places(config: ControlConfig) -> tuple[int, ...]:
    """Blocks of the noise refiner after which hints are added."""
    return () if config.add_control_noise_refiner is None else config.control_refiner_layers_places


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
        return _between([self.entered(group, x, rope, lengths)], stream)

    def entered(self, group: str, x: Tensor, rope: Rope, lengths: list[int]) -> _Passage:
        """What it runs beside a group of the transformer's blocks. x: as of `along`."""
        net, modulation = self.net, self.modulation
        if group == "noise_refiner":
            self._state, self._images = net.embedded(self.contexts, self.pad_token), lengths
            places = refiner_places(net.config)
            return _Passage(self, net.control_noise_refiner, places, modulation.refiner, rope, lengths, [x])
        self._state, places = self._captioned(self._state), net.config.control_layers_places
        return _Passage(self, net.control_layers, places, modulation.layers, rope, lengths, [x])

    def added(self, x: Tensor) -> Tensor:
        hint, self._hint = self._hint, None
        return x if hint is None else x.add_(hint, alpha=self.scale)

    def _captioned(self, x: Tensor) -> Tensor:
        return interleaved(x.split(self._images), [caption.tokens for caption in self.captions])

    def run(self, block: Block, passage: _Passage) -> None:
        """One of its blocks, which is there."""
        if isinstance(block, ControlBlock) and block.before_proj is not None:
            self._state = block.entered(self._state, passage.seen.pop(), self.net.compute)
        vectors = passage.vectors[block]
        self._state = block(self._state, passage.rope, passage.lengths, vectors, self.net.compute)
        if isinstance(block, ControlBlock) and block in passage.hinting:
            self._hint = block.hint(self._state, self.net.compute)


class _Passage:
    """A ControlNet's blocks beside a group of the transformer's. seen: the residual stream, until the first block has
    seen it."""

    def __init__(
        self, control: Control, own: nn.ModuleList, places: Sequence[int], modulation: Tensor, rope: Rope,
        lengths: list[int], seen: list[Tensor],
    ) -> None:  # fmt: skip
        self.control, self.own, self.places = control, own, places
        self.rope, self.lengths, self.seen = rope, lengths, seen
        self.vectors, self.hinting = dict(zip(own, modulation, strict=True)), set(own[: len(places)])


def _between(passages: Sequence[_Passage], stream: Stream) -> Stream:
    """The ControlNets' blocks run between those that it brings."""
    owners = {block: passage for passage in passages for block in passage.own}

    def brought(blocks: Iterable[nn.Module]) -> Iterator[nn.Module]:
        for block in stream(merged(blocks, [(passage.own, passage.places) for passage in passages])):
            if block not in owners:
                yield block
                continue
            assert isinstance(block, Block)
            owners[block].control.run(block, owners[block])

    return brought


@dataclass(frozen=True)
class Several(Beside):
    """ControlNets in a row: each sees the stream as it is, and all of their hints are added."""

    controls: Sequence[Control]

    def along(self, group: str, x: Tensor, rope: Rope, lengths: list[int], stream: Stream) -> Stream:
        return _between([control.entered(group, x, rope, lengths) for control in self.controls], stream)

    def added(self, x: Tensor) -> Tensor:
        for control in self.controls:
            x = control.added(x)
        return x


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


def merged(blocks: Iterable[_Block], beside: Sequence[tuple[Iterable[_Block], Sequence[int]]]) -> Iterator[_Block]:
    """Each of those beside them in front of the block at its place; those without a place at the end."""
    left = [(iter(own), places) for own, places in beside]
    for place, block in enumerate(blocks):
        for own, places in left:
            if place in places:
                yield next(own)
        yield block
    for own, _ in left:
        yield from own

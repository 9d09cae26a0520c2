"""The transformer as a function: one evaluation at a time, for programs that have a loop of their own.

Between evaluations its weights stay as planned: those that stay on the device lie there, and the first of the others
are on their way already. They are planned for and opened again when something else is asked for: another size, more
latents, other adapters or ControlNets, or a prompt that is not refined yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from ..adapters.joined import NOTHING, AdapterSet
from ..config import VAE_FACTOR
from ..errors import UserError
from ..memory.failures import Clearing
from ..memory.plan import Plan
from ..model.controlnet import ControlModulation
from ..model.linear import Stream
from ..model.transformer import Caption, Modulation, Transformer
from ..plan.job import Job, batched, padded
from ..plan.retry import Ways
from .controls import UNCONTROLLED, ControlSet
from .finite import all_finite, overflow, raise_if_damaged
from .steps import KnownRopes, beside, modulations
from .weights import Weights

if TYPE_CHECKING:
    from .drawing import Pipeline

_CAPTIONS = 8  # refined prompts are kept, at most, if no more are asked for at once
_PASSES = 64  # over the weights are planned ahead at a time


@dataclass(frozen=True, eq=False)
class Asked:
    """An evaluation of the transformer. latents: [channels, height, width] each, of one size; times: 1 - sigma of each;
    features: what the text encoder gave for each, [tokens, width]; adapters, controls: what goes along; contexts: by
    each ControlNet, what it sees of each latent, [channels, height, width]."""

    latents: Sequence[Tensor]
    times: Sequence[float]
    features: Sequence[Tensor]
    adapters: AdapterSet = NOTHING
    controls: ControlSet = UNCONTROLLED
    contexts: Sequence[Sequence[Tensor]] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        shapes = {tuple(latent.shape) for latent in self.latents}
        if len(shapes) != 1:
            raise UserError("latents of one evaluation", got=sorted(shapes), expected="one size")
        return shapes.pop()

    def goes_with(self, other: Asked) -> bool:
        """Whether the same goes along with both."""
        return self.adapters is other.adapters and self.controls == other.controls

    def batches(self, most: int) -> Iterator[tuple[float, list[int]]]:
        """A time, and the places of at most so many latents that are evaluated at it together."""
        for time, alike in groupby(range(len(self.latents)), lambda place: self.times[place]):
            places = list(alike)
            for start in range(0, len(places), most):
                yield time, places[start : start + most]


@dataclass
class _Open:
    """Weights that lie as planned. asked: what they were opened for; stack: closes them."""

    asked: Asked
    plan: Plan
    weights: Weights
    stack: ExitStack
    _passes: ExitStack = field(default_factory=ExitStack)
    _stream: Stream | None = None
    _left: int = 0

    def stream(self) -> Stream:
        """For the next pass over the blocks."""
        if self._stream is None or not self._left:
            self._passes.close()
            self._stream, self._left = self._passes.enter_context(self.weights.passes(_PASSES)), _PASSES
        self._left -= 1
        return self._stream

    def close(self) -> None:
        with self.stack:
            self._passes.close()


class Denoiser:
    """ahead: the times that evaluations will ask for, as far as they are known. What the model takes of these is
    computed at once, from weights (2 % of all) that are else read for each new time."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.work = pipeline.work
        self.phase, self._clock = pipeline.denoising.twin(), pipeline.denoising.twin()
        self.ahead: Callable[[], Iterable[float]] = tuple
        self._last: Asked | None = None
        self._ways: Ways | None = None
        self._open: _Open | None = None
        self._captions: list[tuple[Tensor, Caption]] = []  # with the features that they are of
        self._times: dict[float, tuple[Modulation, list[ControlModulation]]] = {}
        self._ropes = KnownRopes()

    @torch.no_grad()
    def __call__(self, asked: Asked) -> list[Tensor]:
        """-> data - noise, in the shapes of the latents and the compute dtype, on the device. Raises UserError,
        BudgetError if it does not fit."""
        with Clearing(self.close):
            if self._ways is None or not self._serves(asked):
                self._plan(asked)
            assert self._ways is not None
            with closing(self.work.planning.within(self._ways, partial(self._run, asked))) as found:
                return next(found)

    def close(self) -> None:
        """Give all memory back."""
        self._leave()
        self._last, self._ways, self._captions, self._times = None, None, [], {}
        self.phase.release()
        self.work.give_back()

    def _leave(self) -> None:
        opened, self._open = self._open, None
        if opened:
            opened.close()

    def _serves(self, asked: Asked) -> bool:
        """Whether what is planned does for this."""
        last = self._last
        if last is None or asked.shape != last.shape or not asked.goes_with(last):
            return False
        return len(asked.latents) <= len(last.latents) and all(map(self._caption, asked.features))

    def _plan(self, asked: Asked) -> None:
        """Raises BudgetError."""
        self._leave()
        if self._last is None or not asked.goes_with(self._last):
            self._captions, self._times = [], {}
        self._last, self._ways = asked, None
        self._captions.sort(key=lambda known: any(_equal(known[0], own) for own in asked.features))
        del self._captions[: -max(_CAPTIONS, len(asked.features))]  # those that are asked for stay
        (self._ways,) = self.work.planning.planned([self.phase.ways(self._job(asked))])

    def _job(self, asked: Asked) -> Job:
        _, height, width = asked.shape
        prompts = [features for features, _ in self._captions] + self._unknown(asked)
        return Job(
            width * VAE_FACTOR, height * VAE_FACTOR, steps=max(len(list(self.ahead())), 1),
            images=max(len(asked.latents), len(prompts)), shares=(len(asked.latents),),
            prompt_tokens=tuple(map(len, prompts)), adapters=(asked.adapters,), controls=asked.controls.sizes,
            contexts=sum(len(context) for of_net in asked.contexts for context in of_net),
        )  # fmt: skip

    def _run(self, asked: Asked, done: int, plan: Plan) -> Iterator[list[Tensor]]:
        try:
            if self._open is None:
                self._open = self._opened(asked, plan)
            found = self._evaluated(asked, self._open)
        except BaseException:
            self._leave()  # before it is planned again
            raise
        yield found

    def _opened(self, asked: Asked, plan: Plan) -> _Open:
        self._know(asked, plan)
        component = replace(self.phase.whole(asked.controls), adapters=asked.adapters)
        with ExitStack() as stack:
            weights = stack.enter_context(self.work.open(component, plan))
            if unknown := self._unknown(asked):  # before the blocks: refining takes the place of what stays then
                self._refine(unknown, weights)
            return _Open(asked, plan, weights, stack.pop_all())

    def _evaluated(self, asked: Asked, opened: _Open) -> list[Tensor]:
        self._know(asked, opened.plan)
        found: dict[int, Tensor] = {}
        for time, places in asked.batches(opened.plan.way):
            found.update(zip(places, self._together(asked, time, places, opened), strict=True))
        outputs = [found[place] for place in range(len(asked.latents))]
        if not all_finite(outputs):
            for checkpoint in (self.phase.model.transformer, *(net.checkpoint for net in asked.controls.nets)):
                raise_if_damaged(checkpoint)
            raise overflow("the transformer's answer has", opened.weights.hardware.dtype)
        return outputs

    def _together(self, asked: Asked, time: float, places: Sequence[int], opened: _Open) -> list[Tensor]:
        model, there = cast(Transformer, opened.weights.component.model), opened.weights.hardware
        modulation, of_nets = self._times[time]
        latents = [asked.latents[place].to(there.device, there.dtype) for place in places]
        captions = [cast(Caption, self._caption(asked.features[place])) for place in places]
        controls = None
        if asked.controls:
            seen = [[own[place].to(there.device, there.dtype) for place in places] for own in asked.contexts]
            controls = beside(model, asked.controls, captions, seen, modulation, of_nets)
        ropes = self._ropes.of(model, latents, captions)
        return model(latents, captions, modulation, opened.stream(), ropes=ropes, beside=controls)

    def _know(self, asked: Asked, plan: Plan) -> None:
        """What the model takes of these times. On its own skeleton: the other may be bound."""
        if self._times.keys() >= set(asked.times):
            return
        ahead = list(dict.fromkeys(self.ahead()))
        times = ahead if set(ahead) >= set(asked.times) else list(dict.fromkeys(asked.times))
        component = replace(self._clock.whole(asked.controls), adapters=asked.adapters)
        found, controls = modulations(component, torch.tensor(times), self.work.hardware_of(plan))
        of_nets = [[own[i] for own in controls] for i in range(len(times))]
        self._times = dict(zip(times, zip(found, of_nets, strict=True), strict=True))

    def _refine(self, features: Sequence[Tensor], weights: Weights) -> None:
        batches, model = batched(features, lambda own: padded(len(own))), cast(Transformer, weights.component.model)
        with weights.prelude(len(batches)) as stream:
            for batch in batches:
                refined = model.refine_captions([own.to(weights.hardware.device) for own in batch], stream)
                self._captions += zip((own.clone() for own in batch), refined, strict=True)

    def _unknown(self, asked: Asked) -> list[Tensor]:
        """Features that are not refined, each once."""
        found: list[Tensor] = []
        for own in asked.features:
            if not self._caption(own) and not any(_equal(own, other) for other in found):
                found.append(own)
        return found

    def _caption(self, features: Tensor) -> Caption | None:
        """By the values: callers change tensors in place."""
        return next((caption for own, caption in self._captions if _equal(own, features)), None)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b.to(a.device, a.dtype))

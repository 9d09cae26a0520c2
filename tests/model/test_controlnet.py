"""ControlNets of every version against diffusers: as it is, and with hooks that do to it what the authors do."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from controls import KINDS, as_authors, config_of, diffusers_answer, make_control, our_answer, ours, their_weights
from oracles import bound, relative_error, transformer_inputs
from torch import Tensor

from zimage_lite.checkpoint.checkpoint import open_checkpoint
from zimage_lite.model import linear
from zimage_lite.model.compute import Compute
from zimage_lite.model.controlnet import ControlBlock, ControlNet, merged
from zimage_lite.model.linear import shapes
from zimage_lite.model.transformer import Transformer

# Height and width of latents, lengths of captions. The first needs pad tokens, the second none; two captions are the
# sides of guidance.
CASES = {"padded": (26, 42, (9,)), "whole": (16, 24, (40,)), "guided": (26, 42, (9, 40))}


@pytest.fixture(scope="module")
def model(diffusers_folder: Path) -> Transformer:
    folder = diffusers_folder / "transformer"
    found = bound(Transformer(open_checkpoint(folder).config), folder)
    assert isinstance(found, Transformer)
    return found


def inputs(version: str, case: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Latents, features and what the ControlNet sees: the same on both sides of guidance."""
    height, width, tokens = CASES[case]
    latents, features, _ = transformer_inputs(height, width, tokens)
    context = torch.randn(KINDS[version]["control_in_dim"], height, width)
    return [latents[0]] * len(tokens), features, [context] * len(tokens)


@pytest.mark.parametrize("version", KINDS)
def test_its_names_and_shapes_are_diffusers(diffusers_pipeline: Any, version: str) -> None:
    weights = their_weights(make_control(diffusers_pipeline.transformer, version))
    wanted = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    assert shapes(ControlNet(config_of(version))) == wanted


@pytest.mark.parametrize(
    "case",
    ["padded", pytest.param("whole", marks=pytest.mark.full_size), pytest.param("guided", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("version", KINDS)
def test_it_is_diffusers(diffusers_pipeline: Any, model: Transformer, version: str, case: str) -> None:
    """1e-5: both compute in float32, in another order."""
    theirs, given = make_control(diffusers_pipeline.transformer, version), inputs(version, case)
    net = ours(version, their_weights(theirs))
    plain = diffusers_answer(diffusers_pipeline.transformer, theirs, *given)
    with as_authors(diffusers_pipeline.transformer, theirs):
        hooked = diffusers_answer(diffusers_pipeline.transformer, theirs, *given)
    for math, wanted in (("diffusers", plain), ("authors", hooked)):
        for own, truth in zip(our_answer(model, net, *given, math), wanted, strict=True):
            assert relative_error(own, truth) <= 1e-5, math
    differs = relative_error(hooked[0], plain[0]) > 1e-2
    assert differs == (version != "1.0")  # whose refiner gives no hints
    assert relative_error(our_answer(model, None, *given)[0], hooked[0]) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("version", KINDS)
def test_a_control_that_adds_nothing_changes_no_bit(diffusers_pipeline: Any, model: Transformer, version: str) -> None:
    weights, given = their_weights(make_control(diffusers_pipeline.transformer, version)), inputs(version, "guided")
    zeroed = {name: tensor * (".after_proj." not in name) for name, tensor in weights.items()}
    without = our_answer(model, None, *given)
    assert all(map(torch.equal, our_answer(model, ours(version, zeroed), *given), without))
    assert all(map(torch.equal, our_answer(model, ours(version, weights), *given, scale=0.0), without))


REFINER = ["noise_refiner.0", "noise_refiner.1"]
LAYERS = ["layers.0", "layers.1", "layers.2"]
VISITS = {
    "1.0": [
        *REFINER, "control_noise_refiner.0", "control_noise_refiner.1",
        "control_layers.0", "layers.0", "layers.1", "control_layers.1", "layers.2",
    ],
    "2.0": [
        "control_noise_refiner.0", "noise_refiner.0", "control_noise_refiner.1", "noise_refiner.1",
        "control_noise_refiner.2",
        "control_layers.0", "layers.0", "control_layers.1", "layers.1", "control_layers.2", "layers.2",
    ],
    "2.1": [
        "control_noise_refiner.0", "noise_refiner.0", "control_noise_refiner.1", "noise_refiner.1",
        "control_layers.0", "layers.0", "control_layers.1", "layers.1", "layers.2",
    ],
    "2.1 lite": [
        "control_noise_refiner.0", "noise_refiner.0", "control_noise_refiner.1", "noise_refiner.1",
        "control_layers.0", *LAYERS,
    ],
}  # fmt: skip


@pytest.mark.parametrize("version", KINDS)
def test_one_block_computes_and_one_hint_waits_at_a_time(
    diffusers_pipeline: Any, model: Transformer, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an order that one streamer can serve: the last block may go when the next is asked for."""
    net = ours(version, their_weights(make_control(diffusers_pipeline.transformer, version)))
    names = {block: name for own in (model, net) for name, block in own.named_modules()}
    visits, here, hints = list[str](), set[Any](), list[weakref.ref[Tensor]]()

    def stream(blocks: Iterable[Any]) -> Iterator[Any]:
        for block in blocks:
            visits.append(names[block])
            here.add(block)
            yield block
            here.remove(block)

    def present(block: Any, *given: Any) -> None:
        assert here == {block}

    def hint(block: ControlBlock, *given: Any, make: Any = ControlBlock.hint) -> Tensor:
        assert not any(waiting() is not None for waiting in hints)
        hints.append(weakref.ref(made := make(block, *given)))
        return made

    monkeypatch.setattr(ControlBlock, "hint", hint)
    blocks = [*model.noise_refiner, *model.layers, *net.control_noise_refiner, *net.control_layers]
    hooks = [block.register_forward_pre_hook(present) for block in blocks]
    our_answer(model, net, *inputs(version, "padded"), stream=stream)
    for hook in hooks:
        hook.remove()
    assert visits == VISITS[version] and not here
    assert len(hints) == len(KINDS[version]["control_layers_places"]) + 2 * (version != "1.0")


def test_several_are_merged_by_places() -> None:
    beside = [(["a0", "a1", "a2"], (0, 2)), (["b0", "b1"], (0, 1))]
    assert "".join(merged("012", beside)) == "".join(["a0", "b0", "0", "b1", "1", "a1", "2", "a2"])


@pytest.mark.slow
def test_a_state_beyond_float16_is_no_harm(
    diffusers_pipeline: Any, diffusers_folder: Path, model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No norm stands in front of after_proj, which reads the state as it is. A tolerance as in test_float16: the ten
    sublayers of the transformer and the eight of the ControlNet round a hundred and eighty times, which makes 13."""
    weights = their_weights(make_control(diffusers_pipeline.transformer, "2.1"))
    for name in weights:
        if name.startswith("control_layers.0.ffn_norm2"):
            weights[name] = weights[name] * 4e4
        elif name == "control_layers.0.after_proj.weight":
            weights[name] = weights[name] / 4e4
    given, largest = inputs("2.1", "padded"), list[float]()

    def hint(block: ControlBlock, c: Tensor, *rest: Any, make: Any = ControlBlock.hint) -> Tensor:
        largest.append(float(c.abs().max()))
        return make(block, c, *rest)

    monkeypatch.setattr(ControlBlock, "hint", hint)
    (truth,) = our_answer(model, ours("2.1", weights), *given)
    folder, half = diffusers_folder / "transformer", torch.float16
    halved = bound(Transformer(model.config), folder, half)
    assert isinstance(halved, Transformer)
    latents, features, contexts = ([tensor.half() for tensor in some] for some in given)
    (found,) = our_answer(halved, ours("2.1", weights, half), latents, [f.float() for f in features], contexts)
    assert max(largest) > 65504
    assert relative_error(found, truth) <= 13 * 2**-11


def test_blocks_compute_in_8_bits(diffusers_pipeline: Any, model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The projections, too. A row of 256 normal values reaches 3 deviations, so a rounding to 127 steps is wrong by
    3 / 127 / sqrt(12) = 0.7 % of one; ten products in a row, each of what the one before left, make 2 %."""
    weights, given = their_weights(make_control(diffusers_pipeline.transformer, "2.1")), inputs("2.1", "padded")
    calls = list[int]()

    def counted(*given: Any, make: Any = linear.linear_int8) -> Tensor:
        calls.append(len(given[0]))
        return make(*given)

    monkeypatch.setattr(linear, "linear_int8", counted)
    (truth,) = our_answer(model, ours("2.1", weights, form="int8"), *given)
    assert not calls
    (found,) = our_answer(model, ours("2.1", weights, form="int8", compute=Compute(int8=True)), *given)
    # q, k, v, out and after_proj of four blocks, before_proj of two; w1 and w3 are fused, w2's rows of 682 stay plain.
    assert len(calls) == 4 * (4 + 1) + 2
    assert 0 < relative_error(found, truth) <= 0.02

"""What of requests is not followed, or probably meant otherwise: a line for each kind. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from ..adapters.known import unlike
from ..checkpoint.model_files import ModelFiles
from ..config import MAX_PROMPT_TOKENS, GenerateOptions, SchedulerConfig
from .words import texts

_PLAIN = GenerateOptions()
_OF_CONTROLS = ("control_from", "control_start", "control_end", "control_math")
_ENDING = 40  # characters of the prompt's last words that are used

# What other programs read in a prompt. Here, as in diffusers, all of it is text to the encoder.
_MARKUP: tuple[tuple[str, str], ...] = (
    (
        r"<(?:lora|lyco|hypernet):[^<>]*>",
        "is read as text: LoRAs are named by --lora, or in prompts beside --lora-dir",
    ),
    # A time, a ratio, a verse have digits before the colon, or two after it.
    (
        r"\([^()]*[^():\d\s]\s*:\s*-?(?:\d?\.\d+|\d)\s*\)",
        "is read as text: weights of words have no effect on this model's encoder",
    ),
    (r"\bBREAK\b", "is read as text: the prompt is one sequence"),
    (r"\bembedding:\S+", "is read as text: there are no textual inversions for this encoder"),
)


def advice(requests: Sequence[GenerateOptions], model: ModelFiles) -> Iterator[str]:
    """requests: complete. Each kind once, however many requests there are."""
    prompts = list(dict.fromkeys(text for request in requests for text in texts(request)))
    yield from _cut(prompts, model.tokenizer.cut)
    yield from _markup(prompts)
    if any(request.negative and not request.guidance for request in requests):
        yield "--negative has no effect without --guidance"
    if not any(request.controls for request in requests):
        for name in _OF_CONTROLS:
            if any(getattr(request, name) != getattr(_PLAIN, name) for request in requests):
                yield f"--{name.replace('_', '-')} has no effect without --control"
    found = (unlike(lora, request) for request in requests for lora in request.loras)
    yield from dict.fromkeys(line for line in found if line)
    settings = dict.fromkeys((request.step_count, request.guidance or 0.0) for request in requests)
    if not model.sees or model.scheduler.undistilled:  # what an Omni of another shift is made for, nobody has said
        yield from _schedule(list(settings), model.scheduler)


def _cut(prompts: Sequence[str], cut: Callable[[str], tuple[int, str]]) -> Iterator[str]:
    """cut: prompt -> its tokens, with the frame, and how much of it is used."""
    found = [(tokens, used) for tokens, used in map(cut, prompts) if tokens > MAX_PROMPT_TOKENS]
    for tokens, used in found[:1]:
        which = "the prompt" if len(found) == 1 else f"{len(found)} prompts are too long: the first"
        yield (
            f"{which} has {tokens} tokens with its frame, {MAX_PROMPT_TOKENS} are used; "
            f"it ends at '...{used[-_ENDING:]}'"
        )


def _markup(prompts: Sequence[str]) -> Iterator[str]:
    for pattern, meaning in _MARKUP:
        for found in filter(None, (re.search(pattern, prompt) for prompt in prompts)):
            yield f"{found[0]} {meaning}"
            break


def _schedule(settings: Sequence[tuple[int, float]], scheduler: SchedulerConfig) -> Iterator[str]:
    """settings: steps and guidance, each pair once. Of those that the model is not made for, the first."""
    for steps, guidance in settings:
        if scheduler.undistilled and (steps < scheduler.least_steps or not guidance):
            yield (
                f"this is the undistilled Z-Image (shift {scheduler.shift:g}), made for {scheduler.least_steps} to 50 "
                f"steps and --guidance 3 to 5; got {steps} and {guidance:g}"
            )
            return
        if guidance and not scheduler.undistilled:
            yield (
                f"--guidance {guidance:g} is cfg {guidance + 1:g} in ComfyUI, where 1 is off; Turbo is made for 0, and "
                "guidance doubles the time"
            )
            return

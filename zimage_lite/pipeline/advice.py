"""What a request probably means otherwise, or what of it is not followed: a line for each kind. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from ..checkpoint.model_files import ModelFiles
from ..config import MAX_PROMPT_TOKENS, GenerateOptions, SchedulerConfig

_ENDING = 40  # characters of the prompt's last words that are used

# What other programs read in a prompt. Here, as in diffusers, all of it is text to the encoder.
_MARKUP: tuple[tuple[str, str], ...] = (
    (r"<(?:lora|lyco|hypernet):[^<>]*>", "is read as text: adapters cannot be loaded yet"),
    (r"\([^()]*:\s*-?[\d.]+\s*\)", "is read as text: weights of words have no effect on this model's encoder"),
    (r"\bBREAK\b", "is read as text: the prompt is one sequence"),
    (r"\bembedding:\S+", "is read as text: there are no textual inversions for this encoder"),
)


def advice(requests: Sequence[GenerateOptions], model: ModelFiles) -> Iterator[str]:
    """requests: complete. Each kind once, however many requests there are."""
    prompts = list(dict.fromkeys(request.prompt for request in requests))
    yield from _cut(prompts, model.tokenizer.cut)
    yield from _markup(prompts)
    yield from _schedule(requests[0], model.scheduler)


def _cut(prompts: Sequence[str], cut: Callable[[str], tuple[int, str]]) -> Iterator[str]:
    """cut: prompt -> its tokens, with the frame, and how much of it is used."""
    for prompt in prompts:
        tokens, used = cut(prompt)
        if tokens > MAX_PROMPT_TOKENS:
            yield (
                f"the prompt has {tokens} tokens with its frame, {MAX_PROMPT_TOKENS} are used; "
                f"it ends at '...{used[-_ENDING:]}'"
            )
            return


def _markup(prompts: Sequence[str]) -> Iterator[str]:
    for pattern, meaning in _MARKUP:
        for found in filter(None, (re.search(pattern, prompt) for prompt in prompts)):
            yield f"{found[0]} {meaning}"
            break


def _schedule(request: GenerateOptions, scheduler: SchedulerConfig) -> Iterator[str]:
    steps, guidance = request.steps or 0, request.guidance or 0.0
    if request.negative and not guidance:
        yield "--negative has no effect without --guidance"
    if scheduler.undistilled and (steps < scheduler.steps or not guidance):
        yield (
            f"this is the undistilled Z-Image (shift {scheduler.shift:g}), made for 28 to 50 steps and --guidance 3 to "
            f"5; got {steps} and {guidance:g}"
        )
    if guidance and not scheduler.undistilled:
        yield (
            f"--guidance {guidance:g} is cfg {guidance + 1:g} in ComfyUI, where 1 is off; Turbo is made for 0, and "
            "guidance doubles the time"
        )

"""Folders of pictures to learn from, and trainings of a few steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from make_checkpoint import SIZES, write_diffusers, write_tokenizer
from PIL import Image

from zimage_lite.api import load
from zimage_lite.config import TrainOptions, TransformerConfig
from zimage_lite.pipeline.drawing import Pipeline
from zimage_lite.train.dataset import examples_in
from zimage_lite.train.session import Goal, Session

SMALL = TransformerConfig(dim=64, n_layers=2, n_refiner_layers=1, n_heads=1, cap_feat_dim=128, axes_dims=(16, 24, 24))
FEW = TrainOptions(steps=7, rank=4, rate=1e-3, batch=2, resolution=64, trigger="blob")


def write_small(folder: Path) -> Path:
    """A model that learns in no time, bfloat16."""
    folder.mkdir()
    write_diffusers(folder, (SMALL, *SIZES["tiny"][1:]), torch.bfloat16, 0)
    write_tokenizer(folder / "tokenizer", "tiny")
    return folder


def write_lessons(folder: Path, count: int = 3) -> Path:
    """Pictures of noise, of two shapes, with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for number in range(count):
        size = (64, 64) if number % 2 else (80, 48)
        Image.fromarray(random.integers(0, 256, (*size[::-1], 3), np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a blob of colour {number}\n", encoding="utf-8")
    return folder


def goal_of(folder: Path, out: Path, options: TrainOptions = FEW, every: int = 3, **more: object) -> Goal:
    return Goal(out, examples_in(folder, options.trigger), options, every=every, **more)  # type: ignore[arg-type]


def session_of(model: Path, goal: Goal, resume: bool = False, **options: str) -> Session:
    return Session(pipeline_of(model, **options), goal, resume)


def pipeline_of(model: Path, **options: str) -> Pipeline:
    return load(model, device="cpu", cache=False, **options)  # type: ignore[arg-type]

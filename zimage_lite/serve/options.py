"""What a server is told when it starts, and its limits. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..config import RuntimeOptions
from ..errors import UserError

GIVEN = "given"  # in the folder: pictures that clients sent
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Limits:
    """Of what one client may ask for."""

    body_bytes: int = 64 * 10**6  # a picture and a mask of 16 megapixels as PNG, in base64
    picture_pixels: int = 16 * 10**6  # of one that comes in, before it is decoded
    drawn_pixels: int = 2048 * 2048
    images: int = 10
    steps: int = 100
    prompt_chars: int = 10_000
    loras: int = 8
    controls: int = 3
    waiting: int = 16  # jobs
    streams: int = 32  # open at once: 6 a browser, and nobody needs more than one

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise UserError(f"limit of {name}", got=value, expected="1 or more")


@dataclass(frozen=True)
class ServeOptions:
    """folder: of history and pictures; models, controls: the names that clients see -> what `--model` and `--control`
    take, the first model by default; lora_dir: all in it may be used; obey: steps and guidance of A1111's clients, who
    send 20 and 7 unasked."""

    folder: Path
    models: Mapping[str, str]
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)
    lora_dir: Path | None = None
    host: str = "127.0.0.1"
    port: int = 7860
    api_key: str | None = None
    no_auth: bool = False
    hosts: tuple[str, ...] = ()  # further names of this server that clients may call it by
    idle_minutes: float = 10.0
    obey: bool = False
    limits: Limits = field(default_factory=Limits)
    controls: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.models:
            raise UserError("no model to serve", fix="name one with --model")
        if self.host not in LOOPBACK and not self.api_key and not self.no_auth:
            fix = "set --api-key (or ZIMAGE_LITE_API_KEY), or say --no-auth if all who can reach it may draw"
            raise UserError(f"--host {self.host}: whoever reaches this machine could use the server", fix=fix)
        if not 0 <= self.port < 2**16:
            raise UserError("--port", got=self.port, expected="a number from 0 (any free one) to 65535")
        if not 0 < self.idle_minutes < 1e6:
            raise UserError("--idle-minutes", got=self.idle_minutes, expected="more than 0")
        if self.lora_dir and not self.lora_dir.is_dir():
            raise UserError(f"--lora-dir {self.lora_dir}: no such folder")

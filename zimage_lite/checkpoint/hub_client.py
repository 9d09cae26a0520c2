"""huggingface_hub as `hub` wants it, in all its versions: silent, with a report of bytes, and errors as UserErrors."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import UserError

OnBytes = Callable[[int], None]  # bytes just downloaded, maybe told by a second thread, one call at a time


def endpoint() -> str:
    from huggingface_hub import constants

    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or constants.ENDPOINT


def reporting_bar(report: OnBytes) -> Any:
    """What huggingface_hub takes for a progress bar, but it reports instead of drawing."""

    class Bar:  # not a tqdm: those start a thread
        done_bytes = 0

        def __init__(self, **settings: Any) -> None:
            self.total = self.n = 0

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *error: object) -> None: ...

        def update(self, n: float | None = 1) -> None:
            Bar.done_bytes += int(n or 0)
            report(int(n or 0))

        def update_transfer(self, n: float) -> None:
            """hf_xet's bytes on the wire, which come beside those of the file."""

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *args, **settings: None  # whatever else a version calls

    return Bar


@contextmanager
def quiet() -> Iterator[None]:
    """huggingface_hub logs errors alone, and draws on a terminal alone. It does not explain links to users of Windows,
    whom we may use hard ones for."""
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars, logging

    level, silent = logging.get_verbosity(), constants.HF_HUB_DISABLE_SYMLINKS_WARNING
    logging.set_verbosity(logging.ERROR)
    constants.HF_HUB_DISABLE_SYMLINKS_WARNING = True
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        constants.HF_HUB_DISABLE_SYMLINKS_WARNING = silent


@contextmanager
def telling(repo_id: str, revision: str | None, name: str = "") -> Iterator[None]:
    """Whatever fails becomes a UserError."""
    try:
        yield
    except failures() as error:
        raise _told(error, repo_id, revision, name) from error


def failures() -> tuple[type[Exception], ...]:
    """What is raised where something fails: by requests, httpx or its successor, as the version has it."""
    from huggingface_hub import errors

    of_the_client: Any = (*errors.HfHubHTTPError.__bases__, errors.XetDownloadError)
    return (OSError, RuntimeError, ValueError, *of_the_client)


def _told(error: BaseException, repo_id: str, revision: str | None, name: str) -> UserError:
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__
    host, token = endpoint(), "set HF_TOKEN or run `hf auth login`"
    no_model = (
        errors.RepositoryNotFoundError,
        f"no such path, nor model at {host}",
        f"check the name; if it is a private one, {token}",
    )
    known = (
        (errors.GatedRepoError, "granted on request only", f"accept its terms at {host}/{repo_id}, then {token}"),
        (errors.RevisionNotFoundError, f"no revision {revision}", "name a branch, a tag or a commit"),
        no_model,
        (errors.HFValidationError, "not a model's name", "name a folder, or a model as OWNER/NAME"),
        (errors.OfflineModeIsEnabled, "not in the cache, and HF_HUB_OFFLINE is set", "unset it to download the model"),
    )
    for kind, what, fix in known:
        if isinstance(error, kind):
            return UserError(f"{repo_id}: {what}", fix=fix)
    if isinstance(error, errors.HfHubHTTPError):
        status, wrong = error.response.status_code, "redentials" in error.response.headers.get("X-Error-Message", "")
        if status in (401, 404) and not name and not wrong:  # what strangers are told of private and missing ones
            return UserError(f"{repo_id}: {no_model[1]}", fix=no_model[2])
        fix = f"check the token: {token}" if status in (401, 403) else "try again later"
        return UserError(f"{repo_id}: refused by {host}", got=f"HTTP status {status}", fix=fix)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return UserError(f"{repo_id}: the disk is full", fix="free some space, or add --discard-source")
    reason = next(iter(str(error).splitlines()), type(error).__name__)[:160]
    while inner := error.__cause__ or error.__context__:
        error = inner
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror  # the system's own words
    what = f"{repo_id}/{name}: the download failed" if name else f"{repo_id}: no connection to {host}"
    return UserError(f"{what} ({reason})", fix="check the network and HF_ENDPOINT, then start again")

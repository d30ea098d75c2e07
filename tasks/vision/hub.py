"""Files of the Hugging Face Hub: fetched once, checked, and either whole or absent.

HF_ENDPOINT, HF_HUB_OFFLINE, HF_HUB_CACHE, HF_TOKEN and the other settings of `huggingface_hub` hold.
"""

import errno
import logging
import os
import re
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from merging.cache import Cache
from merging.content import Content
from merging.errors import UserError

log = logging.getLogger(__name__)
ATTEMPTS = 3  # of a whole download; within one, huggingface_hub resumes several times
PASSING = (408, 429, 500, 502, 503, 504)  # HTTP statuses worth another attempt
FULL = (errno.ENOSPC, errno.EDQUOT)
GB = 1e9


@dataclass(frozen=True)
class Wanted:
    """A file of a repository under the first of several names that exists."""

    repo: str
    filenames: tuple[str, ...]
    revision: str | None = None
    repo_type: str = "model"

    def __str__(self) -> str:
        return f"{self.repo}/{self.filenames[0]}"


class Download(NamedTuple):
    """What a run will fetch: `bytes` None where the hub cannot be asked, `where` the file or the cache folder."""

    name: str
    bytes: int | None
    cached: bool
    where: Path


class Missing(UserError):
    """The repository is there, the file is not."""


def fetch(
    repo: str, filename: str, revision: str | None = None, repo_type: str = "model", cache: Cache | None = None
) -> Path:
    """The path of a file in the local cache of the hub, downloaded now if it is not there.

    A file kept in LFS must have the sha256 that its name in the cache says: a download is checked always, an older one
    if `cache` is given, which remembers it. What does not pass is removed and fetched again, ATTEMPTS times in all.
    Raises UserError: no connection, no such file (Missing), no access, disk full, or still damaged.
    """
    from huggingface_hub import hf_hub_download

    problem, wanted = "", Wanted(repo, (filename,), revision, repo_type)
    for attempt in range(ATTEMPTS):
        before = _cached(wanted)
        if before is None:
            [announced] = told = plan([wanted])
            check_room(told)
            log.info("downloading %s (%s) to %s", wanted, size_of(announced.bytes), announced.where)
        try:
            path = Path(hf_hub_download(repo, filename, revision=revision, repo_type=repo_type))
        except _errors() as error:
            problem = _passing(wanted, error)
            time.sleep(2**attempt)
            continue
        if (path == before and cache is None) or _is_whole(path, cache):
            return path
        problem = "what came has another sha256 than the hub announces"
        _discard(path)
    raise UserError(
        f"{wanted} could not be downloaded from {_endpoint()} in {ATTEMPTS} attempts: {problem}. Nothing of it was "
        f"kept. Run the same command again later; if it stays so, fetch the file by other means into {_folder()}."
    )


def fetch_first(wanted: Wanted, cache: Cache | None = None) -> Path:
    """`fetch` for the first of its names that is cached, else that the repository has; Missing if there is none."""
    names = [name for name in wanted.filenames if _cached(replace(wanted, filenames=(name,)))] or wanted.filenames
    for name in names[:-1]:
        try:
            return fetch(wanted.repo, name, wanted.revision, wanted.repo_type, cache)
        except Missing:
            continue
    return fetch(wanted.repo, names[-1], wanted.revision, wanted.repo_type, cache)


def plan(wanted: Iterable[Wanted]) -> list[Download]:
    """What is cached and what must come, with sizes, without fetching. Raises UserError for what is not there."""
    return [_planned(each) for each in wanted]


def size_of(count: int | None) -> str:
    """Bytes as a person reads them."""
    if count is None:
        return "size unknown"
    return f"{count / GB:.2f} GB" if count >= GB / 10 else f"{count / 1e6:.1f} MB"


def check_room(downloads: Sequence[Download]) -> None:
    """Raises UserError if what is not cached yet is larger than the free space."""
    need = sum(each.bytes or 0 for each in downloads if not each.cached)
    folder = next(each for each in (_folder(), *_folder().parents) if each.exists())
    if need and need > (free := shutil.disk_usage(folder).free):
        raise UserError(
            f"{_folder()} has {size_of(free)} free, and {size_of(need)} are to be downloaded there. Free some "
            f"space, or let HF_HUB_CACHE name a folder on a larger disk."
        )


def _planned(wanted: Wanted) -> Download:
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    if (path := _cached(wanted)) is not None:
        return Download(str(wanted), path.stat().st_size, True, path)
    if constants.HF_HUB_OFFLINE:
        raise _offline(wanted)
    for last, name in enumerate(wanted.filenames, 1 - len(wanted.filenames)):
        one = Wanted(wanted.repo, (name,), wanted.revision, wanted.repo_type)
        url = hf_hub_url(wanted.repo, name, revision=wanted.revision, repo_type=wanted.repo_type)
        try:
            return Download(str(one), get_hf_file_metadata(url).size, False, _folder())
        except _errors() as error:
            try:
                _passing(one, error)
            except Missing:
                if last == 0:
                    raise
            else:  # out of order for the moment: the download itself tries longer
                return Download(str(one), None, False, _folder())
    raise AssertionError("a file has at least one name")


def _cached(wanted: Wanted) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for name in wanted.filenames:
        found = try_to_load_from_cache(wanted.repo, name, revision=wanted.revision, repo_type=wanted.repo_type)
        if isinstance(found, str):
            return Path(found)
    return None


def _errors() -> tuple[type[Exception], ...]:
    """What the client raises: its HTTP library's errors, of which its own are a kind, and OSError."""
    from huggingface_hub.errors import HfHubHTTPError

    return (*(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)), OSError)


def _passing(wanted: Wanted, error: Exception) -> str:
    """What went wrong, if another attempt makes sense; raises UserError if not."""
    from huggingface_hub import errors

    revision = wanted.revision or "main"
    if isinstance(error, OSError) and error.errno in FULL:
        raise UserError(f"No space is left in {_folder()} for {wanted}. Free some, or set HF_HUB_CACHE.") from error
    if isinstance(error, errors.GatedRepoError) or _status(error) == 403:
        raise UserError(
            f"{wanted} is not open to you. Accept its conditions at {_endpoint()}/{_page(wanted)}, then log in "
            f"(`hf auth login`) or set HF_TOKEN."
        ) from error
    if isinstance(error, errors.RevisionNotFoundError):
        raise UserError(f"{wanted.repo} has no revision {revision}. Name a branch, tag or commit of it.") from error
    if isinstance(error, errors.RepositoryNotFoundError) or _status(error) == 401:
        raise UserError(
            f"There is no {wanted.repo_type} {wanted.repo} at {_endpoint()} that you may see ({wanted}). Check the "
            f"name; for a private one log in (`hf auth login`) or set HF_TOKEN."
        ) from error
    if isinstance(error, errors.LocalEntryNotFoundError):  # the client has tried for long
        raise _offline(wanted, error.__cause__) from error
    if isinstance(error, errors.EntryNotFoundError) or _status(error) == 404:
        raise Missing(
            f"{wanted.repo} ({revision}) has no file {wanted.filenames[0]}. See {_endpoint()}/{_page(wanted)}/tree/"
            f"{revision} for what it has."
        ) from error
    if _status(error) not in (None, *PASSING):
        raise UserError(f"{_endpoint()} refuses {wanted}: {error}") from error
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _offline(wanted: Wanted, cause: BaseException | None = None) -> UserError:
    from huggingface_hub import constants

    options = "" if wanted.repo_type == "model" else f" --repo-type {wanted.repo_type}"
    options += "" if wanted.revision is None else f" --revision {wanted.revision}"
    why = "HF_HUB_OFFLINE forbids to download it"
    if not constants.HF_HUB_OFFLINE:
        why = f"{_endpoint()} cannot be reached ({str(cause).strip().partition(chr(10))[0] or type(cause).__name__})"
    return UserError(
        f"{wanted} is not in the cache {_folder()}, and {why}. Fetch it where there is a connection, with "
        f"`hf download {wanted.repo} {wanted.filenames[0]}{options}`, and copy that machine's cache here."
    )


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _page(wanted: Wanted) -> str:
    return wanted.repo if wanted.repo_type == "model" else f"{wanted.repo_type}s/{wanted.repo}"


def _folder() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _blob(path: Path) -> Path:
    """Where the content of a file in the cache lies; its name there is the sha256 of an LFS file."""
    return path.parent / os.readlink(path) if path.is_symlink() else path


def _is_whole(path: Path, cache: Cache | None) -> bool:
    expected = _blob(path).name
    return not re.fullmatch("[0-9a-f]{64}", expected) or Content(path, cache).id == expected


def _discard(path: Path) -> None:
    blob = _blob(path)
    path.unlink(missing_ok=True)
    blob.unlink(missing_ok=True)

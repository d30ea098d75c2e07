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
from typing import Any, NamedTuple

from merging.cache import Cache
from merging.content import Content
from merging.errors import UserError

log = logging.getLogger(__name__)
ATTEMPTS = 3  # of a whole download; within one, huggingface_hub resumes several times
PASSING = (408, 429, 500, 502, 503, 504)  # HTTP statuses worth another attempt
FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Wanted:
    """A file of a repository under the first of several names that exists."""

    repo: str
    filenames: tuple[str, ...]
    revision: str | None = None
    repo_type: str = "model"

    def __str__(self) -> str:
        return f"{self.repo}/{self.filenames[0]}"

    @property
    def each(self) -> "list[Wanted]":
        """The same for every name by itself."""
        return [replace(self, filenames=(name,)) for name in self.filenames]

    @property
    def where(self) -> dict[str, Any]:
        """As huggingface_hub takes it."""
        named = {"repo_id": self.repo, "filename": self.filenames[0]}
        return {**named, "revision": self.revision, "repo_type": self.repo_type}

    @property
    def cached(self) -> Path | None:
        """The file under the first name, if it is in the local cache."""
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(**self.where)
        return Path(path) if isinstance(path, str) else None

    @property
    def page(self) -> str:
        return f"{_constants().ENDPOINT}/{'' if self.repo_type == 'model' else f'{self.repo_type}s/'}{self.repo}"


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
        before = wanted.cached
        if before is None:
            [announced] = planned = plan([wanted])
            check_room(planned)
            log.info("downloading %s (%s) to %s", wanted, size_of(announced.bytes), announced.where)
        try:
            path = Path(hf_hub_download(**wanted.where))
        except _errors() as error:
            problem = _passing(wanted, error)
            time.sleep(2**attempt)
            continue
        if (path == before and cache is None) or _is_whole(path, cache):
            return path
        problem = "what came has another sha256 than the hub announces"
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    raise UserError(
        f"{wanted} could not be downloaded from {_constants().ENDPOINT} in {ATTEMPTS} attempts: {problem}. Nothing of "
        f"it was kept. Run the same command again later; if it stays so, fetch it by other means into {_folder()}."
    )


def fetch_first(wanted: Wanted, cache: Cache | None = None) -> Path:
    """`fetch` for the first of its names that is cached, else that the repository has; Missing if there is none."""
    names = [one for one in wanted.each if one.cached] or wanted.each
    for one in names:
        try:
            return fetch(one.repo, one.filenames[0], one.revision, one.repo_type, cache)
        except Missing:
            if one == names[-1]:
                raise
    raise AssertionError("a file has at least one name")


def plan(wanted: Iterable[Wanted]) -> list[Download]:
    """What is cached and what must come, with sizes, without fetching. Raises UserError for what is not there."""
    return [_planned(each) for each in wanted]


def size_of(count: int | None) -> str:
    """Bytes as a person reads them."""
    if count is None:
        return "size unknown"
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


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
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    for one in wanted.each:
        if (path := one.cached) is not None:
            return Download(str(one), path.stat().st_size, True, path)
    if _constants().HF_HUB_OFFLINE:
        raise _offline(wanted)
    for one in wanted.each:
        try:
            return Download(str(one), get_hf_file_metadata(hf_hub_url(**one.where)).size, False, _folder())
        except _errors() as error:
            try:
                _passing(one, error)
            except Missing:
                if one == wanted.each[-1]:
                    raise
            else:  # out of order for the moment: the download itself tries longer
                return Download(str(one), None, False, _folder())
    raise AssertionError("a file has at least one name")


def _errors() -> tuple[type[Exception], ...]:
    """What the client raises: its HTTP library's errors, of which its own are a kind, and OSError."""
    from huggingface_hub.errors import HfHubHTTPError

    return (*(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)), OSError)


def _passing(wanted: Wanted, error: Exception) -> str:
    """What went wrong, if another attempt makes sense; raises UserError if not."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    revision, login = wanted.revision or "main", "log in (`hf auth login`) or set HF_TOKEN"
    if isinstance(error, OSError) and error.errno in FULL:
        raise UserError(f"No space is left in {_folder()} for {wanted}. Free some, or set HF_HUB_CACHE.") from error
    if isinstance(error, errors.GatedRepoError) or status == 403:
        why = f"{wanted} is not open to you. Accept its conditions at {wanted.page}, then {login}."
        raise UserError(why) from error
    if isinstance(error, errors.RevisionNotFoundError):
        raise UserError(f"{wanted.repo} has no revision {revision}. Name a branch, tag or commit of it.") from error
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        raise UserError(
            f"There is no {wanted.repo_type} {wanted.repo} at {_constants().ENDPOINT} that you may see ({wanted}). "
            f"Check the name; for a private one {login}."
        ) from error
    if isinstance(error, errors.LocalEntryNotFoundError):  # the client has tried for long
        raise _offline(wanted, error.__cause__) from error
    if isinstance(error, errors.EntryNotFoundError) or status == 404:
        raise Missing(
            f"{wanted.repo} ({revision}) has no file {wanted.filenames[0]}. See {wanted.page}/tree/{revision} for what "
            f"it has."
        ) from error
    if status not in (None, *PASSING):
        raise UserError(f"{_constants().ENDPOINT} refuses {wanted}: {error}") from error
    return _first_line(error)


def _offline(wanted: Wanted, cause: BaseException | None = None) -> UserError:
    options = "" if wanted.repo_type == "model" else f" --repo-type {wanted.repo_type}"
    options += "" if wanted.revision is None else f" --revision {wanted.revision}"
    why = "HF_HUB_OFFLINE forbids to download it"
    if not _constants().HF_HUB_OFFLINE:
        why = f"{_constants().ENDPOINT} cannot be reached ({_first_line(cause)})"
    return UserError(
        f"{wanted} is not in the cache {_folder()}, and {why}. Fetch it where there is a connection, with "
        f"`hf download {wanted.repo} {wanted.filenames[0]}{options}`, and copy that machine's cache here."
    )


def _first_line(error: BaseException | None) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _constants() -> Any:
    from huggingface_hub import constants

    return constants


def _folder() -> Path:
    return Path(_constants().HF_HUB_CACHE)


def _is_whole(path: Path, cache: Cache | None) -> bool:
    """Whether a file has the content that its name in the cache says, which of an LFS file is its sha256."""
    blob = os.path.basename(os.readlink(path)) if path.is_symlink() else path.name
    return not re.fullmatch("[0-9a-f]{64}", blob) or Content(path, cache).id == blob

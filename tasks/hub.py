"""Files of the Hugging Face Hub: fetched once, checked, and either whole or absent.

HF_ENDPOINT, HF_HUB_OFFLINE, HF_HUB_CACHE, HF_TOKEN and the other settings of `huggingface_hub` hold.
"""

import errno
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from huggingface_hub import (
    constants,
    errors,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)

from merging.cache import Cache
from merging.errors import UserError
from merging.files import Content

Result = TypeVar("Result")
ATTEMPTS = 3  # of a whole download; within one, huggingface_hub resumes several times
PASSING = (408, 429, 500, 502, 503, 504)  # HTTP statuses worth another attempt
FULL = (errno.ENOSPC, errno.EDQUOT)
# what the client raises: errors of its HTTP library, of which its own are a kind, and OSError
ERRORS = (*(base for base in errors.HfHubHTTPError.__bases__ if issubclass(base, Exception)), OSError)
_KNOWN: dict[tuple[Any, ...], Path] = {}  # what this process has asked for
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubFile:
    """A file of a repository, under the first of several names that is cached, else that the repository has.

    kind: model | dataset.
    """

    repo: str
    filenames: tuple[str, ...]
    revision: str | None = None
    kind: str = "model"

    def __str__(self) -> str:
        return f"{self.repo}/{self.filenames[0]}"

    @property
    def location(self) -> dict[str, Any]:
        """The first name, as huggingface_hub takes it."""
        where = {"repo_id": self.repo, "filename": self.filenames[0], "revision": self.revision}
        return where if self.kind == "model" else where | {"repo_type": self.kind}

    @property
    def page(self) -> str:
        """Of the repository."""
        return "/".join([constants.ENDPOINT, *([] if self.kind == "model" else [f"{self.kind}s"]), self.repo])

    @property
    def cached(self) -> Path | None:
        """The file under the first name, if it is in the local cache."""
        path = try_to_load_from_cache(**self.location)
        return Path(path) if isinstance(path, str) else None

    def first(self, ask: "Callable[[HubFile], Result]") -> Result:
        """`ask` of the first name that does not raise Missing."""
        names = [replace(self, filenames=(name,)) for name in self.filenames]
        *others, last = [name for name in names if name.cached] or names
        for name in others:
            with suppress(Missing):
                return ask(name)
        return ask(last)


class Download(NamedTuple):
    """What a run will fetch: `bytes` None where the hub cannot be asked, `where` the file or the cache folder."""

    name: str
    bytes: int | None
    cached: bool
    where: Path


class Missing(UserError):
    """The repository is there, the file is not."""


def fetch(file: HubFile, cache: Cache | None = None) -> Path:
    """The path of a file in the local cache of the hub, downloaded now if it is not there.

    The hub is asked once by a process: what it has meanwhile under the same name would be another file in one table.
    A file kept in LFS must have the sha256 that its name in the cache says: a download is checked always, an older one
    if `cache` is given, which remembers it. What does not pass is removed and fetched again, ATTEMPTS times in all.
    Raises UserError: no connection, no such file (Missing), no access, disk full, or still damaged.
    """
    return file.first(lambda name: _fetched(name, cache))


def plan(files: Iterable[HubFile]) -> list[Download]:
    """What is cached and what must come, with sizes, without fetching. Raises UserError for what is not there."""
    return [file.first(_planned) for file in files]


def check_room(downloads: Sequence[Download]) -> None:
    """Raises UserError if what is not cached yet is larger than the free space."""
    need = sum(download.bytes or 0 for download in downloads if not download.cached)
    folder = next(path for path in (_folder(), *_folder().parents) if path.exists())
    if need and need > (free := shutil.disk_usage(folder).free):
        raise UserError(
            f"{_folder()} has {free / 1e6:,.1f} MB free, and {need / 1e6:,.1f} MB are to be downloaded there. Free "
            f"some space, or let HF_HUB_CACHE name a folder on a larger disk."
        )


def _fetched(file: HubFile, cache: Cache | None) -> Path:
    problem, asked = "", (file, constants.ENDPOINT, _folder())
    if (known := _KNOWN.get(asked)) is not None and known.exists() and (cache is None or _is_whole(known, cache)):
        return known
    for attempt in range(ATTEMPTS):
        before = file.cached
        if before is None:
            download = _planned(file)
            check_room([download])
            size = "size unknown" if download.bytes is None else f"{download.bytes / 1e6:,.1f} MB"
            log.info("downloading %s (%s) to %s", file, size, download.where)
        try:
            path = Path(hf_hub_download(**file.location))
        except ERRORS as error:
            problem = _passing(file, error)
            time.sleep(2**attempt)
            continue
        if (path == before and cache is None) or _is_whole(path, cache):
            _KNOWN[asked] = path
            return path
        problem = "what came has another sha256 than the hub announces"
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    raise UserError(
        f"{file} could not be downloaded from {constants.ENDPOINT} in {ATTEMPTS} attempts: {problem}. Nothing of "
        f"it was kept. Run the same command again later; if it stays so, fetch it by other means into {_folder()}."
    )


def _planned(file: HubFile) -> Download:
    if (path := file.cached) is not None:
        return Download(str(file), path.stat().st_size, True, path)
    if constants.HF_HUB_OFFLINE:
        raise UserError(_offline(file))
    try:
        size = get_hf_file_metadata(hf_hub_url(**file.location)).size
    except ERRORS as error:
        _passing(file, error)
        size = None  # out of order for the moment: the download itself tries longer
    return Download(str(file), size, False, _folder())


def _passing(file: HubFile, error: Exception) -> str:
    """What went wrong, if another attempt makes sense; raises UserError if not."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    hub, page, revision = constants.ENDPOINT, file.page, file.revision or "main"
    login = "log in (`hf auth login`) or set HF_TOKEN"
    final: list[tuple[bool, str]] = [  # the first that is true tells; kinds of errors before the kinds they belong to
        (isinstance(error, OSError) and error.errno in FULL,
         f"No space is left in {_folder()} for {file}. Free some, or set HF_HUB_CACHE."),
        (isinstance(error, errors.GatedRepoError) or status == 403,
         f"{file} is not open to you. Accept its conditions at {page}, then {login}."),
        (isinstance(error, errors.RevisionNotFoundError),
         f"{file.repo} has no revision {revision}. Name a branch, tag or commit of it."),
        (isinstance(error, errors.RepositoryNotFoundError) or status == 401,
         f"There is no {file.kind} {file.repo} at {hub} that you may see ({file}). Check its name. If private, "
         f"{login}."),
        (isinstance(error, errors.LocalEntryNotFoundError),  # the client has tried for long
         _offline(file, error.__cause__)),
        (status not in (None, 404, *PASSING), f"{hub} refuses {file}: {error}"),
    ]  # fmt: skip
    if message := next((message for holds, message in final if holds), None):
        raise UserError(message) from error
    if isinstance(error, errors.EntryNotFoundError) or status == 404:
        raise Missing(
            f"{file.repo} ({revision}) has no file {file.filenames[0]}. See {page}/tree/{revision} for what it has."
        ) from error
    return _first_line(error)


def _offline(file: HubFile, cause: BaseException | None = None) -> str:
    more = "" if file.revision is None else f" --revision {file.revision}"
    more += "" if file.kind == "model" else f" --repo-type {file.kind}"
    why = f"{constants.ENDPOINT} cannot be reached ({_first_line(cause)})"
    if constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE forbids to download it"
    return (
        f"{file} is not in the cache {_folder()}, and {why}. Fetch it where there is a connection, with "
        f"`hf download {file.repo} {file.filenames[0]}{more}`, and copy that machine's cache here."
    )


def _first_line(error: BaseException | None) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _folder() -> Path:
    return Path(constants.HF_HUB_CACHE)


def _is_whole(path: Path, cache: Cache | None) -> bool:
    """Whether a file has the content that its name in the cache says, which of an LFS file is its sha256."""
    blob = os.path.basename(os.readlink(path)) if path.is_symlink() else path.name
    return not re.fullmatch("[0-9a-f]{64}", blob) or Content(path, cache).id == blob

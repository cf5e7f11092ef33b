"""The Hugging Face hub: one file of a model, found or fetched without long retries, and its refusals in one line each.

Imports no torch, so that a wrong name is reported within two seconds.
"""

import errno
import os
import re
from pathlib import Path
from typing import Any

from qalign.errors import UserError

PATIENCE = 2.0  # seconds that the hub has to answer, unless HF_HUB_ETAG_TIMEOUT says otherwise
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EFBIG)


def fetch(key: str, name: str, file: str, revision: str | None) -> tuple[Path, bool]:
    """A file of a hub model, as (its path in the hub's cache, whether the hub was reached). The folder is named after
    the commit. What is in the cache is used when the hub can't be reached.

    Raises:
        UserError: one line with what was asked for, why it isn't there, and what to do; `key` is the recipe's.
    """
    import huggingface_hub as hub
    from huggingface_hub import constants

    options: dict[str, Any] = {"repo_id": name, "filename": file, "revision": revision}
    try:
        if not hub.is_offline_mode():
            if re.fullmatch("[0-9a-f]{40}", revision or "") and isinstance(hub.try_to_load_from_cache(**options), str):
                return Path(hub.hf_hub_download(**options, local_files_only=True)), True  # a commit never changes
            try:  # one question, as the library itself would ask five times in 23 seconds
                wait = constants.HF_HUB_ETAG_TIMEOUT if "HF_HUB_ETAG_TIMEOUT" in os.environ else PATIENCE
                hub.get_hf_file_metadata(hub.hf_hub_url(name, file, revision=revision), timeout=wait)
                return Path(hub.hf_hub_download(**options)), True
            except Exception as error:
                if status_of(error) in (401, 403, 404) or getattr(error, "errno", None) in NO_ROOM:
                    raise
                if not isinstance(hub.try_to_load_from_cache(**options), str):
                    raise
        return Path(hub.hf_hub_download(**options, local_files_only=True)), False
    except Exception as error:  # httpx's errors have no base in common with Python's
        raise UserError(f"{key}: {reason(error, name, revision, file)}") from None


def is_known(error: BaseException) -> bool:
    """Whether `reason` has words for an error: the hub refused, or the disk is full."""
    from huggingface_hub import errors

    known = (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)
    return isinstance(error, known) or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT))


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error is about."""
    return getattr(getattr(error, "response", None), "status_code", None)


def reason(error: BaseException, name: str, revision: str | None = None, file: str = "a file", kind: str = "") -> str:
    """Why something of the hub can't be had, and what to do, in one line.

    Args:
        name: the hub id.
        kind: `datasets/` for a data set, empty for a model.
    """
    from huggingface_hub import constants, errors

    page, status = f"{constants.ENDPOINT}/{kind}{name}", status_of(error)
    if isinstance(error, errors.GatedRepoError):
        return f"'{name}' is gated ({status}): accept its conditions on {page}, then log in with `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"'{name}' has no revision '{revision}' (404); {page} lists its branches, tags and commits"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"'{name}' has no {file} (404); see what is in {page}, a `.gguf` file of it can be named by its path"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"there is no '{name}' on {constants.ENDPOINT}, or it is private ({status}): check the name, or log in "
            "with `hf auth login`; no such folder is here either"
        )
    if isinstance(error, errors.HFValidationError):
        return f"'{name[:100]}' is neither a hub id (OWNER/NAME) nor a folder that exists"
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        room = f"{constants.HF_HUB_CACHE} can't be written ({os.strerror(error.errno or 0)})"
        return f"'{name}' can't be fetched: {room}; make room, or set HF_HOME to another folder"
    if _is_offline(error):
        return (
            f"'{name}' is not in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids to fetch it; unset it, or run "
            f"`hf download {name}` where there is a network"
        )
    if status is not None:
        return f"'{name}' can't be fetched: {constants.ENDPOINT} answers {status}; try again later, or log in"
    cause = " ".join((str(error) or type(error).__name__).split())[:80]
    where = f"{constants.ENDPOINT} can't be reached ({cause})"
    return (
        f"'{name}' can't be fetched: {where}; check the network, HF_ENDPOINT and HF_HUB_ETAG_TIMEOUT, or name a folder"
    )


def _is_offline(error: BaseException) -> bool:
    import huggingface_hub as hub
    from huggingface_hub import errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return True
    return isinstance(error, errors.LocalEntryNotFoundError) and hub.is_offline_mode()

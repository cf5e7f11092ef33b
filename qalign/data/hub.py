"""Rows of hub data sets and of folders, through `datasets`; and in one line why the hub doesn't give something."""

from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from qalign.config.paths import DATA_SUFFIXES, check_fetched, data_set_name, expanded
from qalign.config.stages import Source
from qalign.errors import UserError, disk_problem

SECONDS = 5  # until the hub has answered; its own clients try again for half a minute


def data_set(source: Source, split: str) -> Iterator[Any]:
    """The rows of a hub data set (`NAME` or `NAME:CONFIG`) or of a folder. With `streaming`, rows are fetched as they
    are taken. Raises a `UserError` if they can't be loaded."""
    name, config = data_set_name(expanded(source.path))
    check_fetched(file for file in Path(name).rglob("*") if file.name.endswith((*DATA_SUFFIXES, ".arrow")))
    try:
        yield from _loaded(name, config, source, split)
    except Exception as error:  # the hub, the network, the split, the files
        reason = why(error, name, "dataset", source.revision)
        raise UserError(f"{source.path}: the data set can't be loaded (split '{split}'): {reason}") from None


def _loaded(name: str, config: str | None, source: Source, split: str) -> Iterable[Any]:
    datasets: Any = import_module("datasets")  # it has no types
    folder = Path(name)
    if not folder.is_dir():
        check_reachable(name, "dataset", source.revision)
    elif source.revision:
        raise ValueError("a folder has no revision; remove it")
    elif any((folder / saved).is_file() for saved in ("state.json", "dataset_dict.json")):
        data = datasets.load_from_disk(name)
        if isinstance(data, datasets.DatasetDict) and split not in data:
            raise ValueError(f"it has no such split; its splits: {', '.join(data)}")
        return data[split] if isinstance(data, datasets.DatasetDict) else data
    if not source.streaming:
        return datasets.load_dataset(name, config, split=split, revision=source.revision)
    builder = datasets.load_dataset_builder(name, config, revision=source.revision)
    if hasattr(builder.config, "chunksize"):  # of text files: bytes that are read ahead
        builder.config.chunksize = 1 << 20
    if hasattr(builder.config, "fragment_scan_options"):
        return _parquet_rows(builder.config.data_files, split)
    return builder.as_streaming_dataset(split)


def _parquet_rows(files: dict[str, list[str]], split: str) -> Iterator[Any]:
    """Rows of Parquet files, one row group at a time. (`datasets` scans them in threads of pyarrow, which fetch every
    group ahead, and which crash or hang when the process ends before they have.)"""
    if split not in files:
        raise ValueError(f"it has no such split; its splits: {', '.join(files)}")
    for file in files[split]:
        with import_module("fsspec").open(file, "rb") as opened:
            parquet = import_module("pyarrow.parquet").ParquetFile(opened, pre_buffer=False)
            for batch in parquet.iter_batches(1024, use_threads=False):
                yield from batch.to_pylist()


def check_reachable(name: str, kind: str, revision: str | None) -> None:
    """Asks the hub once for a `model` or `dataset`; `why` explains what is raised. In offline mode it does nothing, so
    that what is in the cache can be used."""
    hub: Any = import_module("huggingface_hub")
    if not hub.constants.HF_HUB_OFFLINE:
        hub.HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=SECONDS)


def why(error: BaseException, name: str, kind: str, revision: str | None) -> str:
    """Why a `model` or `dataset` of the hub couldn't be loaded, and what to do, in one line."""
    hub: Any = import_module("huggingface_hub")
    errors: Any = import_module("huggingface_hub.errors")
    login = "log in with `hf auth login`"
    for cause in _chain(error):
        status = getattr(getattr(cause, "response", None), "status_code", None)
        offline = isinstance(cause, errors.LocalEntryNotFoundError) and hub.is_offline_mode()
        if offline or isinstance(cause, errors.OfflineModeIsEnabled) or "OfflineModeIsEnabled" in str(cause):
            return "it isn't in the cache, and HF_HUB_OFFLINE keeps the hub switched off; unset that, or check the name"
        if isinstance(cause, errors.GatedRepoError):
            page = f"{hub.constants.ENDPOINT}/{'datasets/' * (kind == 'dataset')}{name}"
            return f"it is gated: accept its terms at {page}, then {login}"
        if isinstance(cause, errors.RevisionNotFoundError):
            return f"it has no revision '{revision}'"
        if isinstance(cause, errors.RepositoryNotFoundError):
            return f"there is no such {kind} on the hub; check the name, or {login} if it is private"
        if isinstance(cause, errors.RemoteEntryNotFoundError):
            return f"the hub's '{name}' has no such file; is it a {kind} that this library reads?"
        if problem := disk_problem(cause):
            return problem
        if isinstance(cause, errors.HFValidationError):
            return "this is neither a file or folder here nor a name on the hub, NAME or OWNER/NAME"
        if status in (401, 403):
            return f"the hub refuses access (error {status}); {login}"
        if status is not None:
            return f"the hub answers with error {status}; try again later"
        if type(cause).__module__.startswith("httpx"):  # the hub's client; which version of it differs
            return f"the hub can't be reached ({cause}); with HF_HUB_OFFLINE=1 a copy in the cache is used"
    text = f"{error} is unknown or missing" if isinstance(error, KeyError) else str(error).strip()
    text = text or type(error).__name__
    if "Config name is missing" in text:  # the second line is an example of code
        return f"{' '.join(text.partition('Example')[0].split())}; write {name}:CONFIG"
    first, *others = text.splitlines()
    return f"{first} {others[0].strip()}" if first.endswith(":") and others else first


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__

"""Sources by name: files, folders, patterns, and datasets of the Hugging Face hub, downloaded at one commit."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path, PurePath, PurePosixPath

from tunewright.core.errors import UserError
from tunewright.core.io import writing
from tunewright.core.progress import Reporter
from tunewright.core.remote_files import error_reason, hub_refusals, hub_silence
from tunewright.core.text import count_of, first_of

SAVED = ("state.json", "dataset_dict.json")
"""A folder with one of these files was written by ``Dataset.save_to_disk``."""
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TEXT_SUFFIXES = (*JSON_SUFFIXES, ".csv", ".tsv", ".tab", ".psv")
OTHER_SUFFIXES = (".parquet", ".xlsx")
_COMPRESSED = (".gz", ".zst")


def plain_suffix(path: PurePath) -> str:
    """Return the last suffix in lower case, ignoring the suffix of a compression."""
    name = path.name.lower()
    for compressed in _COMPRESSED:
        name = name.removesuffix(compressed)
    return PurePath(name).suffix


def has_known_suffix(path: PurePath) -> bool:
    """Return whether a file of a folder is read; a file that is named directly may have any suffix."""
    return plain_suffix(path) in TEXT_SUFFIXES or path.suffix.lower() in OTHER_SUFFIXES


_MOST_NAMED = 5


def source_files(named: Iterable[str | Path], reporter: Reporter) -> list[Path]:
    """Return the files to read, each once, with folders, glob patterns and datasets of the hub expanded.

    A folder that ``Dataset.save_to_disk`` wrote is one source. In other folders, all files below
    that ``has_known_suffix`` are read; hidden files are ignored, and other files are reported. The
    files of each source are sorted by name.
    """
    found: list[Path] = []
    for name in named:
        path = Path(name)
        if is_hub_name(name):
            found += hub_files(name, reporter)
        elif path.is_dir() and not is_saved(path):
            found += _in_folder(path, reporter)
        elif not path.exists() and glob.has_magic(str(name)):
            matches = sorted(map(Path, glob.glob(str(name), recursive=True)))  # noqa: PTH207 a pattern may be absolute
            files = [match for match in matches if match.is_file() or is_saved(match)]
            if not files:
                raise UserError("No file matches this pattern", where=str(name))
            base = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
            reporter.say(f"{name}: {count_of(len(files), 'file')} to read: {_relative_names(files, base)}")
            found += files
        else:
            found.append(path)
    return list(dict.fromkeys(found))


def _in_folder(folder: Path, reporter: Reporter) -> list[Path]:
    below = [path for path in sorted(folder.rglob("*")) if "/." not in f"/{path.relative_to(folder).as_posix()}"]
    saved = [path for path in below if path.is_dir() and is_saved(path)]
    files = [path for path in below if path.is_file() and not any(path.is_relative_to(one) for one in saved)]
    taken = sorted([*saved, *(path for path in files if has_known_suffix(path))])
    others = [path for path in files if path not in set(taken)]
    if not taken:
        raise UserError(
            "The folder has no files of pairs",
            where=str(folder),
            fix=f"Supported suffixes: {', '.join(TEXT_SUFFIXES)} (also with .gz or .zst), {', '.join(OTHER_SUFFIXES)}.",
        )
    reporter.say(f"{folder}: {count_of(len(taken), 'file')} to read: {_relative_names(taken, folder)}")
    if others:
        ignored = f"{count_of(len(others), 'file')} ignored because of the suffix"
        reporter.warn(f"{folder}: {ignored}: {_relative_names(others, folder)}")
    return taken


def is_saved(path: Path) -> bool:
    """Return whether ``Dataset.save_to_disk`` wrote a folder."""
    return any((path / name).is_file() for name in SAVED)


def _relative_names(files: list[Path], folder: Path) -> str:
    return first_of((path.relative_to(folder).as_posix() for path in files), _MOST_NAMED)


# In a Path, the name has one slash after the colon. A revision with a slash is one of the hub's own refs.
_NAME = re.compile(
    r"hf:/{1,2}datasets/(?P<id>[^/@:]+/[^/@:]+)"
    r"(@(?P<revision>refs/(convert|pr)/[^/@:]+|[^/@:]+))?"
    r"(/(?P<inside>[^@:]+))?"
    r"(:(?P<split>[^/@:]+))?"
)
_FORM = "hf://datasets/OWNER/NAME[@REVISION], then /CONFIG and :SPLIT, or /FILE (a pattern works too)"
_CACHED = "datasets--"


@dataclass(frozen=True)
class HubName:
    """A dataset of the hub, and which part of it: ``inside`` is a configuration, a file or a pattern of files."""

    repository: str
    revision: str | None
    inside: str | None
    split: str | None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        inside = f"/{self.inside}" if self.inside else ""
        return f"hf://datasets/{self.repository}{revision}{inside}{f':{self.split}' if self.split else ''}"

    @property
    def names_files(self) -> bool:
        """True if ``inside`` is a path, as in ``huggingface_hub.HfFileSystem``, and not a configuration."""
        return self.inside is not None and (glob.has_magic(self.inside) or has_known_suffix(PurePosixPath(self.inside)))


def is_hub_name(name: str | Path) -> bool:
    """Return whether this names something on the hub, and not a file here."""
    return str(name).startswith("hf:/")


def parse_hub_name(name: str | Path) -> HubName:
    """Return the parts of a name such as ``hf://datasets/openai/gsm8k@main/socratic:train``."""
    match = _NAME.fullmatch(str(name))
    if match is None:
        raise UserError(f"{name} is not the name of a dataset on the hub", where=str(name), fix=f"Expected {_FORM}.")
    hub = HubName(match["id"], match["revision"], match["inside"], match["split"])
    if hub.names_files and hub.split:
        raise UserError("Files have no splits", where=str(hub), fix=f"Leave out :{hub.split}, or name a configuration.")
    return hub


def hub_files(name: str | Path, reporter: Reporter) -> list[Path]:
    """Download the files that a name stands for into the hub's cache, at one commit.

    Files are downloaded and read like files of this machine; no code of the repository is run.
    """
    from huggingface_hub import HfApi, constants, errors, hf_hub_download

    hub = parse_hub_name(name)
    offline = hub_silence(f"{constants.ENDPOINT}/datasets/{hub.repository}")
    if offline is not None:
        return [_find_cached(hub, offline)]
    try:
        with hub_refusals("dataset", hub.repository, hub.revision, str(hub), str(hub)):
            commit = HfApi().dataset_info(hub.repository, revision=hub.revision).sha
            assert commit is not None
            files = _matching(hub, commit) if hub.names_files else _of_split(hub, commit)
            reporter.say(f"{hub}: {count_of(len(files), 'file')} at commit {commit[:12]}")
            with writing(Path(constants.HF_HUB_CACHE)):
                return [
                    Path(hf_hub_download(hub.repository, file, repo_type="dataset", revision=commit)) for file in files
                ]
    except (OSError, errors.HTTPError) as error:
        what = f"The hub ({constants.ENDPOINT}) failed: {error_reason(error)}"
        fix = "Try again, or name files of the dataset that you have here."
        raise UserError(what, where=str(hub), fix=fix) from error


def hub_source(path: Path) -> str | None:
    """Return the name of a file in the hub's cache, with its commit; None for other files."""
    at = next((i for i, part in enumerate(path.parts) if part.startswith(_CACHED)), None)
    if at is None or path.parts[at + 1 : at + 2] != ("snapshots",) or len(path.parts) < at + 4:
        return None
    repository = path.parts[at].removeprefix(_CACHED).replace("--", "/")
    return f"hf://datasets/{repository}@{path.parts[at + 2]}/{'/'.join(path.parts[at + 3 :])}"


def _find_cached(hub: HubName, why: str) -> Path:
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if hub.inside is not None and hub.names_files:
        try:
            return Path(
                hf_hub_download(
                    hub.repository, hub.inside, repo_type="dataset", revision=hub.revision, local_files_only=True
                )
            )
        except LocalEntryNotFoundError:
            pass
    raise UserError(
        f"The hub ({constants.ENDPOINT}) is unreachable: {why}",
        where=str(hub),
        fix="Check the network or HF_ENDPOINT, or name files of the dataset that you have here.",
    )


def _matching(hub: HubName, commit: str) -> list[str]:
    from fsspec.utils import glob_translate  # type: ignore[import-untyped]
    from huggingface_hub import HfApi

    assert hub.inside is not None
    there = HfApi().list_repo_files(hub.repository, revision=commit, repo_type="dataset")
    pattern = re.compile(glob_translate(hub.inside))
    files = sorted(file for file in there if file == hub.inside or pattern.match(file))
    if not files:
        raise UserError("The dataset has no such file", where=str(hub), fix=f"Its files: {first_of(there)}.")
    return files


def _of_split(hub: HubName, commit: str) -> list[str]:
    """Return the files of a configuration's split, as ``datasets`` finds them."""
    import datasets

    datasets.disable_progress_bars()
    try:
        builder = datasets.load_dataset_builder(hub.repository, hub.inside, revision=commit)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(str(error), where=str(hub)) from None
    # A missing or unknown configuration, no data, or a script, which datasets no longer runs.
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        what = " ".join(str(error).split()).partition(" Example of usage")[0]
        raise UserError(
            f"The library datasets cannot find its files: {what}", where=str(hub), fix=f"Expected {_FORM}."
        ) from None
    splits = {str(split): list(files) for split, files in (builder.config.data_files or {}).items()}
    if hub.split is None and len(splits) > 1:
        first = HubName(hub.repository, hub.revision, hub.inside, next(iter(splits)))
        raise UserError(f"Several splits: {', '.join(splits)}", where=str(hub), fix=f"Name one, such as {first}.")
    split = hub.split or next(iter(splits), "")
    if split not in splits:
        raise UserError(f"No split {split!r}", where=str(hub), fix=f"Splits: {', '.join(splits)}.")
    root = f"hf://datasets/{hub.repository}@{commit}/"
    files = [str(file) for file in splits[split]]
    assert all(file.startswith(root) for file in files), files  # datasets refuses files from elsewhere
    return [file.removeprefix(root) for file in files]

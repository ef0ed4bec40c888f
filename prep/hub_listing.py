"""Which files a config of a dataset on the Hub has at which commit, as the Hub says or, offline, as its cache does."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import RepoFile

from prep.sources import KINDS, Pin, kind_of
from prep.transfers import Transfers
from shared.manifest import SourceFile

COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
README = "README.md"
LOCAL_FILES = "read local files: --source FOLDER"


def offline(what: str, instead: str) -> str:
    return f"{what}: not in the Hub's cache, and HF_HUB_OFFLINE is set; unset it, or {instead}"


def pin_now(
    transfers: Transfers, say: Callable[[str], None], spec: str, repository: str, revision: str, config: str | None
) -> Pin:
    """The commit that `revision` is now and the files of `config` there; a sha256 that the Hub does not state is ''."""
    commit = revision if COMMIT.fullmatch(revision) else _commit_of(transfers, spec, repository, revision)
    patterns = patterns_of(_configs(transfers, spec, repository, commit), config, spec)
    if constants.HF_HUB_OFFLINE:
        files = list(_cached_files(cache_of(repository), commit, say))
    else:
        files = [
            file
            for prefix in sorted({prefix_of(pattern) for pattern in patterns})
            for file in _listed_files(transfers, spec, repository, commit, prefix)
        ]
    chosen = {file.name: file for file in files if _is_data(file.name) and _matches(file.name, patterns)}
    if not chosen:
        where = "in the Hub's cache, and HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "there"
        raise ValueError(f"{spec}: no files of {', '.join(KINDS)} {where} (looked for {', '.join(patterns)})")
    return Pin(commit, list(chosen.values()))


def patterns_of(configs: list[dict[str, Any]], config: str | None, spec: str) -> list[str]:
    """The patterns of a config's files, whatever their split, from the `configs` of the dataset's card."""
    named = {str(entry["config_name"]): entry for entry in configs}
    if not named and config is None:
        return ["**"]
    if config is None:
        config = next((name for name, entry in named.items() if entry.get("default")), "default")
        config = next(iter(named)) if len(named) == 1 else config
    if config not in named:
        known = ", ".join(list(named)[:10]) + (" and others" if len(named) > 10 else "")
        raise ValueError(f"{spec}: no config {config!r}; add ?config=NAME to --source; there are: {known or 'none'}")
    files = named[config].get("data_files", "**")
    entries = files if isinstance(files, list) else [files]
    paths = [entry["path"] if isinstance(entry, dict) else entry for entry in entries]
    folder = str(named[config].get("data_dir") or "")
    flat = [path for some in paths for path in (some if isinstance(some, list) else [some])]
    return [f"{folder}/{path}".removeprefix("./").strip("/") for path in flat]


def prefix_of(pattern: str) -> str:
    """The folder that holds all that `pattern` can match."""
    folder: list[str] = []
    for part in pattern.split("/")[:-1]:
        if re.search(r"[*?\[]", part):
            break
        folder.append(part)
    return "/".join(folder)


def _matches(name: str, patterns: list[str]) -> bool:
    return any(re.fullmatch(_regex(pattern), name) for pattern in patterns)


def _regex(pattern: str) -> str:
    """A glob as a regular expression: `**` crosses folders, `*` and `?` do not; a folder stands for what is in it."""
    parts = {"**/": r"(?:.*/)?", "**": r".*", "*": r"[^/]*", "?": r"[^/]"}
    words = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern)
    glob = "".join(parts.get(word) or (word if word.startswith("[") else re.escape(word)) for word in words)
    return glob + r"(?:/.*)?"


def _is_data(name: str) -> bool:
    hidden = any(part.startswith((".", "__")) for part in name.split("/"))
    return kind_of(name) is not None and not hidden


def _commit_of(transfers: Transfers, spec: str, repository: str, revision: str) -> str:
    if not constants.HF_HUB_OFFLINE:
        return str(transfers.call(spec, lambda: HfApi().dataset_info(repository, revision=revision).sha))
    try:
        return (cache_of(repository) / "refs" / revision).read_text()
    except OSError:
        raise ValueError(offline(f"{spec}: the commit of {revision}", LOCAL_FILES)) from None


def _configs(transfers: Transfers, spec: str, repository: str, commit: str) -> list[dict[str, Any]]:
    """The `configs` of the dataset's card; none without a card."""
    path = try_to_load_from_cache(repository, README, revision=commit, repo_type="dataset")
    if path is None and constants.HF_HUB_OFFLINE:
        raise ValueError(offline(f"{spec}: {README}", LOCAL_FILES))
    if path is None:
        path = transfers.call(spec, lambda: _download_card(repository, commit))
    if not isinstance(path, str):
        return []
    try:
        return DatasetCard.load(path, ignore_metadata_errors=True).data.get("configs") or []
    except ValueError as error:
        raise ValueError(f"{spec}: {README}: {error}") from None


def _download_card(repository: str, commit: str) -> str | None:
    try:
        return hf_hub_download(repository, README, revision=commit, repo_type="dataset")
    except EntryNotFoundError as error:
        if getattr(error, "response", None) is None:  # no answer, which is another matter than no such file
            raise
        return None


def _listed_files(transfers: Transfers, spec: str, repository: str, commit: str, prefix: str) -> Iterator[SourceFile]:
    def tree() -> list[Any]:
        return list(
            HfApi().list_repo_tree(repository, prefix or None, recursive=True, revision=commit, repo_type="dataset")
        )

    for item in transfers.call(spec, tree):
        if isinstance(item, RepoFile):
            yield SourceFile(item.path, item.size, item.lfs.sha256 if item.lfs else "")


def cache_of(repository: str) -> Path:
    """Where the Hub's client keeps what it has of a dataset."""
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="dataset")


def _cached_files(cache: Path, commit: str, say: Callable[[str], None]) -> Iterator[SourceFile]:
    """The files of a commit: by the listing that a whole-repository download left, else those that are there."""
    try:
        listing = json.loads((cache / "trees" / f"{commit}.json").read_bytes())["files"]
        for name, entry in listing.items():
            yield SourceFile(name, entry.get("lfs_size") or entry["size"], entry.get("lfs_sha256") or "")
        return
    except (OSError, ValueError, KeyError):
        say("HF_HUB_OFFLINE is set: taking the files in the Hub's cache; whether the dataset has more is not known")
    folder = cache / "snapshots" / commit
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            blob = path.resolve().name  # the cache names large files by their sha256
            sha256 = blob if SHA256.fullmatch(blob) else ""
            yield SourceFile(str(path.relative_to(folder)), path.stat().st_size, sha256)

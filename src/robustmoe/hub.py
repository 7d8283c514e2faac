"""Runs on the Hugging Face hub: a repository holds a run's weights, what they are, and a model card.

What comes from there is data: no pickle is read, no code is run, and weights are taken only where they hold the
SHA-256 that they were written with."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from robustmoe import spec
from robustmoe.errors import UserError
from robustmoe.progress import note
from robustmoe.records import check_folder, contents, read_config, write_atomic, writing
from robustmoe.records.files import explained
from robustmoe.records.weights import model_of

PREFIX = "hub:"
FILES = ("config.json", "model.safetensors")
CARD = "README.md"
MARK = "robustmoe"
"""The library that a model card of ours names."""

LARGEST = {"config.json": 1 << 20, CARD: 1 << 24}
"""Bytes that a text may have which was written elsewhere."""

_OURS = {*FILES, CARD, ".gitattributes"}
_WORD = "[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_NAME = re.compile(rf"(?P<repo>{_WORD}/{_WORD})(?:@(?P<revision>[A-Za-z0-9_./-]+))?")
_LONGEST = 96
"""Characters of NAME, by the hub's rules; "--" and ".." are not in OWNER/NAME."""


def parsed(name: str) -> tuple[str, str | None]:
    """Returns repository and revision of OWNER/NAME or OWNER/NAME@REVISION, with or without "hub:"."""
    match = _NAME.fullmatch(name.removeprefix(PREFIX))
    if match is None or ".." in name or "--" in match["repo"] or len(match["repo"].partition("/")[2]) > _LONGEST:
        raise UserError(f"{name!r:.120} names nothing on the hub; expected OWNER/NAME, or OWNER/NAME@REVISION")
    return match["repo"], match["revision"]


def folder_of(repo: str, revision: str | None = None) -> Path:
    """Returns where a repository is pulled to by default. No two share a folder: neither holds "--" nor "@"."""
    at = f"@{quote(revision, safe='')}" if revision else ""
    return Path("runs") / f"hub-{repo.replace('/', '--')}{at}"


def push_folder(folder: Path, repo: str, public: bool, message: str) -> str:
    """Puts the files of a folder that `robustmoe.reporting.sharing.share` wrote into a repository, in one commit;
    returns its address. A repository that is not there is made, a private one unless ``public``. UserError where it
    holds something that is not ours.
    """
    repo, revision = parsed(repo)
    if revision is not None:
        raise UserError(f"push makes a new revision of {repo}; leave @{revision} out")
    api, errors = _api()
    with _told(errors, repo):
        api.whoami()  # a missing token is told before anything is made
        info = _info(api, errors, repo, None)
        files = _names(info)
        strangers = sorted(files - _OURS) or (sorted(files & {*FILES, CARD}) if not _ours(info) else [])
        if strangers:
            raise UserError(f"{repo} holds something else than a robustmoe model ({strangers[0]}); choose another name")
        if info is None:
            api.create_repo(repo, private=not public, exist_ok=True)
        done = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    return f"{api.endpoint}/{repo} (commit {done.oid[:7]}, {_visibility(info, public)})"


def _visibility(info: Any, public: bool) -> str:
    if info is None:
        return "public" if public else "private; --public makes it for all"
    return f"{'private' if info.private else 'public'}, as it was"


def pull(name: str, out: str | os.PathLike[str] | None = None, revision: str | None = None) -> Path:
    """Return a run folder of what OWNER/NAME on the hub holds, for `load_model` and all that takes a run (needs the
    extra ``hub``).

    ``revision``: a branch, tag or commit (default: main); OWNER/NAME@REVISION says the same. The files go to ``out``,
    by default runs/hub-OWNER--NAME, once: a folder that has them already is returned as it is, and what is measured is
    written there beside them. UserError where the repository is no robustmoe run, or a file is damaged."""
    repo, said = parsed(name)
    if said and revision and said != revision:
        raise UserError(f"{name} and revision {revision} are two revisions; expected one of them")
    revision = revision or said
    folder = Path(out) if out is not None else folder_of(repo, revision)
    if out is None and (folder / "config.json").is_file():
        _check(folder, str(folder))
        return folder
    _check_room(folder, out is None)
    with tempfile.TemporaryDirectory(prefix="robustmoe-") as place:
        commit = _fetch(repo, revision, Path(place))
        _check(Path(place), repo)
        with writing(folder):
            _check_room(folder, out is None)
            files = {path.name: path for path in contents(place)}
            for file in [each for each in (CARD, "model.safetensors", "config.json") if each in files]:
                with explained("read", files[file]):
                    write_atomic(folder / file, files[file].read_bytes())
    note(f"{repo}, commit {commit}, is in {folder}")
    return folder


def _check_room(folder: Path, by_default: bool) -> None:
    """UserError unless a run can start in the folder, or an earlier pull there was stopped: config.json comes last."""
    if (folder / "config.json").is_file():
        raise UserError(f"{folder} already holds a run; choose another --out")
    stopped = {path.name for path in contents(folder)} <= {CARD, "model.safetensors"}
    if not (by_default and stopped and folder.is_dir()):
        check_folder(folder, resume=False)


def _fetch(repo: str, revision: str | None, place: Path) -> str:
    """Downloads our files of a repository into ``place``; returns the commit that they are of."""
    api, errors = _api()
    with _told(errors, repo):
        info = _info(api, errors, repo, revision)
        if info is None:
            raise UserError(f"there is no repository {repo} on {api.endpoint}, or you may not read it; check the name")
        if missing := set(FILES) - _names(info):
            raise UserError(
                f"{repo} is not a robustmoe run: it has no {min(missing)}; of other code's weights download the file, "
                "then robustmoe import FILE --as MODEL"
            )
        sizes = {file.rfilename: file.size or 0 for file in info.siblings}
        for file, most in LARGEST.items():
            if sizes.get(file, 0) > most:
                raise UserError(f"{repo}: its {file} has {sizes[file]} bytes, expected at most {most}")
        wanted = [file for file in (*FILES, CARD) if file in sizes]
        for file in wanted:
            api.hf_hub_download(repo, file, revision=info.sha, local_dir=place)
    return str(info.sha)


def _check(folder: Path, source: str) -> None:
    """UserError where the folder does not hold a whole run of ours, whose model is ours too."""
    config = read_config(folder)
    model = str(config["model"])
    if spec.own_names(model):
        raise UserError(f"{source}: its model is {model}, code that is not in it; expected a model of robustmoe")
    written = model_of(folder / "model.safetensors")
    if written is None:
        raise UserError(
            f"{source}: its model.safetensors is not a whole safetensors file of robustmoe (it is damaged, or other "
            "code wrote it); nothing of it was loaded"
        )
    if written != model:
        raise UserError(f"{source}: config.json says {model}, and the weights are of {written}; it was put together")


def _names(info: Any) -> set[str]:
    return set() if info is None else {file.rfilename for file in info.siblings or ()}


def _ours(info: Any) -> bool:
    return info is None or info.library_name == MARK or not _names(info) & {*FILES, CARD}


def _info(api: Any, errors: Any, repo: str, revision: str | None) -> Any:
    """Returns what the hub says of a repository; None where there is none."""
    try:
        return api.model_info(repo, revision=revision, files_metadata=True)
    except errors.GatedRepoError:
        raise
    except errors.RepositoryNotFoundError:
        return None


def _api() -> tuple[Any, Any]:
    try:
        hub = importlib.import_module("huggingface_hub")
        if not sys.stderr.isatty():  # its bars would stand in front of an error
            importlib.import_module("huggingface_hub.utils").disable_progress_bars()
        return hub.HfApi(), importlib.import_module("huggingface_hub.errors")
    except ImportError as error:
        raise UserError(f"the hub needs huggingface_hub ({error}); pip install 'robustmoe[hub]'") from None


@contextlib.contextmanager
def _told(errors: Any, repo: str) -> Iterator[None]:
    """What the hub's library raises, as one line."""
    try:
        yield
    except UserError:
        raise
    except errors.LocalTokenNotFoundError:
        raise UserError("the hub does not know who you are; run hf auth login, or set HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{repo} has no such revision; name a branch, a tag or a commit of it") from None
    except errors.GatedRepoError:
        raise UserError(f"{repo} is gated; ask for access on its page, and run hf auth login") from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        said = getattr(error, "server_message", None) or str(error)
        what = "check your token (hf auth whoami) and its right to write there" if status in (401, 403) else "try again"
        raise UserError(f"the hub refuses {repo} ({status}: {said}); {what}") from error
    except Exception as error:  # no network, a proxy, a full disk: each library below raises its own
        cause = error.__cause__ or error
        raise UserError(
            f"the hub cannot be reached for {repo} ({type(cause).__name__}: {cause}); nothing was changed here, so "
            "try again"
        ) from error

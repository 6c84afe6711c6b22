"""Bring folders of weights to the Hub: the commands ``push`` and ``publish`` of ``python -m timm_ait.hub``."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import CommitOperationAdd, HfApi, get_hf_file_metadata, get_token, hf_hub_download, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from timm.models import PretrainedCfg

from timm_ait import __version__
from timm_ait.card import ARGUMENTS, default_repo
from timm_ait.pretrained import FILENAME, HUB_ORGANISATION, REFUSED_TOKEN, WeightsError, named, pinned_sha256, status_of

__all__ = ['left_out', 'listing', 'publish', 'push']

COLLECTION = 'Associative Transformer'
FILES = (FILENAME, 'config.json', 'README.md')
BESIDE = ('config.json', 'README.md', ARGUMENTS)
ADVICE = {
    401: REFUSED_TOKEN,
    403: "you may not write there: take a token with the role 'write', of a member of the organisation",
    404: 'it knows no such organisation or repository: check the names',
}


def push(folder: Path, repo_id: str = '', private: bool = False) -> str:
    """Upload a folder of :func:`export` in one commit, and check that its weights have arrived.

    Args:
        folder: Folder of the weights. The card gets the name of the repository, nothing else is changed.
        repo_id: 'organisation/name'. By default the organisation of this package and the name of the folder.
        private: Make a new repository private.

    Returns:
        The address of the repository.

    Raises:
        ValueError: If the folder is not whole, or does not load, or if the Hub takes no repository of this name.
        WeightsError: If no user is logged in, if the Hub cannot be used, or if it then holds other weights.
    """
    folder = folder.resolve()  # '.' has no name
    repo_id = repo_id or default_repo(folder)
    _check_name(repo_id)
    _check(folder)
    _require_login()
    return _upload(folder, repo_id, private)


def publish(organisation: str, folder: Path, dry_run: bool = False) -> list[str]:
    """Upload every folder MODEL.TAG in ``folder`` that the Hub does not hold yet, and collect all in one collection.

    Args:
        organisation: Owner of the repositories.
        folder: Holds the folders that :func:`export` has written.
        dry_run: Check the folders and say what would be done, without the network.

    Returns:
        Lines that say what was done, then the lines for the catalogue.

    Raises:
        ValueError: If there is no such folder, or if a folder in it is not whole or has a name that the Hub does not
            take. Then nothing is uploaded.
        WeightsError: If no user is logged in, if the Hub cannot be used, or if weights did not arrive.
    """
    folders = _named_folders(folder)
    repos = {f'{organisation}/{each.name}': each for each in folders}
    for repo in repos:
        _check_name(repo)
    lines = [line for each in folders for line in left_out(each)]
    lines.append('to list them as pretrained, import published in timm_ait/ait.py and write at their tags:')
    lines += map(listing, folders)
    if organisation != HUB_ORGANISATION:
        lines.append(f"and in timm_ait/pretrained.py: HUB_ORGANISATION = '{organisation}'")
    if dry_run:
        done = [f'{each}: would create or update {repo}, unless it is the same' for repo, each in repos.items()]
        return [*done, f"would add {len(repos)} to the collection '{COLLECTION}' of {organisation}", *lines]
    _require_login()
    done = []
    try:
        for repo, each in repos.items():
            done.append(f'unchanged: {repo}' if _is_on_hub(each, repo) else f'published: {_upload(each, repo)}')
        with _step(f'collecting in {organisation}', 'all weights are on the Hub'):
            collection = HfApi().create_collection(COLLECTION, namespace=organisation, exists_ok=True)
            for repo in repos:
                HfApi().add_collection_item(collection.slug, repo, 'model', exists_ok=True)
    except WeightsError as error:
        raise WeightsError(f'{error}. Done before: {", ".join(done) or "nothing"}') from error
    return [*done, f'collection: {collection.url}', *lines]


def listing(folder: Path) -> str:
    """Return the line that lists the weights of a folder in the catalogue."""
    return f"**published('{folder.name}', '{_pinned(folder)}')"


def left_out(folder: Path) -> list[str]:
    """Return a line that names what else lies in a folder of weights, and is not uploaded; [] if nothing does."""
    others = {path.name for path in folder.iterdir() if not path.name.startswith('.')} - {*FILES, *BESIDE}
    return [f'not uploaded from {folder}: {", ".join(sorted(others))}'] if others else []


def _named_folders(folder: Path) -> list[Path]:
    """List the folders of weights in ``folder``, each of which is whole and named after its model."""
    if not folder.is_dir():
        raise ValueError(f'there is no folder {folder}; write folders MODEL.TAG into it with export')
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith('.'))
    if not folders:
        raise ValueError(f'{folder} holds no folder MODEL.TAG; write one with export')
    for each in folders:
        _check(each)
        model, (named, _, tag) = _config(each)['architecture'], each.name.partition('.')
        if named != model or not tag:
            raise ValueError(f'{each} holds a model {model}, so its name must be {model}.TAG; rename it')
    return folders


def _check_name(repo_id: str) -> None:
    """Refuse a name that the Hub would refuse."""
    reason = '' if repo_id.count('/') == 1 else 'it needs one /'
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        reason = reason or str(error)
    if reason:
        raise ValueError(f'expected ORGANISATION/NAME, got {repo_id!r} ({reason}); give another, or rename the folder')


def _check(folder: Path) -> None:
    """Load a folder as a user will, with a sha256 to compare its weights with."""
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(f'{folder} has no {", ".join(missing)}; write it again with export')
    try:
        timm.create_model(f'local-dir:{folder}', pretrained=True)
        if not _pinned(folder):
            raise ValueError('no sha256 in the notes of config.json')
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f'{folder} does not load ({error}); write it again with export') from error


def _config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / 'config.json').read_text(encoding='utf-8')))


def _pinned(folder: Path) -> str:
    """Return the sha256 in a config, or ''."""
    return pinned_sha256(PretrainedCfg(notes=_config(folder)['pretrained_cfg'].get('notes')))


def _upload(folder: Path, repo_id: str, private: bool = False) -> str:
    """Upload a folder in one commit, which the Hub stores as a whole or not at all."""
    api = HfApi(library_name='timm_ait', library_version=__version__)
    with _step(f'making the repository {repo_id}', 'nothing was uploaded to it'):
        api.create_repo(repo_id, private=private, exist_ok=True)
    with _step(f'uploading to {repo_id}', 'its files are all as before, or all new'):
        contents: dict[str, Any] = {FILENAME: folder / FILENAME, **_files(folder, repo_id)}
        added = [CommitOperationAdd(name, content) for name, content in contents.items()]
        api.create_commit(repo_id, added, commit_message=f'{folder.name}, timm_ait {__version__}')
    with _step(f'checking {repo_id}', 'its files are uploaded'):
        arrived = get_hf_file_metadata(hf_hub_url(repo_id, FILENAME)).etag
    if arrived != _pinned(folder):
        raise WeightsError(f'{FILENAME} in {repo_id} has the sha256 {arrived}, not that of {folder}: push again')
    return f'{api.endpoint}/{repo_id}'


def _files(folder: Path, repo_id: str) -> dict[str, bytes]:
    """Read the files beside the weights as the repository is to hold them, by name."""
    files = {name: (folder / name).read_bytes() for name in BESIDE if (folder / name).is_file()}
    return files | {'README.md': _rename_card(files['README.md'].decode(), repo_id).encode()}


def _rename_card(card: str, repo_id: str) -> str:
    """Write the name of the repository in the place of that of the folder which the card was written for."""
    title = re.search(r'^# Model card for (.+)$', card, re.MULTILINE)
    old = re.escape(title[1]) if title else r'[\w.-]+'
    card = re.sub(rf'hf-hub:{HUB_ORGANISATION}/({old}|[\w.-]+)', f'hf-hub:{repo_id}', card)
    places = r'model_name: |- name: |# Model card for |\| '
    new = repo_id.partition('/')[2]
    return re.sub(rf'^({places}){old}(?=$| \|)', rf'\g<1>{new}', card, flags=re.MULTILINE) if title else card


def _is_on_hub(folder: Path, repo_id: str) -> bool:
    """Say whether the Hub holds all files of a folder."""
    with _step(f'looking at {repo_id}', 'nothing was changed in it'):
        try:
            return get_hf_file_metadata(hf_hub_url(repo_id, FILENAME)).etag == _pinned(folder) and all(
                Path(hf_hub_download(repo_id, name)).read_bytes() == content
                for name, content in _files(folder, repo_id).items()
            )
        except (RepositoryNotFoundError, EntryNotFoundError):
            return False


def _require_login() -> None:
    if not get_token():
        raise WeightsError('you are not logged in to the Hub: run `hf auth login`, or set HF_TOKEN')


@contextmanager
def _step(doing: str, state: str) -> Iterator[None]:
    """Say in one message which step failed, why, and in which state the Hub is."""
    try:
        yield
    except Exception as error:  # the client's errors have no common base class and change with its version
        cause: BaseException = error
        while status_of(cause) is None and cause.__cause__ is not None:
            cause = cause.__cause__
        status = status_of(cause)
        reason = f'no answer ({named(cause)})'
        if status is not None:
            own = _own_text(error, cause)
            advice = ADVICE.get(status, '' if own else named(cause))
            reason = f'the Hub answered {status}{own}' + (f', {advice}' if advice else '')
        raise WeightsError(f'{doing} failed: {reason}; {state}. Run the same command again, it goes on') from error


def _own_text(error: Exception, cause: BaseException) -> str:
    """Return what the Hub itself says of its refusal, in brackets and one line; '' if it says nothing."""
    said = getattr(cause, 'server_message', None)
    about = str(error).partition('\n')[0] if said and error is not cause else ''  # for instance, which file it refuses
    return f' ({" ".join(f"{about} {said}".split())})' if said else ''

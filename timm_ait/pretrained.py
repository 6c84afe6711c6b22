"""Find pretrained weights, download them and verify them, before timm reads the file.

timm describes weights by a ``PretrainedCfg``. Here its field ``notes`` holds the sha256 of the file, as
``'sha256:<64 hex digits>'``. It stands in ``default_cfgs`` for a tag, and in config.json for a folder. If a file of the
Hub has no such note, it is compared with the sha256 under which the Hub stores it.

The weights of a tag with such a note are looked for in this package, in the folders of TIMM_AIT_WEIGHTS, in the
checkout that this package is run from, and on the Hub, in this order. A damaged file counts as absent.
"""

import errno
import hashlib
import logging
import os
import re
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from timm.models import PretrainedCfg, resolve_pretrained_cfg

__all__ = [
    'HUB_ORGANISATION',
    'MIRRORS',
    'WeightsError',
    'fetch_weights',
    'packaged',
    'pinned_sha256',
    'published',
    'resolve_cfg',
    'sha256_of',
]

# The organisation on the Hub. It is named here alone: `published`, model cards and `python -m timm_ait.hub` read it.
HUB_ORGANISATION = 'timm-ait'
MIRRORS = 'TIMM_AIT_WEIGHTS'
FILENAME = 'model.safetensors'
PICKLE = 'pytorch_model.bin'  # as timm saves a folder unless it is told otherwise
WEIGHTS = Path(__file__).parent / 'weights'
SOURCES = ('file', 'state_dict', 'hf_hub_id', 'url')

OWN_FILE = "load a file of your own with pretrained_cfg_overlay=dict(file='PATH')"
UNREACHED = 'the Hub was not reached'
REFUSED_TOKEN = 'it does not accept your token: run `hf auth login`, or set HF_TOKEN'
EXPLANATIONS: tuple[tuple[type[Exception], str], ...] = (
    (GatedRepoError, 'its owner must grant access: accept the terms on its page, then log in with `hf auth login`'),
    (RepositoryNotFoundError, 'there is no such repository, or it is private: check its name, or run `hf auth login`'),
    (RevisionNotFoundError, 'the repository has no such revision: leave out the part after @ for the newest one'),
    (EntryNotFoundError, f'the repository has no such file, and a pickle is not read in its place: {OWN_FILE}'),
)
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MISSING = 'is missing'
PICKLES = (b'\x80\x02', b'\x80\x04')  # as torch and pickle begin files that are no zip
NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)

_logger = logging.getLogger(__name__)


class WeightsError(RuntimeError):
    """Pretrained weights cannot be loaded, or are not those that were published."""


def published(name: str, sha256: str) -> dict[str, Any]:
    """Return the keys of a config for weights on the Hub; ``name`` is 'model.tag'."""
    return {
        'hf_hub_id': f'{HUB_ORGANISATION}/{name}',
        'hf_hub_filename': FILENAME,
        'notes': (f'sha256:{sha256}',),
    }


def packaged(name: str, sha256: str) -> dict[str, Any]:
    """Return the keys of a config for weights inside this package; ``name`` is 'model.tag'."""
    return {'file': str(WEIGHTS / f'{name}.safetensors'), 'notes': (f'sha256:{sha256}',)}


def pinned_sha256(cfg: PretrainedCfg) -> str:
    """Return the sha256 in the notes of a config, or ''."""
    return next((note.removeprefix('sha256:') for note in cfg.notes or () if note.startswith('sha256:')), '')


def sha256_of(path: Path) -> str:
    """Compute the sha256 of a file, in hex digits."""
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def resolve_cfg(
    variant: str,
    pretrained_cfg: str | dict[str, Any] | None,
    overlay: dict[str, Any] | None,
    saved_args: dict[str, Any] | None = None,
) -> PretrainedCfg:
    """Find a config as timm does. If ``overlay`` names a source, it replaces all sources of the config and their hash.

    Args:
        variant: Entry point.
        pretrained_cfg: Tag, or the content of a config.json.
        overlay: Keys that the user replaces.
        saved_args: ``model_args`` of that config.json.

    Raises:
        ValueError: If config.json gives two numbers of classes. timm would take one of them and a random classifier.
    """
    overlay = dict(overlay or {})
    if any(overlay.get(key) for key in SOURCES):
        overlay = {**dict.fromkeys((*SOURCES, 'source', 'notes')), **overlay}
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
    classes = (saved_args or {}).get('num_classes', cfg.num_classes)
    if classes != cfg.num_classes and 'num_classes' not in overlay:
        raise ValueError(
            f'config.json of {cfg.hf_hub_id or cfg.file} gives num_classes={cfg.num_classes}, but {classes} in its '
            'model_args; write the number of classes of the weights in both places'
        )
    return cfg


def fetch_weights(cfg: PretrainedCfg, cache_dir: str | Path | None = None) -> Path | None:
    """Return the file that a config names, downloaded if need be, and verified.

    Returns:
        A path. None if there is no file to verify: the user gave a state dict or a URL, which timm reads itself.

    Raises:
        WeightsError: With the file, the reason and what to do.
    """
    if cfg.source == 'hf-hub':
        return _from_hub(cfg, cache_dir)
    if cfg.source == 'local-dir':
        return _verified(Path(cfg.file or '') / FILENAME, pinned_sha256(cfg))
    if cfg.state_dict:
        return None
    if pinned_sha256(cfg) and (cfg.hf_hub_id or Path(cfg.file or '').parent == WEIGHTS):
        return _first_whole_copy(cfg, cache_dir)
    if cfg.file:
        path = _verified(Path(cfg.file), pinned_sha256(cfg))
        if path.suffix == '.npz' and not cfg.custom_load:
            raise WeightsError(f'{path} is a file of JAX: add custom_load=True to pretrained_cfg_overlay')
        return path
    if cfg.hf_hub_id:
        return _from_hub(cfg, cache_dir)
    if cfg.url:
        return None
    name = f'{cfg.architecture}.{cfg.tag}' if cfg.tag else cfg.architecture
    raise WeightsError(
        f'no weights have been published for {name}: leave out pretrained=True and train it; {OWN_FILE}; '
        "or, to classify images, start from a ViT with timm.create_model('ait_vit_base_patch16_224', pretrained=True). "
        "To list the published weights: timm.list_models(module='ait', pretrained=True)"
    )


def _first_whole_copy(cfg: PretrainedCfg, cache_dir: str | Path | None) -> Path:
    """Return the first file with the hash of the config, from the places on this machine, then from the Hub."""
    repo = (cfg.hf_hub_id or '').partition('@')[0]
    name = repo.rpartition('/')[2] or Path(cfg.file or '').name.removesuffix('.safetensors')
    tried = []
    for path, advice in _places(name, cfg.file):
        reason = _damage(path, pinned_sha256(cfg))
        if not reason:
            return path
        tried.append(f'{path} {reason}: {advice}')
        folder = path.parent if cfg.file or path.parent != WEIGHTS else path
        if reason != MISSING or folder.exists() or not folder.parent.exists():  # else it does not offer this model
            _logger.warning('%s; looking in the next place', tried[-1])
    if repo:
        try:
            return _from_hub(cfg, cache_dir)
        except WeightsError as error:
            tried.append(str(error))
    steps = '\n'.join(f'{number}. {step}' for number, step in enumerate(tried, 1))
    raise WeightsError(
        f'no weights for {name}. Tried in this order:\n{steps}\n'
        f'Mend one of these places; or set {MIRRORS} to a folder that holds {name}/{FILENAME}; or {OWN_FILE}'
    )


def _places(name: str, file: str | None) -> Iterator[tuple[Path, str]]:
    """List the files on this machine that may hold the weights ``name``, and what to do if one is missing or damaged.

    Args:
        name: 'model.tag'.
        file: File that the config names, if it names one.
    """
    package = WEIGHTS / f'{name}.safetensors'
    yield Path(file or package), 'install timm_ait again' if file else 'only small models come with the package'
    for folder in os.environ.get(MIRRORS, '').split(os.pathsep):
        if folder:
            yield Path(os.path.expanduser(folder)) / name / FILENAME, f'check {MIRRORS}, or copy the file there again'
    checkout = WEIGHTS.parents[1] / 'benchmarks' / 'weights'
    copy = checkout / name / FILENAME
    if checkout.is_dir() and copy.resolve() != package.resolve():  # and no link to it
        yield copy, 'get it again from the repository of this package'


def _verified(path: Path, sha256: str) -> Path:
    """Verify a file on this machine. timm reads other formats than safetensors itself, with ``weights_only=True``."""
    if not path.is_file():
        pickle = path.with_name(PICKLE)
        if path.name == FILENAME and pickle.is_file():
            raise WeightsError(f'there is no file {path}, but {_pickle_alone(pickle)}')
        raise WeightsError(
            f'there is no file {path}: check the path; a folder of weights holds config.json and {FILENAME}'
        )
    is_verified = sha256 or path.suffix == '.safetensors'
    reason = _damage(path, sha256) if is_verified else damage_of_pickle(path)
    if reason:
        raise WeightsError(f'{path} {reason}: download or copy it again')
    return path


def damage_of_pickle(path: Path) -> str:
    """Say that a file is none that torch writes, as the end of a sentence; '' if it may be one."""
    is_one = zipfile.is_zipfile(path) or _start_of(path) in PICKLES
    return '' if is_one else 'is no whole checkpoint'


def _pickle_alone(path: Path) -> str:
    return (
        f'{path.name}, a pickle, which is not read in its place: save the model with safe_serialization=True, or load '
        f'this file with pretrained_cfg_overlay=dict(file={str(path)!r})'
    )


def _damage(path: Path, sha256: str) -> str:
    """Say what is wrong with a safetensors file, as the end of a sentence; '' if it is whole."""
    try:
        if not path.is_file():
            return MISSING
        with safe_open(path, 'pt') as file:
            file.keys()
        found = sha256_of(path) if sha256 else ''
    except OSError as error:
        return f'cannot be read ({error})'
    except SafetensorError as error:
        is_pickle = _start_of(path) in (b'PK', *PICKLES)
        return 'is a pickle, which is never read here' if is_pickle else f'is no whole safetensors file ({error})'
    return f'has the sha256 {found}, but {sha256} was published' if found != sha256 else ''


def _start_of(path: Path) -> bytes:
    with path.open('rb') as file:
        return file.read(2)


def _from_hub(cfg: PretrainedCfg, cache_dir: str | Path | None) -> Path:
    """Return a file of the Hub. If it is damaged, download it once more; if that is damaged too, remove it.

    A whole file that is not the one that was published stays in the cache: others may use it.
    """
    repo, _, revision = (cfg.hf_hub_id or '').partition('@')
    filename = cfg.hf_hub_filename or FILENAME
    if not filename.endswith('.safetensors'):
        raise WeightsError(
            f'{filename} of {repo} is no safetensors file: give another name in hf_hub_filename, or {OWN_FILE}'
        )
    download = partial(_download, repo, filename, revision or None, cache_dir)
    path = download()
    reason = _damage(path, pinned_sha256(cfg) or _stored_sha256(path))
    if not reason:
        return path
    url = hf_hub_url(repo, filename, revision=revision or None)
    stored = _stored_sha256(path)
    if stored and not _damage(path, stored):
        raise WeightsError(f'{url} {reason}: install a newer timm_ait, or {OWN_FILE}')
    if constants.HF_HUB_OFFLINE:
        raise WeightsError(f'{path} {reason}, and HF_HUB_OFFLINE forbids to download it again: unset it, or {OWN_FILE}')
    _logger.warning('%s %s; downloading it again', path, reason)
    try:
        path = download(force=True)  # which replaces the file, so that other processes never find it gone
    except WeightsError as error:
        raise WeightsError(f'{path} {reason}, and the second download failed: {error}') from error
    reason = _damage(path, pinned_sha256(cfg) or _stored_sha256(path))
    if reason:
        _discard(path)
        raise WeightsError(f'{url} {reason}: it was removed; try again, or install a newer timm_ait')
    return path


def _stored_sha256(path: Path) -> str:
    """Return the sha256 under which the Hub stores a large file: the name of its blob in the cache, or ''."""
    name = Path(os.readlink(path)).name if path.is_symlink() else ''
    return name if re.fullmatch('[0-9a-f]{64}', name) else ''


def _discard(path: Path) -> None:
    """Remove a damaged file from the Hub's cache: the link in the snapshot and the blob that it points to."""
    try:
        if path.is_symlink():
            (path.parent / os.readlink(path)).unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    except OSError as error:
        raise WeightsError(
            f'{path} is damaged and cannot be removed ({error.strerror}): remove it, or set HF_HOME or cache_dir='
        ) from error


def _download(
    repo: str, filename: str, revision: str | None, cache_dir: str | Path | None, force: bool = False
) -> Path:
    where: dict[str, Any] = dict(revision=revision, cache_dir=cache_dir)
    try:
        return Path(hf_hub_download(repo, filename, **where, force_download=force, library_name='timm_ait'))
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError) as error:
        fault: Exception = error
    except Exception as error:  # the client's network errors have no common base class and change with its version
        cached = try_to_load_from_cache(repo, filename, **where)
        if isinstance(cached, str) and not force:
            _logger.warning('nothing new was loaded from the Hub (%s); using %s', named(error), cached)
            return Path(cached)
        fault = error
        if isinstance(error, ValueError) and isinstance(error.__cause__, Exception):
            fault = error.__cause__  # of a forced download the client says no more than that it failed
    url = hf_hub_url(repo, filename, revision=revision)
    reason, pickle = _explain(fault, cache_dir), try_to_load_from_cache(repo, PICKLE, **where)
    if isinstance(fault, LocalEntryNotFoundError) and isinstance(pickle, str):
        reason = f'{UNREACHED}, and the cache holds {_pickle_alone(Path(pickle))}'
    raise WeightsError(f'no weights from {url}: {reason}') from fault


def _explain(error: Exception, cache_dir: str | Path | None) -> str:
    if isinstance(error, LocalEntryNotFoundError):
        cause = error.__cause__
        reached, step = ('the Hub sent no file', 'try again') if status_of(cause) else (UNREACHED, 'connect once')
        reached += f' ({named(cause)})' if cause else ''
        return f'{reached} and the file is not in the cache: {step}, or {OWN_FILE}'
    for kind, sentence in EXPLANATIONS:
        if isinstance(error, kind):
            return sentence
    if status_of(error) == 401:
        return REFUSED_TOKEN
    if isinstance(error, OSError) and error.errno in DISK_IS_FULL:
        folder = cache_dir or constants.HF_HUB_CACHE
        return f'{folder} has no space for it ({error.strerror}): free some, or set HF_HOME or cache_dir='
    if isinstance(error, OSError) and error.errno in NOT_WRITABLE:
        return f'it cannot be stored ({error}): set HF_HOME or cache_dir= to a folder that you may write to'
    return f'the connection broke ({named(error)}), so nothing was loaded: try again, or {OWN_FILE}'


def status_of(error: BaseException | None) -> int | None:
    """Return the status that the Hub answered with; None if an error is no answer of the Hub."""
    return getattr(getattr(error, 'response', None), 'status_code', None)


def named(error: BaseException) -> str:
    """Return the kind of an error and the first line of its text."""
    return f'{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}'

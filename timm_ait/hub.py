"""Publish a trained model: ``python -m timm_ait.hub export CHECKPOINT FOLDER``, then ``push FOLDER ORG/NAME``.

``export`` turns a checkpoint (of timm's train.py, of the authors' code, or plain weights) into the folder that a Hub
repository is: model.safetensors, config.json, README.md. ``timm.create_model('local-dir:FOLDER', pretrained=True)``
loads it as it will later load from the Hub. ``push`` uploads it, logged in by ``hf auth login`` or by HF_TOKEN.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import HfApi, get_hf_file_metadata, get_token, hf_hub_url
from safetensors import safe_open
from timm.data import resolve_data_config
from timm.models import push_to_hf_hub, save_for_hf
from timm.utils import ParseKwargs

from timm_ait import AssociativeTransformer, __version__
from timm_ait.card import default_repo, write_card
from timm_ait.convert import Checkpoint, fit_pretrained, read_checkpoint
from timm_ait.pretrained import FILENAME, WeightsError, sha256_of

__all__ = ['export', 'push']

DTYPES = ('float32', 'float16', 'bfloat16')
WORKSPACE_ARGS = (
    'num_slots',
    'slot_dim',
    'write_heads',
    'bottleneck',
    'beta',
    'memory_decay',
    'balance_weight',
    'retrieval_steps',
    'write_mode',
    'write_grad',
    'retrieval_scale',
)


def export(
    checkpoint: Path,
    folder: Path,
    model_name: str = '',
    model_kwargs: dict[str, Any] | None = None,
    use_ema: bool = True,
    dtype: str = 'float32',
    results: Path | None = None,
    dataset: str = '',
    commit: str = '',
) -> Path:
    """Write a Hub-ready folder, which is there whole or not at all, and loads back bit for bit.

    Args:
        checkpoint: File of train.py, of the authors' code, or of plain weights.
        folder: Where to; must not exist yet. Called as the model and a tag, as in 'test_ait.cifar10', it names both.
        model_name: Entry point, where the checkpoint does not say it.
        model_kwargs: Arguments of the model beside those in the checkpoint.
        use_ema: Prefer averaged weights.
        dtype: Of the weights in the file; the memory stays float32.
        results: JSON that validate.py wrote (``--results-file results.json --results-format json``).
        dataset: What the results are on.
        commit: Of the code that trained the model; not stated where it is not given.

    Raises:
        ValueError: For a checkpoint that does not fit, or a folder that exists.
    """
    if folder.exists():
        raise ValueError(f'{folder} exists; name another folder or remove it')
    read = read_checkpoint(checkpoint, use_ema)
    model, model_args = _build(read, checkpoint, model_name, model_kwargs or {})
    model.to(getattr(torch, dtype))
    facts = {**read.facts, **_read_results(results)}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / folder.name
        _save(model, made, model_args)
        weights = 'averaged (EMA)' if read.is_ema else 'as trained'
        write_card(made, facts, read.args, dataset, weights, commit, _code_version())
        _compare(model, made)
        made.rename(folder)
    return folder


def _build(
    read: Checkpoint, path: Path, model_name: str, model_kwargs: dict[str, Any]
) -> tuple[AssociativeTransformer, dict[str, Any]]:
    """The model that a checkpoint was made with, holding its weights, and the arguments that make it again."""
    args = read.args
    name = model_name or args.get('model')
    if not name:
        raise ValueError(f'{path} does not say which model it holds; name it with --model')
    head = next((read.state_dict[key] for key in ('head.weight', 'mlp_head.1.weight') if key in read.state_dict), None)
    size = tuple(args.get('input_size') or ())
    known = {
        'num_classes': 0 if head is None else len(head),
        'in_chans': args.get('in_chans') or (size[0] if size else None),
        'img_size': args.get('img_size') or size[1:] or None,
        'global_pool': args.get('gp'),
    }
    kwargs = {**known, **(args.get('model_kwargs') or {}), **model_kwargs}
    model = timm.create_model(name, pretrained_cfg_overlay={'num_classes': kwargs['num_classes']}, **kwargs)
    if not isinstance(model, AssociativeTransformer):
        raise ValueError(f'{name} is no model of this package; timm.models.push_to_hf_hub publishes it')
    model.load_state_dict(fit_pretrained(read.state_dict, model, str(path)))
    args = {**args, 'input_size': (model.in_chans, *model.patch_embed.img_size)}
    model.pretrained_cfg.update(resolve_data_config(args, pretrained_cfg=model.pretrained_cfg, model=model))
    return model, {**kwargs, **_model_args(model)}


def _model_args(model: AssociativeTransformer) -> dict[str, Any]:
    """Arguments of the constructor, said in full so that no default of a later version changes the model."""
    args = {name: getattr(model.blocks[0].mlp, name) for name in WORKSPACE_ARGS}
    args |= {'num_classes': model.num_classes, 'in_chans': model.in_chans, 'global_pool': model.global_pool}
    return {**args, 'img_size': list(model.patch_embed.img_size)}


def _save(model: AssociativeTransformer, folder: Path, model_args: dict[str, Any]) -> None:
    """What timm writes for a model; its config gets the tag in the folder's name and the weights' sha256."""
    model_args = {key: value for key, value in model_args.items() if value is not None}
    save_for_hf(model, str(folder), model_args=model_args, safe_serialization=True)
    path = folder / 'config.json'
    config = json.loads(path.read_text())
    config['pretrained_cfg']['tag'] = folder.name.partition('.')[2]
    config['pretrained_cfg']['notes'] = [f'sha256:{sha256_of(folder / FILENAME)}']
    path.write_text(json.dumps(config, indent=2))
    (folder / FILENAME).chmod(path.stat().st_mode)  # safetensors lets nobody but the owner read it


def _compare(model: AssociativeTransformer, folder: Path) -> None:
    """Load the folder as a user will; nothing is published that comes back as anything else."""
    loaded = _load(folder).state_dict()
    different = [key for key, value in model.state_dict().items() if not torch.equal(value, loaded[key])]
    if different:
        raise WeightsError(f'{folder} does not load back as it was written, first in {different[0]}')


def _load(folder: Path) -> AssociativeTransformer:
    """The model in a folder, in the dtype of its file."""
    model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    with safe_open(folder / FILENAME, 'pt') as file:
        return model.to(file.get_tensor('patch_embed.proj.weight').dtype)


def push(folder: Path, repo_id: str = '', private: bool = False) -> str:
    """Upload a folder of :func:`export` as it is, and compare what has arrived.

    Args:
        folder: Of the weights.
        repo_id: 'organisation/name'; the package's organisation and the folder's name by default.
        private: Whether a new repository is private.

    Returns:
        The address of the repository.

    Raises:
        WeightsError: Without a login, or if the Hub holds other weights than the folder afterwards.
    """
    if not get_token():
        raise WeightsError('nobody is logged in to the Hub: run `hf auth login`, or set HF_TOKEN')
    repo_id = repo_id or default_repo(folder)
    model = _load(folder)
    config = json.loads((folder / 'config.json').read_text())
    pinned = model.pretrained_cfg['notes'] = config['pretrained_cfg']['notes']
    message = f'{folder.name}, timm_ait {__version__}'
    push_to_hf_hub(model, repo_id, message, private=private, model_args=config['model_args'], safe_serialization=True)
    # timm's own card says nothing of this package
    card = (folder / 'README.md').read_text().replace(f'hf-hub:{default_repo(folder)}', f'hf-hub:{repo_id}')
    HfApi().upload_file(path_or_fileobj=card.encode(), path_in_repo='README.md', repo_id=repo_id)
    arrived = get_hf_file_metadata(hf_hub_url(repo_id, FILENAME)).etag
    if f'sha256:{arrived}' not in pinned:
        raise WeightsError(
            f'{repo_id} has a {FILENAME} with the sha256 {arrived}, {folder} says {pinned[0]}: push again'
        )
    return f'{HfApi().endpoint}/{repo_id}'


def _read_results(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    content = json.loads(path.read_text())
    return dict(content[0] if isinstance(content, list) else content)


def _code_version() -> str:
    """This package's version, and its commit where it is a checkout."""
    folder = str(Path(__file__).parent)
    git = subprocess.run(['git', '-C', folder, 'rev-parse', 'HEAD'], capture_output=True, text=True, check=False)
    return f'{__version__} ({git.stdout.strip()})' if git.stdout else __version__


def _listing(folder: Path) -> str:
    return f"**published('{folder.name}', '{sha256_of(folder / FILENAME)}')"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog='python -m timm_ait.hub', description=(__doc__ or '').partition('\n')[0])
    commands = parser.add_subparsers(dest='command', required=True)
    add = commands.add_parser('export', help='checkpoint to Hub-ready folder').add_argument
    add('checkpoint', type=Path)
    add('folder', type=Path, help="call it MODEL.TAG, as in 'ait_small_patch4_32.cifar10'")
    add('--model', default='', help='entry point, where the checkpoint does not say it')
    add('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE')
    add('--no-ema', action='store_true', help='the weights as trained, even where there are averaged ones')
    add('--dtype', choices=DTYPES, default='float32')
    add('--results', type=Path, help='JSON of validate.py: --results-file FILE --results-format json')
    add('--dataset', default='', help="what the results are on, as in 'CIFAR-10 (JPEG)'")
    add('--commit', default='', help='of the code that trained the model')
    add = commands.add_parser('push', help='folder to the Hub; log in first: hf auth login').add_argument
    add('folder', type=Path)
    add('repo_id', nargs='?', default='', help='ORGANISATION/NAME')
    add('--private', action='store_true')
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run one command.

    Raises:
        SystemExit: With one sentence where it fails.
    """
    args = vars(parse(arguments))
    try:
        if args.pop('command') == 'push':
            print(f'published: {push(**args)}')
            print(f'to list it as pretrained, give its tag in timm_ait/ait.py: {_listing(args["folder"])}')
        else:
            args['use_ema'], args['model_name'] = not args.pop('no_ema'), args.pop('model')
            print(f'written and loaded back: {export(**args)}')
    except (ValueError, WeightsError, OSError) as error:
        sys.exit(f'python -m timm_ait.hub: {error}')


if __name__ == '__main__':
    main()

"""Publish a trained model: ``python -m timm_ait.hub export CHECKPOINT FOLDER``, then ``push FOLDER ORG/NAME``.

``export`` reads a checkpoint of timm's train.py or of the authors' code, or a file of weights. It writes a folder as
the Hub holds it: model.safetensors, config.json, README.md, and args.yaml if a run of train.py is known. To try that
folder as a user of the Hub will, call ``timm.create_model('local-dir:FOLDER', pretrained=True)``. ``push`` uploads it,
``publish`` all folders at once. Log in first with ``hf auth login``, or set HF_TOKEN.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.data import resolve_data_config
from timm.models import clean_state_dict, save_for_hf
from timm.utils import ParseKwargs
from torch import Tensor

from timm_ait import AssociativeTransformer, __version__
from timm_ait.arguments import WORKSPACE_ARGS
from timm_ait.card import default_repo, write_card
from timm_ait.convert import fit_pretrained
from timm_ait.pretrained import FILENAME, HUB_ORGANISATION, WeightsError, sha256_of
from timm_ait.publish import listing, publish, push

__all__ = ['Checkpoint', 'build_model', 'export', 'publish', 'push', 'read_checkpoint']

DTYPES = ('float32', 'float16', 'bfloat16')
# What an export keeps of the config that timm wrote beside the weights.
SAVED = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode', 'license')


class Checkpoint(NamedTuple):
    """Content of a checkpoint.

    Attributes:
        state_dict: The weights.
        args: Arguments of train.py; empty if the file holds weights alone.
        is_ema: Whether these are averaged weights.
        facts: Validation metric of these weights, if it is known.
    """

    state_dict: dict[str, Tensor]
    args: dict[str, Any]
    is_ema: bool
    facts: dict[str, Any]


def read_checkpoint(path: Path, use_ema: bool = True) -> Checkpoint:
    """Read a checkpoint of train.py, of the authors' code, or of weights alone. No code in it is run.

    Args:
        path: The file.
        use_ema: Read the averaged weights if there are any.

    Raises:
        ValueError: If the file is missing, is no checkpoint, or holds other things than tensors and plain values.
    """
    if not path.is_file():
        raise ValueError(f'there is no checkpoint {path}; train.py writes output/<experiment>/model_best.pth.tar')
    if path.suffix == '.safetensors':
        try:
            weights = safetensors.torch.load_file(path)
        except SafetensorError as error:
            raise ValueError(f'{path} is no safetensors file ({error}); was it downloaded whole?') from error
        return Checkpoint(clean_state_dict(weights), _saved_args(path.with_name('config.json')), False, {})
    content: Any
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location='cpu', weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of many kinds: whatever the file holds is taken for a pickle
        raise ValueError(
            f'{path} is no checkpoint of tensors and plain values, so it is not read; save the weights alone '
            f'({str(error).partition(chr(10))[0]})'
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f'expected a state dict or a checkpoint of train.py in {path}, got {type(content).__name__}')
    averaged = next((content[key] for key in ('state_dict_ema', 'model_ema') if content.get(key) is not None), None)
    is_ema = use_ema and averaged is not None
    state_dict = averaged if is_ema else content.get('state_dict', content.get('model', content))
    metric = content.get('metric')
    if not isinstance(metric, (int, float)) or (averaged is not None and not is_ema):  # train.py's is of the average
        metric = None
    facts = {} if metric is None else {'metric': metric}
    args = content.get('args') or {}
    return Checkpoint(clean_state_dict(state_dict), dict(args if isinstance(args, dict) else vars(args)), is_ema, facts)


def _saved_args(path: Path) -> dict[str, Any]:
    """Read the config that timm wrote beside the weights, in the names of train.py's arguments."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f'{path} is no JSON ({error}); copy it once more, or remove it') from error
    if 'architecture' not in config:  # of another library
        return {}
    kept = {key: config.get('pretrained_cfg', {}).get(key) for key in SAVED}
    return {'model': config['architecture'], 'model_kwargs': config.get('model_args', {}), **kept}


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
    compare: dict[str, str] | None = None,
    batch_sizes: Path | None = None,
) -> Path:
    """Write a folder as the Hub holds it. It is written whole or not at all, and loads back bit for bit.

    Args:
        checkpoint: File of train.py, of the authors' code, or of weights alone.
        folder: Must not exist yet. Its name is the name of the model and a tag, for instance 'test_ait.cifar10'.
        model_name: Entry point, if the checkpoint does not say it.
        model_kwargs: Arguments of the model, beside those in the checkpoint.
        use_ema: Take the averaged weights if there are any.
        dtype: Of the weights in the file; the memory stays float32.
        results: JSON of validate.py (``--results-file results.json --results-format json``).
        dataset: Name of the data set that the results were measured on.
        commit: Commit of the code that trained the model, for the card.
        compare: Names of other models, for instance a control without memory, and their JSON of validate.py.
        batch_sizes: JSON of benchmarks/batch_sizes.py for these weights.

    Raises:
        ValueError: If the checkpoint does not fit the model, or if the folder exists.
        WeightsError: If the written folder does not load back bit for bit.
    """
    if folder.exists():
        raise ValueError(f'{folder} exists; choose another folder or remove this one')
    read = read_checkpoint(checkpoint, use_ema)
    model, model_args = build_model(read, checkpoint, model_name, model_kwargs or {})
    model.to(getattr(torch, dtype))
    large = [key for key, value in model.state_dict().items() if not value.isfinite().all()]
    if large:
        raise ValueError(f'{large[0]} of {checkpoint} has values beyond the range of {dtype}; take bfloat16 or float32')
    facts = {**read.facts, **_read_results(results)}
    others = {name: _read_results(Path(path)) for name, path in (compare or {}).items()}
    by_batch = _read_results(batch_sizes).get('batch_sizes', {})
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / folder.name
        _save(model, made, model_args)
        weights = 'averaged (EMA)' if read.is_ema else 'as trained'
        write_card(
            made,
            model,
            facts=facts,
            args=read.args,
            dataset=dataset,
            weights=weights,
            commit=commit,
            version=_code_version(),
            others=others,
            batch_sizes=by_batch,
        )
        _compare(model, made)
        made.rename(folder)
    return folder


def build_model(
    read: Checkpoint, path: Path, model_name: str, model_kwargs: dict[str, Any]
) -> tuple[AssociativeTransformer, dict[str, Any]]:
    """Build the model of a checkpoint, with its weights. Return it and the arguments of its constructor.

    Args:
        read: Content of the checkpoint.
        path: Its file, for error messages.
        model_name: Entry point, or '' if the checkpoint says it.
        model_kwargs: Arguments of the model, beside those in the checkpoint.

    Raises:
        ValueError: If the checkpoint does not say its model, or does not fit it.
    """
    args = read.args
    name = model_name or args.get('model')
    if not name:
        raise ValueError(f'{path} does not say which model it holds; give its name with --model')
    head = next((read.state_dict[key] for key in ('head.weight', 'mlp_head.1.weight') if key in read.state_dict), None)
    size = tuple(args.get('input_size') or ())
    known = {
        'num_classes': 0 if head is None else len(head),
        'in_chans': args.get('in_chans') or (size[0] if size else None),
        'img_size': args.get('img_size') or size[1:] or None,
        'global_pool': args.get('gp'),
    }
    kwargs = {**known, **(args.get('model_kwargs') or {}), **model_kwargs}
    overlay = {'num_classes': kwargs['num_classes']}
    if args.get('license'):
        overlay['license'] = args['license']
    try:
        model = timm.create_model(name, pretrained_cfg_overlay=overlay, **kwargs)
    except (RuntimeError, TypeError) as error:  # no such model, no such tag, no such argument
        raise ValueError(f'timm cannot make {name} with {kwargs}: {error}') from error
    if not isinstance(model, AssociativeTransformer):
        raise ValueError(f'{name} is no model of this package; publish it with timm.models.push_to_hf_hub')
    try:
        model.load_state_dict(fit_pretrained(read.state_dict, model, str(path)))
    except RuntimeError as error:
        raise ValueError(f'{path} does not fit {name} with {kwargs}; give its arguments ({error})') from error
    args = {**args, 'input_size': (model.in_chans, *model.patch_embed.img_size)}
    model.pretrained_cfg.update(resolve_data_config(args, pretrained_cfg=model.pretrained_cfg, model=model))
    return model, {**kwargs, **_model_args(model)}


def _model_args(model: AssociativeTransformer) -> dict[str, Any]:
    """List the arguments of the workspaces in full, for later versions with other defaults, and the sizes."""
    args = {name: getattr(model.blocks[0].mlp, name) for name in WORKSPACE_ARGS}
    args |= {'num_classes': model.num_classes, 'in_chans': model.in_chans, 'global_pool': model.global_pool}
    return {**args, 'img_size': list(model.patch_embed.img_size)}


def _save(model: AssociativeTransformer, folder: Path, model_args: dict[str, Any]) -> None:
    """Write the files of timm. The config also gets the tag in the folder's name, and the sha256 of the weights."""
    model_args = {key: value for key, value in model_args.items() if value is not None}
    save_for_hf(model, str(folder), model_args=model_args, safe_serialization=True)
    path = folder / 'config.json'
    config = json.loads(path.read_text())
    config['pretrained_cfg']['tag'] = folder.name.partition('.')[2]
    config['pretrained_cfg']['notes'] = [f'sha256:{sha256_of(folder / FILENAME)}']
    path.write_text(json.dumps(config, indent=2))
    (folder / FILENAME).chmod(path.stat().st_mode)  # safetensors makes it readable for its owner alone


def _compare(model: AssociativeTransformer, folder: Path) -> None:
    """Load the folder as a user will, and compare all values with those of the model.

    Raises:
        WeightsError: If a value differs.
    """
    loaded = _load(folder).state_dict()
    different = [key for key, value in model.state_dict().items() if not torch.equal(value, loaded[key])]
    if different:
        raise WeightsError(f'{folder} does not load back as it was written: {different[0]} differs; export it again')


def _load(folder: Path) -> AssociativeTransformer:
    """Load the model in a folder, in the dtype of its file."""
    model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    with safe_open(folder / FILENAME, 'pt') as file:
        return model.to(file.get_tensor('patch_embed.proj.weight').dtype)


def _read_results(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f'{path} is no JSON; validate.py writes it with --results-format json') from error
    if isinstance(content, list) and content:
        content = content[0]
    if not isinstance(content, dict):
        raise ValueError(f'{path} holds no results; validate.py writes it with --results-format json')
    return content


def _code_version() -> str:
    """Return the version of this package, with its commit if it is a git checkout."""
    checkout = Path(__file__).resolve().parents[1]
    git = ['git', '-C', str(checkout), 'rev-parse', '--show-toplevel', 'HEAD']
    try:
        root, commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
        return __version__
    return f'{__version__} ({commit})' if Path(root) == checkout else __version__  # not that of a project around it


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog='python -m timm_ait.hub', description=(__doc__ or '').partition('\n')[0])
    commands = parser.add_subparsers(dest='command', required=True)
    add = commands.add_parser('export', help='write a checkpoint as a folder for the Hub').add_argument
    add('checkpoint', type=Path)
    add('folder', type=Path, help="MODEL.TAG, for instance 'ait_small_patch4_32.cifar10'")
    add('--model', default='', help='entry point, if the checkpoint does not say it')
    add('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE')
    add('--no-ema', action='store_true', help='take the weights as trained, not the averaged ones')
    add('--dtype', choices=DTYPES, default='float32')
    add('--results', type=Path, help='JSON of validate.py: --results-file FILE --results-format json')
    add('--dataset', default='', help="data set of the results, for instance 'CIFAR-10 (JPEG)'")
    add('--compare', nargs='*', default={}, action=ParseKwargs, metavar='NAME=RESULTS', help='other models')
    add('--batch-sizes', type=Path, metavar='RESULTS', help='JSON of benchmarks/batch_sizes.py for these weights')
    add('--commit', default='', help='commit of the code that trained the model')
    add = commands.add_parser('push', help='upload a folder to the Hub; log in first: hf auth login').add_argument
    add('folder', type=Path)
    add('repo_id', nargs='?', default='', help='ORGANISATION/NAME')
    add('--private', action='store_true')
    add = commands.add_parser('publish', help='upload all folders of weights that the Hub does not hold').add_argument
    add('--organisation', default=HUB_ORGANISATION, help='owner of the repositories (default: %(default)s)')
    add('--folder', type=Path, default=Path('benchmarks/weights'), help='with folders MODEL.TAG (default: %(default)s)')
    add('--dry-run', action='store_true', help='say what would be done; needs no login and no network')
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run one command.

    Raises:
        SystemExit: If the command fails; the message is one sentence.
    """
    args = vars(parse(arguments))
    try:
        command = args.pop('command')
        if command == 'push':
            folder = args['folder'].resolve()
            print(f'published: {push(**args)}')
            if args['repo_id'] in ('', default_repo(folder)):
                print(f'to list it as pretrained, write this at its tag in timm_ait/ait.py: {listing(folder)}')
        elif command == 'publish':
            print(*publish(**args), sep='\n')
        else:
            args['use_ema'], args['model_name'] = not args.pop('no_ema'), args.pop('model')
            print(f'written and loaded back: {export(**args)}')
    except (ValueError, WeightsError, OSError) as error:
        sys.exit(f'python -m timm_ait.hub: {error}')


if __name__ == '__main__':
    main()

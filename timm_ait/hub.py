"""Publish a trained model: ``python -m timm_ait.hub export CHECKPOINT FOLDER``, then ``push FOLDER ORG/NAME``.

``export`` reads a checkpoint of timm's train.py or of the authors' code, or a file of weights. It writes a folder as
the Hub holds it: model.safetensors, config.json, README.md, and args.yaml if a run of train.py is known. To try that
folder as a user of the Hub will, call ``timm.create_model('local-dir:FOLDER', pretrained=True)``. ``push`` uploads it,
``publish`` all folders at once. Log in first with ``hf auth login``, or set HF_TOKEN.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import safe_open
from timm.models import save_for_hf
from timm.utils import ParseKwargs

from timm_ait import AssociativeTransformer, __version__
from timm_ait.card import METRICS, Results, batch_table, default_repo, write_card
from timm_ait.checkpoint import build_model, read_checkpoint
from timm_ait.pretrained import FILENAME, HUB_ORGANISATION, WeightsError, sha256_of
from timm_ait.publish import left_out, listing, publish, push

__all__ = ['build_model', 'export', 'publish', 'push', 'read_checkpoint']

DTYPES = ('float32', 'float16', 'bfloat16')


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
    measured: str = '',
) -> Path:
    """Write a folder as the Hub holds it. It is written whole or not at all, and loads back bit for bit.

    Args:
        checkpoint: File of train.py, of the authors' code, or of weights alone.
        folder: Must not exist yet. Its name is the name of the model and a tag, for instance 'test_ait.cifar10'.
        model_name: Entry point, if the checkpoint does not say it.
        model_kwargs: Arguments of the model, beside those in the checkpoint.
        use_ema: Take the averaged weights if there are any.
        dtype: Of the weights in the file; the memory stays float32.
        results: JSON of validate.py (``--results-file results.json --results-format json``). Of several results the
            one of this checkpoint is taken, or of this model.
        dataset: Name of the data set that the results were measured on.
        commit: Commit of the code that trained the model, for the card.
        compare: Names of other models, for instance a control without memory, and their JSON of validate.py.
        batch_sizes: JSON of benchmarks/batch_sizes.py for these weights.
        measured: How and where the results were measured, for the card.

    Raises:
        ValueError: If the checkpoint does not fit the model, if the results are not its own, or if the folder exists.
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
    architecture = model.pretrained_cfg['architecture']
    found = Results(
        {**read.facts, **_read_results(results, architecture=architecture, checkpoint=checkpoint.name)},
        dataset,
        measured,
        others={name: _read_results(Path(path)) for name, path in (compare or {}).items()},
        batch_sizes=_read_batch_sizes(batch_sizes),
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / folder.name
        _save(model, made, model_args)
        weights = 'averaged (EMA)' if read.is_ema else 'as trained'
        write_card(
            made,
            model,
            read.args,
            found,
            weights=weights,
            commit=commit,
            version=_code_version(),
        )
        _compare(model, made)
        made.rename(folder)
    return folder


def _save(model: AssociativeTransformer, folder: Path, model_args: dict[str, Any]) -> None:
    """Write the files of timm. The config also gets the tag in the folder's name, and the sha256 of the weights."""
    model_args = {key: value for key, value in model_args.items() if value is not None}
    save_for_hf(model, str(folder), model_args=model_args, safe_serialization=True)
    path = folder / 'config.json'
    config = json.loads(path.read_text(encoding='utf-8'))
    config['pretrained_cfg']['tag'] = folder.name.partition('.')[2]
    config['pretrained_cfg']['notes'] = [f'sha256:{sha256_of(folder / FILENAME)}']
    path.write_text(json.dumps(config, indent=2), encoding='utf-8')
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


def _read_results(
    path: Path | None, names: Iterable[str] = METRICS, architecture: str = '', checkpoint: str = ''
) -> dict[str, Any]:
    """Read what was measured; {} without a file. At least one of these names must stand in it.

    Args:
        path: JSON of a script.
        names: What may have been measured.
        architecture: Model that was measured, '' for any.
        checkpoint: Name of its file.
    """
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f'{path} is no JSON; validate.py writes it with --results-format json') from error
    if isinstance(content, list) and content:
        content = _own_result(content, path, architecture, checkpoint)
    if not isinstance(content, dict) or any(not isinstance(content.get(key, 0.0), (int, float)) for key in METRICS):
        raise ValueError(f'{path} holds no results in numbers; validate.py writes it with --results-format json')
    if not content.keys() & set(names):
        raise ValueError(f'{path} holds no {" or ".join(names)}; is it the result of another script?')
    if wrong := [key for key in METRICS if not math.isfinite(content.get(key, 0.0))]:
        raise ValueError(f'{path} gives {wrong[0]}={content[wrong[0]]}, expected a finite number; validate it again')
    if architecture and _measured_model(content) not in ('', architecture):
        raise ValueError(
            f'{path} is of {content["model"]}, but the checkpoint holds {architecture}; give the results of this '
            'checkpoint, and those of other models with --compare'
        )
    return content


def _own_result(results: list[Any], path: Path, architecture: str, checkpoint: str) -> Any:
    """Choose the result of a checkpoint, or else of a model, among those that validate.py has sorted by accuracy."""
    if len(results) == 1:
        return results[0]
    own = [one for one in results if isinstance(one, dict) and _is_of(one, architecture, checkpoint)]
    if not architecture or len(own) != 1:
        whose = f', {len(own)} of them of {checkpoint} or {architecture}' if architecture else ''
        raise ValueError(f'{path} holds {len(results)} results{whose}; leave the one in it that the card is to show')
    return own[0]


def _is_of(result: dict[str, Any], architecture: str, checkpoint: str) -> bool:
    """Whether a result is of this checkpoint, or of this model where it names no checkpoint."""
    if result.get('checkpoint'):
        return Path(result['checkpoint']).name == checkpoint
    return _measured_model(result) == architecture


def _measured_model(result: dict[str, Any]) -> str:
    """Return the entry point that a result of validate.py names, without its tag; '' for a folder or a repository."""
    model = str(result.get('model') or '')
    return '' if ':' in model else model.partition('.')[0]


def _read_batch_sizes(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        found = _read_results(path, ['batch_sizes'])['batch_sizes']
        batch_table(found)
    except (StopIteration, LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f'{path} holds no batch sizes; benchmarks/batch_sizes.py writes it') from error
    return dict(found)


def _code_version() -> str:
    """Return the version of this package, with its commit if it is a git checkout."""
    checkout = Path(__file__).resolve().parents[1]
    git = ['git', '-C', str(checkout), 'rev-parse', '--show-toplevel', 'HEAD']
    try:
        root, commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
        return __version__
    return f'{__version__} ({commit})' if Path(root) == checkout else __version__  # not that of a project around it


class Pairs(ParseKwargs):
    """timm's reader of KEY=VALUE, which says in a sentence what is no such pair."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, *args: Any) -> None:
        if wrong := [value for value in values if '=' not in value]:
            parser.error(f'expected KEY=VALUE, got {wrong[0]}')
        super().__call__(parser, namespace, values, *args)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog='python -m timm_ait.hub', description=(__doc__ or '').partition('\n')[0])
    commands = parser.add_subparsers(dest='command', required=True)
    add = commands.add_parser('export', help='write a checkpoint as a folder for the Hub').add_argument
    add('checkpoint', type=Path)
    add('folder', type=Path, help="MODEL.TAG, for instance 'ait_small_patch4_32.cifar10'")
    add('--model', default='', help='entry point, if the checkpoint does not say it')
    add('--model-kwargs', nargs='*', default={}, action=Pairs, metavar='KEY=VALUE')
    add('--no-ema', action='store_true', help='take the weights as trained, not the averaged ones')
    add('--dtype', choices=DTYPES, default='float32')
    add('--results', type=Path, help='JSON of validate.py: --results-file FILE --results-format json')
    add('--dataset', default='', help="data set of the results, for instance 'CIFAR-10 (JPEG)'")
    add('--measured', default='', help='how and where the results were measured: a command, and a machine')
    add('--compare', nargs='*', default={}, action=Pairs, metavar='NAME=RESULTS', help='other models')
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
            print(f'published: {push(**args)}', *left_out(folder), sep='\n')
            if args['repo_id'] in ('', default_repo(folder)):
                line = listing(folder)
                print(f'to list it as pretrained, import published in timm_ait/ait.py and write at its tag: {line}')
        elif command == 'publish':
            print(*publish(**args), sep='\n')
        else:
            args['use_ema'], args['model_name'] = not args.pop('no_ema'), args.pop('model')
            print(f'written and loaded back: {export(**args)}')
    except (ValueError, WeightsError, OSError) as error:
        sys.exit(f'python -m timm_ait.hub: {error}')


if __name__ == '__main__':
    main()

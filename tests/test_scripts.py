"""The unmodified scripts of timm work with the models. TIMM_CHECKOUT must be a checkout of timm."""

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from torchvision.transforms.functional import to_pil_image

from timm_ait.card import RARE, RECIPE

CHECKOUT = os.environ.get('TIMM_CHECKOUT', '')
ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / 'benchmarks' / 'recipes').glob('*.yaml'))
CLASSES = 3
TOY = ['--num-classes', str(CLASSES), '--train-split', 'train', '--val-split', 'test', '--device', 'cpu']
TOY += ['--epochs', '1', '--warmup-epochs', '0', '--cooldown-epochs', '0', '--workers', '1', '--batch-size', '12']
TOY += ['--validation-batch-size', '16', '--lr', '1e-3']

pytestmark = pytest.mark.skipif(
    not Path(CHECKOUT, 'train.py').is_file(), reason='TIMM_CHECKOUT must be a checkout of timm with train.py'
)


@pytest.fixture(scope='module')
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with copies of the scripts, which import the installed timm there, and images of three colours."""
    folder = tmp_path_factory.mktemp('bench')
    for script in Path(CHECKOUT).glob('*.py'):
        shutil.copy(script, folder)
    torch.manual_seed(0)
    for split, count in (('train', 24), ('test', 7)):
        for label in range(CLASSES):
            (folder / 'data' / split / f'class{label}').mkdir(parents=True)
            for i in range(count):
                image = 0.3 * torch.rand(3, 32, 32)
                image[label] += 0.5
                to_pil_image(image).save(folder / 'data' / split / f'class{label}' / f'{label}_{i}.png')
    return folder


def run(bench: Path, *args: str) -> str:
    done = subprocess.run(
        [sys.executable, *args], cwd=bench, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'}
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def train(bench: Path, name: str, *args: str) -> tuple[str, Path]:
    shutil.rmtree(bench / 'output' / name, ignore_errors=True)
    common = ['--data-dir', 'data', '--output', 'output', '--experiment', name]
    common += ['--device-modules', 'timm_ait', '--model', 'test_ait', '--opt', 'adamw']
    log = run(bench, 'train.py', *TOY, *common, *args)
    return log, bench / 'output' / name


def save_weights(bench: Path, name: str, **kwargs: object) -> str:
    model = timm.create_model(name, num_classes=CLASSES, **kwargs)
    save_file(model.state_dict(), bench / f'{name}.safetensors')
    return str(bench / f'{name}.safetensors')


SWITCHES = {
    'default': '',
    'bfloat16 and ema': '--amp --amp-dtype bfloat16 --model-ema --model-ema-decay 0.5',
    'float16 scaler': '--amp --clip-grad 1.0',
    'accumulation': '--grad-accum-steps 2',
    'checkpointing': '--grad-checkpointing',
    'compiled': '--torchcompile aot_eager',
    'mixup': '--mixup 0.8 --cutmix 1.0',
    'binary cross entropy': '--mixup 0.2 --bce-loss',
    'jsd': '--jsd-loss --aug-splits 3 --aa augmix-m3-w2 --batch-size 6',
    'layer decay': '--layer-decay 0.7 --drop-path 0.1',
    'channels last': '--channels-last',
    'bfloat16 model': '--model-dtype bfloat16',
    'distillation': '--distill-loss-weight 0.5 --kd-model-name local-dir:teacher',
    'scheduled sizes': '--model ait_small --model-kwargs embed_dim=64 num_heads=2 patch_size=8 dynamic_img_size=True '
    '--img-size 32 --train-img-sizes 32 48',
    'keywords': '--model-kwargs num_slots=7 beta=2.0 write_grad=False write_mode=always',
}


@pytest.mark.parametrize('name', SWITCHES)
def test_train_py_runs_with_its_switches(bench: Path, name: str) -> None:
    if name == 'distillation':
        teacher = timm.create_model('test_vit', num_classes=CLASSES, img_size=32)
        save_for_hf(teacher, str(bench / 'teacher'), model_args={'img_size': 32}, safe_serialization=True)
    _, folder = train(bench, name, *SWITCHES[name].split())
    with open(folder / 'summary.csv') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1
    assert float(rows[0]['eval_loss']) < 10
    state = torch.load(folder / 'last.pth.tar', weights_only=False)['state_dict']
    memory = state['blocks.0.mlp.memory']
    torch.testing.assert_close(memory.norm(dim=-1), torch.ones(len(memory)))


def test_validate_py_gives_the_accuracy_of_train_py_at_every_batch_size(bench: Path) -> None:
    _, folder = train(bench, 'accuracy', '--epochs', '3')
    with open(folder / 'summary.csv') as file:
        printed = round(float(list(csv.DictReader(file))[-1]['eval_top1']), 4)
    for batch_size in ('1', '64', '256'):
        result = folder / f'{batch_size}.json'
        args = ['--model', 'test_ait', '--num-classes', str(CLASSES), '--data-dir', 'data', '--split', 'test']
        args += ['--checkpoint', str(folder / 'last.pth.tar'), '--device', 'cpu', '--workers', '1', '-b', batch_size]
        for fused in ([], ['--reparam']):
            results = ['--results-file', str(result), '--results-format', 'json']
            run(bench, '-m', 'timm_ait', 'validate.py', *args, *fused, *results)
            found = json.loads(result.read_text())
            assert (found[0] if isinstance(found, list) else found)['top1'] == printed


def test_train_py_resumes_a_run_after_its_last_epoch(bench: Path) -> None:
    _, whole = train(bench, 'whole', '--epochs', '2')
    _, first = train(bench, 'first', '--epochs', '1')
    log, second = train(bench, 'second', '--epochs', '2', '--resume', str(first / 'last.pth.tar'))
    assert 'Loaded checkpoint' in log
    assert (second / 'summary.csv').read_text().count('\n') == 2  # the heading and the second epoch
    assert torch.load(second / 'last.pth.tar', weights_only=False)['epoch'] == 1
    assert (whole / 'last.pth.tar').exists()


@pytest.mark.parametrize('recipe', RECIPES, ids=[recipe.stem for recipe in RECIPES])
def test_every_recipe_runs_at_toy_size(bench: Path, recipe: Path) -> None:
    args = ['--pretrained-path', save_weights(bench, 'test_ait')] if 'finetune' in recipe.stem else []
    log = run(
        bench, 'train.py', '--config', str(recipe), '--data-dir', 'data', '--output', 'output',
        '--experiment', recipe.stem, '--model', 'test_ait', *TOY, *args
    )  # fmt: skip
    assert 'Best metric' in log


def test_scripts_without_device_modules_run_with_the_launcher(bench: Path) -> None:
    launcher = ['-m', 'timm_ait']
    common = ['--model', 'test_ait', '--num-classes', str(CLASSES)]
    log = run(bench, *launcher, 'benchmark.py', *common, '--device', 'cpu', '-b', '4', '--bench', 'inference',
              '--num-bench-iter', '10', '--num-warm-iter', '1')  # fmt: skip
    assert 'infer_samples_per_sec' in log
    weights = ['--checkpoint', save_weights(bench, 'test_ait')]
    run(bench, *launcher, 'inference.py', *common, *weights, '--data-dir', 'data/test', '--device', 'cpu', '-b', '4',
        '--workers', '1', '--results-dir', 'inferred', '--topk', '1')  # fmt: skip
    assert list((bench / 'inferred').iterdir())
    log = run(bench, *launcher, 'bulk_runner.py', '--model-list', 'test_ai*', '--results-file', 'bulk.csv', '-m', '1',
              'timm_ait', 'validate.py', '--data-dir', 'data', '--split', 'test', '--device', 'cpu', '--workers', '1',
              '--num-classes', str(CLASSES), *weights)  # fmt: skip
    assert (bench / 'bulk.csv').exists(), log


def test_onnx_export_py_writes_a_model_for_evaluation_and_refuses_training(bench: Path) -> None:
    onnxruntime = pytest.importorskip('onnxruntime')
    args = ['-m', 'timm_ait', 'onnx_export.py', 'test_ait.onnx', '--model', 'test_ait', '--num-classes', str(CLASSES)]
    run(bench, *args, '--checkpoint', save_weights(bench, 'test_ait'))
    model = timm.create_model('test_ait', num_classes=CLASSES, checkpoint_path=str(bench / 'test_ait.safetensors'))
    images = torch.randn(1, 3, 32, 32)
    session = onnxruntime.InferenceSession(bench / 'test_ait.onnx')
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model.eval()(images).detach(), rtol=1e-4, atol=1e-4)
    with pytest.raises(AssertionError, match='an exported model cannot write its memory'):
        run(bench, *args, '--training')


def test_the_commands_of_the_documents_have_options_that_the_scripts_know(bench: Path) -> None:
    commands = []
    for path in (*ROOT.glob('*.md'), *(ROOT / 'docs').glob('*.md')):
        for block in re.findall(r'```sh\n(.*?)```', path.read_text(encoding='utf-8'), re.DOTALL):
            for line in block.replace('\\\n', ' ').splitlines():
                words = shlex.split(line, comments=True)
                scripts = [word for word in words if word in ('train.py', 'validate.py')]
                commands += [(script[:-3], words[words.index(script) + 1 :]) for script in scripts]
    assert {script for script, _ in commands} == {'train', 'validate'}
    parse = 'import importlib, json, sys\nfor name, words in json.loads(sys.argv[1]):\n    '
    run(bench, '-c', parse + 'importlib.import_module(name).parser.parse_args(words)', json.dumps(commands))


def test_a_recipe_holds_every_option_of_train_py_that_is_not_of_the_machine_or_its_files(bench: Path) -> None:
    script = 'import json, train; print(json.dumps(vars(train.parser.parse_args([]))))'
    defaults = json.loads(run(bench, '-c', script).splitlines()[-1])
    assert {key: defaults[key] for key in RARE} == RARE
    others = (
        'data data_dir dataset train_split val_split train_num_samples val_num_samples dataset_download class_map '
        'input_img_mode input_key target_key dataset_trust_remote_code pretrained_path initial_checkpoint resume '
        'no_resume_opt crop_pct interpolation validation_batch_size channels_last fuser grad_checkpointing '
        'torchcompile_mode torchscript torchcompile device no_ddp_bb synchronize_step local_rank device_modules '
        'lr_base lr_base_size lr_base_scale start_epoch bn_momentum bn_eps sync_bn dist_bn split_bn '
        'model_ema_force_cpu worker_seeding log_interval val_interval recovery_interval checkpoint_hist workers '
        'save_images pin_mem no_prefetcher output experiment eval_metric tta use_multi_epochs_loader log_wandb '
        'wandb_project wandb_tags wandb_resume_id naflex_loader naflex_train_seq_lens naflex_max_seq_len '
        'naflex_patch_sizes naflex_patch_size_probs naflex_loss_scale naflex_patchify_channels_first '
        'kd_student_feature_dim kd_teacher_feature_dim'
    ).split()
    assert defaults.keys() - RARE.keys() - set(RECIPE) - set(others) == set()

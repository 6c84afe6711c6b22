"""Every Python block of README.md and docs is run, and every link inside the repository has a target."""

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import memory
import pytest
import runs
import tables

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *(ROOT / 'docs').glob('*.md')])
LINKED = sorted(path for pattern in ('*.md', 'docs/*.md', 'benchmarks/*.md') for path in ROOT.glob(pattern))
RESULTS = ROOT / 'benchmarks' / 'results'
INTERVAL = re.compile(r'[+-]?\d+\.\d\d ± \d+\.\d\d')
BLOCK = re.compile(r'^(?:<!-- not run: (?P<why>.+?) -->\n)?```python\n(?P<code>.*?)^```$', re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    code: str
    why_not_run: str | None


def blocks_of(text: str) -> list[Block]:
    return [Block(found['code'], found['why']) for found in BLOCK.finditer(text)]


def check_names(code: str, known: dict[str, Any] | None = None) -> None:
    """Import what a block imports, and look up every attribute of it and of what is known. Calls are not made."""
    tree, names = ast.parse(code), dict(known or {})
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            exec(ast.unparse(node), names)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root, *attributes = ast.unparse(node).split('.')
            value = names.get(root)
            is_plain = root in names and all(name.isidentifier() for name in attributes)  # not an attribute of a call
            for name in attributes if is_plain else ():
                value = getattr(value, name)


def names(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


@pytest.mark.filterwarnings('ignore')  # of the exporters, about themselves
@pytest.mark.parametrize('page', [page for page in names(PAGES) if blocks_of((ROOT / page).read_text())])
def test_python_blocks_run_one_after_the_other(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    known: dict[str, Any] = {}
    for block in blocks_of((ROOT / page).read_text()):
        if block.why_not_run:
            check_names(block.code, known)
        else:
            exec(compile(block.code, page, 'exec'), known)


def test_the_script_for_torchrun_runs_on_two_processes(tmp_path: Path) -> None:
    blocks = blocks_of((ROOT / 'docs' / 'training-stacks.md').read_text())
    (script,) = (block.code for block in blocks if block.why_not_run is not None and 'torchrun' in block.why_not_run)
    (tmp_path / 'train_fsdp.py').write_text(script)
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', 'train_fsdp.py']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    printed = re.sub(r'^\[Gloo\] .*\n', '', done.stdout, flags=re.MULTILINE)  # by torch 2.9
    assert re.fullmatch(r'loss \d\.\d\d\n', printed)


@pytest.mark.parametrize('page', names(PAGES))
def test_every_python_block_is_found(page: str) -> None:
    """One that is indented, or has a comment that is spelled otherwise, would not be run as it should."""
    text = (ROOT / page).read_text()
    assert len(re.findall(r'```\s*py', text)) == len(blocks_of(text))
    assert text.count('<!--') == sum(block.why_not_run is not None for block in blocks_of(text))


def anchors(page: Path) -> set[str]:
    headings = re.findall(r'^#+ (.+)$', page.read_text(), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('page', names(LINKED))
def test_links_inside_the_repository_have_a_target(page: str) -> None:
    for link in re.findall(r'\]\(([^)\s]+)\)', (ROOT / page).read_text()):
        path, _, anchor = link.partition('#')
        target = (ROOT / page).parent / path if path else ROOT / page
        if not link.startswith(('http:', 'https:')):
            assert target.exists(), link
            is_made = target.name == 'api.md'  # out of docstrings
            assert is_made or not anchor or anchor in anchors(target), link


def test_a_block_that_is_not_run_must_name_what_exists() -> None:
    importlib.import_module('timm_ait')
    check_names('import timm\ntimm.create_model("nothing")')
    with pytest.raises(AttributeError, match='create_modle'):
        check_names('import timm\ntimm.create_modle("nothing")')
    with pytest.raises(ImportError, match='GlobalWorkspaces'):
        check_names('from timm_ait import GlobalWorkspaces')
    with pytest.raises(SyntaxError):
        check_names('import timm\ntimm.create_model(')


def test_a_keyword_that_a_model_takes_is_in_the_table_of_keywords() -> None:
    from timm_ait.arguments import WORKSPACE_ARGS

    table = (ROOT / 'docs' / 'layer.md').read_text().split('## Keywords')[1]
    assert [name for name in WORKSPACE_ARGS if f'`{name}`' not in table] == []


def test_every_experiment_names_a_script_that_has_its_options() -> None:
    table = (ROOT / 'docs' / 'experiments.md').read_text()
    commands = [command.split() for command in re.findall(r'\| `(\w+\.py[^`]*)`', table) if 'train.py' not in command]
    assert len(commands) > 10
    parsers = {'tables.py': tables.make_parser(), 'memory.py': memory.make_parser()}
    for script, *words in commands:
        if script in parsers:
            parsers[script].parse_args(words)
            continue
        texts = [(ROOT / 'benchmarks' / name).read_text() for name in {script, 'tables.py'}]
        for word in words:
            if word.startswith('--'):
                assert any(f"'{word}'" in text for text in texts), f'{script} {word}'


def top1_of(row: str, **settings: Any) -> dict[int, float]:
    """Test accuracies of a row on CIFAR-10, by seed."""
    for rows in tables.gather(RESULTS / 'tables').values():
        arguments = next(iter(next(iter(rows.values())).values()))['arguments']
        if row in rows and arguments['table'] == 'cifar10' and settings.items() <= arguments.items():
            return runs.top1_of(rows[row])
    raise ValueError(f'there is no result of {row} with {settings}')


def measured() -> set[str]:
    """Every mean with its interval that the results hold, with its sign and without: those of tables, and the
    differences between rows that the text gives."""
    again = memory.gather(RESULTS / 'memory-again')
    texts = [memory.table(memory.gather(RESULTS / name)) for name in ('memory', 'memory-again', 'memory-competing')]
    texts += [tables.format_table(rows) for rows in tables.gather(RESULTS / 'tables').values()]
    muon: dict[str, Any] = dict(opt='muon', mlp_ratio=2.0)
    wide: dict[str, Any] = dict(opt='muon', mlp_ratio=4.6)
    short: dict[str, Any] = dict(head='flatten', width=256)
    free, wider_free = top1_of('ait_no_attention_additive', **muon), top1_of('ait_no_attention_no_memory', **wide)
    competing = top1_of('ait_no_attention_additive_competing', **muon)
    pairs = [
        *(
            ({seed: top1 for seed, top1 in competing.items() if seed in seeds}, free)
            for seeds in (range(1, 4), range(6, 11), range(11, 21), range(6, 21))
        ),
        ({seed: competing[seed] for seed in range(6, 21)}, wider_free),
        *((top1_of(f'ait_no_attention_additive_{name}', **muon), free) for name in ('cosine', 'separate')),
        (top1_of('ait_additive_competing', **muon), top1_of('ait_no_memory', **wide)),
        (top1_of('ait_additive_competing', **muon), competing),
        (top1_of('ait_no_memory', **wide), competing),
        (top1_of('ait_additive', **muon), top1_of('ait_no_memory', **wide)),
        *(({seed: free[seed] for seed in seeds}, wider_free) for seeds in (range(6, 11), range(11, 21), range(6, 21))),
        (wider_free, top1_of('ait_no_attention_no_memory', **muon)),
        (top1_of('ait_no_memory', **muon), top1_of('ait_no_attention_no_memory', **muon)),
        (top1_of('vit_small', **short), top1_of('ait_no_memory', **short)),
        (top1_of('coordination_d', **short), top1_of('coordination', **short)),
        (top1_of('coordination_h', **short), top1_of('coordination', **short)),
        (top1_of('coordination_dh', **short), top1_of('coordination_d', **short)),
    ]
    finetuned = json.loads((RESULTS / 'upcycle.json').read_text())['finetuned']
    accuracies = [dict(enumerate(values)) for values in finetuned.values()]
    pairs += [(values, accuracies[0]) for values in accuracies[1:]]
    ten = again['width 128, depth 2, without self-attention']
    none, wider, additive = (runs.top1_of(ten[name]) for name in ('none', 'wider_mlp', 'additive'))
    old, new = ({seed: additive[seed] for seed in seeds} for seeds in (range(4, 9), range(9, 14)))
    pairs += [(old, none), (new, none), (new, wider)]
    first = memory.gather(RESULTS / 'memory')
    kinds = (f'width 128, depth 2, {kind} self-attention' for kind in ('with', 'without'))
    pairs.append(tuple(runs.top1_of(first[kind]['none']) for kind in kinds))
    texts += [runs.format_mean(runs.gains(*pair), '+') for pair in pairs]
    signed = INTERVAL.findall('\n'.join(texts))
    return {*signed, *(interval.lstrip('+-') for interval in signed)}


@pytest.mark.parametrize(
    'page', ['README.md', 'docs/memory.md', 'benchmarks/README.md', 'benchmarks/MEMORY.md', 'benchmarks/PAPER.md']
)
def test_every_interval_in_the_text_is_one_of_the_results(page: str) -> None:
    given = INTERVAL.findall(' '.join((ROOT / page).read_text().split()))
    assert len(given) > 1
    known = measured()
    assert [interval for interval in given if interval not in known] == []


def test_every_public_name_is_on_the_page_of_the_api() -> None:
    import timm_ait

    first, *_ = (ROOT / 'docs' / 'api.md').read_text().split('\n## ')
    assert set(re.findall(r'^(?: +- |::: timm_ait\.)(\w+)$', first, re.MULTILINE)) == set(timm_ait.__all__)


def test_the_readme_begins_with_what_it_is_and_its_two_commands() -> None:
    first_screen = (ROOT / 'README.md').read_text().splitlines()[:40]
    assert any(line.startswith('make demo') for line in first_screen)
    assert any(line.startswith('make test') for line in first_screen)
    assert len((ROOT / 'README.md').read_text().splitlines()) <= 80

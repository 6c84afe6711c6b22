"""The page that shows what the memories of a model hold: one HTML document, with its pictures inside."""

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any

from torch import Tensor, nn

from . import drawing
from .history import Drift
from .inspection import DEAD, TWINS, BlockInspection, inspect
from .report import format_report

__all__ = ['Page', 'visualize']

STYLE = """
body { font: 16px/1.5 sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff }
img { max-width: 100%; height: auto; display: block }
figure { margin: 1rem 0 }
table { border-collapse: collapse }
th, td { border: 1px solid #bbb; padding: .2rem .6rem; text-align: right }
summary { cursor: pointer; font-weight: bold; margin: 1rem 0 }
"""
OPEN = '<details open="">'
TABLE = (
    'Look first at how much the retrieval varies over tokens. Near 0 % every token retrieves the same, and the memory '
    'is a constant. A mean cosine of 1 says that all slots are one point. The lengths and the variation are root mean '
    'squares; slots in use count from 1 to all slots, effective rank no further than the width of a slot.'
)
ALIKE = (
    f'Twins are slots of a cosine above {TWINS}. A dead slot gets less than {DEAD} of an even share of the retrieval: '
    'almost no token retrieves it.'
)
COSINES = (
    'Each square compares two slots: dark red means the same direction, white a right angle, blue opposite directions. '
    'A healthy memory is red on the diagonal alone. A square that is red all over is a memory of one point.'
)
USE = (
    'How much of the retrieval each slot gets. The dashed line is an even share. Even bars say that no slot is idle, '
    'but slots that are alike are even too. Dead slots are red, with a cross.'
)
ENERGY = (
    'The Hopfield energy of the tokens before and after each retrieval step, with the range of nine tokens out of ten. '
    'The scale is logarithmic and begins at 0.000001. The model stops at the dashed line. Each step lowers the energy '
    'or keeps it. If it is flat from the first step on, more steps change nothing.'
)
POSITIONS = (
    'Where in an image each slot (column) of each write head (row) reads: its gates, summed over all images. White is '
    'where it reads most. Look for slots that read different places, or for columns that are all alike.'
)
READS = (
    'What each slot (column) reads in some images: its gates, summed over heads. An image is lit where the slot reads. '
    'Look for slots that follow objects, and for images that a slot leaves out. An evenly lit column reads all.'
)
RETRIEVAL = (
    'The slot that each token retrieves most, and its weight. Look for regions that share a slot. Where the weight is '
    'near {even:.3f}, an even share, the token retrieves all slots alike, and the slot shown is chance.'
)
DRIFT = (
    'How far the slots are from where they were, as 1 - cosine: 0 is unmoved, 1 a right angle. The line is the mean '
    'over slots, the band their range. A memory that has settled is near 0 since the last checkpoint.'
)
TRAINING = (
    'The training by epoch, from summary.csv and the checkpoints. Look whether the mean cosine rises to 1 and the '
    'variation over tokens falls to 0: the memory then collapses, even if the loss falls.'
)


class Page(str):
    """A whole HTML document. A notebook shows it as the result of a cell; ``Path.write_text`` saves it."""

    def _repr_html_(self) -> str:
        return f'<iframe srcdoc="{escape(self)}" style="width: 100%; height: 50rem; border: 0"></iframe>'


def visualize(
    model: nn.Module,
    images: Tensor,
    *inputs: Tensor,
    title: str = '',
    pictures: int = 6,
    drift: Drift | None = None,
    history: Sequence[dict[str, Any]] = (),
) -> Page:
    """Draw what the memories of a model hold, and what its tokens retrieve.

    Args:
        model: With at least one :class:`timm_ait.GlobalWorkspace`. Its mode and its memory stay as they are.
        images: (B, C, H, W), normalised. As in training, the tokens of all images compete.
        *inputs: What else the model takes, as the questions (B, Q) of a relational one.
        title: Name of the model.
        pictures: So many of the images are shown, from the first on.
        drift: From :func:`timm_ait.history.measure_drift`, to be drawn too.
        history: From :func:`timm_ait.history.follow_training`, to be drawn too.

    Raises:
        ValueError: If the model has no workspace, or for fewer pictures than one.
        ImportError: If matplotlib is missing.
    """
    if pictures < 1:
        raise ValueError(f'pictures must be at least 1, got {pictures}')
    drawing.require_matplotlib()
    blocks = inspect(model, images, *inputs)
    shown = images[:pictures]
    parts = [
        f'<p>{len(images)} images went through the model in evaluation mode.</p>',
        '<h2>The numbers</h2>',
        f'<p>{TABLE}</p>',
        _table(format_report([block.report for block in blocks])),
        '<h2>Are slots alike?</h2>',
        f'<p>{ALIKE}</p>',
        '<ul>' + ''.join(f'<li>Block {x.report.block}: {_alike(x)}.</li>' for x in blocks) + '</ul>',
        _picture('Cosine between slots', COSINES, drawing.draw_cosines(blocks)),
        '<h2>Which slots are used?</h2>',
        _picture('Use of the slots', USE, drawing.draw_use(blocks)),
        '<h2>How does retrieval settle?</h2>',
        _picture('Energy along retrieval steps', ENERGY, drawing.draw_energy(blocks)),
        '<h2>What does each slot read, and each token retrieve?</h2>',
        *(_block(block, shown, is_open=block is blocks[0]) for block in blocks),
    ]
    if drift is not None:
        parts += ['<h2>Does the memory move?</h2>', _picture('Drift of the memory', DRIFT, drawing.draw_drift(drift))]
    if history:
        parts += ['<h2>The training</h2>', _picture('Training by epoch', TRAINING, drawing.draw_training(history))]
    name = escape(title or type(model).__name__)
    return Page(
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/><title>The memory of {name}</title>'
        f'<style>{STYLE}</style></head>\n<body><h1>The memory of {name}</h1>\n'
        + '\n'.join(parts)
        + '\n</body></html>\n'
    )


def _block(block: BlockInspection, images: Tensor, is_open: bool) -> str:
    """The pictures of one block; a reader opens those of the others."""
    i = block.report.block
    retrieval = RETRIEVAL.format(even=1 / len(block.use))
    reads = f'{READS} A slot of this block reads {block.tokens_read:.0f} tokens (exp of the mean entropy of its gates).'
    return '\n'.join(
        [
            f'{OPEN if is_open else "<details>"}<summary>Block {i}</summary>',
            _picture(f'Positions that the slots of block {i} read', POSITIONS, drawing.draw_positions(block)),
            _picture(f'Images as the slots of block {i} read them', reads, drawing.draw_reads(images, block)),
            _picture(f'Retrieval of the tokens in block {i}', retrieval, drawing.draw_retrieval(images, block)),
            '</details>',
        ]
    )


def _alike(block: BlockInspection) -> str:
    """Twins and dead slots of a block, in words."""
    M, groups, dead = len(block.use), block.twins(), ', '.join(map(str, block.dead()))
    names = ' and '.join('all slots' if len(group) == M else f'slots {", ".join(map(str, group))}' for group in groups)
    twins = f'{names} are twins' if groups else 'no two slots are twins'
    return f'{twins}, {f"dead slots are {dead}" if dead else "no slot is dead"}'


def _table(markdown: str) -> str:
    """A Markdown table as an HTML table."""
    head, _, *body = [line.strip('| ').split(' | ') for line in markdown.splitlines()]
    rows = [''.join(f'<td>{cell}</td>' for cell in row) for row in body]
    head_cells = ''.join(f'<th>{cell}</th>' for cell in head)
    return f'<table><tr>{head_cells}</tr>' + ''.join(f'<tr>{row}</tr>' for row in rows) + '</table>'


def _picture(name: str, words: str, figure: Any) -> str:
    """A figure inside the document, with its words above and its name for those who do not see it."""
    file = io.BytesIO()
    figure.savefig(file, format='webp', dpi=100, bbox_inches='tight', pil_kwargs={'quality': 90})
    data = base64.b64encode(file.getvalue()).decode()
    return f'<figure><figcaption>{words}</figcaption><img alt="{name}" src="data:image/webp;base64,{data}"/></figure>'

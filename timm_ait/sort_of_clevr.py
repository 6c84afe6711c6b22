"""Sort-of-CLEVR: scenes, questions and answers, without state; the dataset of them stands in `datasets.py`.

Santoro et al., *A simple neural network module for relational reasoning*, https://arxiv.org/abs/1706.01427; the ternary
questions and the sizes are those of Goyal et al., *Coordination Among Neural Modules Through a Shared Global
Workspace*, https://arxiv.org/abs/2103.01197. Coordinates are pixels, x to the right and y down.
"""

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

__all__ = ['KINDS', 'answer_questions', 'draw_centres', 'draw_questions', 'paint_scene']

KINDS = ('nonrelational', 'binary', 'ternary')
COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 156, 0), (128, 128, 128), (255, 255, 0))
YES, NO, RECTANGLE, CIRCLE, ZERO = 0, 1, 2, 3, 4  # answers; the counts 0 to 5 follow from ZERO on
SIZE, RADIUS, PER_KIND = 75, 5, 10  # side of the image, half the side of an object, questions of a kind

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Bytes = npt.NDArray[np.uint8]


def draw_centres(rng: np.random.Generator) -> Ints:
    """Centres (6, 2), each drawn again while it is nearer than a side to an earlier one."""
    centres: list[tuple[int, int]] = []
    while len(centres) < len(COLOURS):
        x, y = rng.integers(RADIUS, SIZE - RADIUS, size=2).tolist()
        if all((x - u) ** 2 + (y - v) ** 2 >= (2 * RADIUS) ** 2 for u, v in centres):
            centres.append((x, y))
    return np.array(centres)


def draw_questions(rng: np.random.Generator) -> Bools:
    """Ten questions of each kind: (3, 10, 18)."""
    first = np.concatenate([rng.integers(6, size=(2, PER_KIND)), rng.integers(5, size=(1, PER_KIND))])
    second = (first[2] + rng.integers(1, 5, size=PER_KIND)) % 5  # another of the first five
    kind, subtype = np.arange(3)[:, None].repeat(PER_KIND, axis=1), rng.integers(3, size=(3, PER_KIND))
    other = np.zeros((3, PER_KIND, 6), dtype=np.bool_)
    other[2] = np.eye(6, dtype=np.bool_)[second]
    six, three = np.eye(6, dtype=np.bool_), np.eye(3, dtype=np.bool_)
    return np.concatenate([six[first], other, three[kind], three[subtype]], axis=-1)


def paint_scene(centres: Ints, squares: Bools) -> Bytes:
    """Draw the objects in the order of their colours: (6, 2), (6,) -> (75, 75, 3)."""
    image = Image.new('RGB', (SIZE, SIZE), (255, 255, 255))
    pen = ImageDraw.Draw(image)
    for (x, y), is_square, colour in zip(centres.tolist(), squares.tolist(), COLOURS, strict=True):
        box = (x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS)
        (pen.rectangle if is_square else pen.ellipse)(box, fill=colour)
    return np.asarray(image)


def answer_questions(centres: Ints, squares: Bools, questions: npt.NDArray[np.generic]) -> Ints:
    """Answer questions about scenes.

    A question is 18 bits: colour of object A (6), colour of object B (6, ternary only), kind (3), subtype (3).

    - Non-relational: is A a rectangle or a circle; does it lie in the left half; in the top half.
    - Binary: the shape of the object closest to A; of the one furthest from it; how many others have A's shape. Of
      objects equally far away, the first one in the order of colours counts.
    - Ternary: how many others lie in the box that A and B span, its border included; is any other at most 12 pixels
      above or below the line through A and B (at any height, where this line is vertical: on it); with how many others
      do A and B form a triangle with an angle of at least 90 degrees (three objects on a line form none).

    Args:
        centres: (size, 6, 2).
        squares: (size, 6).
        questions: (size, Q, 18).

    Returns:
        (size, Q): 0 yes, 1 no, 2 rectangle, 3 circle, 4 to 9 the counts 0 to 5. All in whole numbers, so exact.
    """
    first, second = questions[..., :6].argmax(-1), questions[..., 6:12].argmax(-1)  # (size, Q)
    kind, subtype = questions[..., 12:15].argmax(-1), questions[..., 15:].argmax(-1)
    scenes = np.arange(len(centres))[:, None]
    a, b, c = centres[scenes, first], centres[scenes, second], centres[:, None]  # (size, Q or 1 for 6, 2)
    is_a, is_b = np.eye(6, dtype=np.bool_)[first], np.eye(6, dtype=np.bool_)[second]  # (size, Q, 6)
    is_square = squares[scenes, first]
    answers = [
        _shape(is_square),
        np.where(2 * a[..., 0] < SIZE, YES, NO),
        np.where(2 * a[..., 1] < SIZE, YES, NO),
        *_answer_binary(a[:, :, None], c, is_a, is_square, squares),
        *_answer_ternary(a[:, :, None], b[:, :, None], c, ~(is_a | is_b)),
    ]
    return np.choose(3 * kind + subtype, answers)


def _answer_binary(a: Ints, c: Ints, is_a: Bools, is_square: Bools, squares: Bools) -> list[Ints]:
    distance = np.square(c - a).sum(-1)  # (size, Q, 6)
    scenes = np.arange(len(squares))[:, None]
    closest = np.where(is_a, 2 * SIZE**2, distance).argmin(-1)  # the lowest index of the equally close
    furthest = np.where(is_a, -1, distance).argmax(-1)
    alike = (squares[:, None] == is_square[..., None]).sum(-1) - 1
    return [_shape(squares[scenes, closest]), _shape(squares[scenes, furthest]), ZERO + alike]


def _answer_ternary(a: Ints, b: Ints, c: Ints, is_other: Bools) -> list[Ints]:
    ab, ac, bc = b - a, c - a, c - b  # (size, Q, 1 or 6, 2)
    in_box = ((np.minimum(a, b) <= c) & (c <= np.maximum(a, b))).all(-1)
    cross = ab[..., 0] * ac[..., 1] - ab[..., 1] * ac[..., 0]  # dx times the height above the line
    is_near = np.abs(cross) <= 12 * np.abs(ab[..., 0])
    cosines = np.stack([(ab * ac).sum(-1), -(ab * bc).sum(-1), (ac * bc).sum(-1)])  # of the angles, times two sides
    is_wide = (cosines.min(0) <= 0) & (cross != 0)
    return [
        ZERO + (in_box & is_other).sum(-1),
        np.where((is_near & is_other).any(-1), YES, NO),
        ZERO + (is_wide & is_other).sum(-1),
    ]


def _shape(is_square: Bools) -> Ints:
    return np.where(is_square, RECTANGLE, CIRCLE)

"""Tasks that are drawn: what they show, what their labels say, and that a seed repeats them."""

import copy
import itertools
import math
import pickle
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from timm_ait import datasets
from timm_ait.datasets import AssociativeRecall, SortOfClevr, Triangle, write_folders
from timm_ait.sort_of_clevr import COLOURS, KINDS, SIZE, answer_questions, draw_centres, draw_questions, paint_scene

YES, NO, RECTANGLE, CIRCLE = range(4)


def bits(a: int, b: int | None, kind: int, subtype: int) -> list[int]:
    question = [0] * 18
    for place in (a, 12 + kind, 15 + subtype, *([] if b is None else [6 + b])):
        question[place] = 1
    return question


EVERY_QUESTION = [
    *(bits(a, None, kind, subtype) for a in range(6) for kind in (0, 1) for subtype in range(3)),
    *(bits(a, b, 2, subtype) for a, b in itertools.permutations(range(5), 2) for subtype in range(3)),
]


def shape(is_square: bool) -> int:
    return RECTANGLE if is_square else CIRCLE


def angle(p: tuple[int, int], q: tuple[int, int], r: tuple[int, int]) -> float:
    """The angle at q, in degrees."""
    turn = math.atan2(p[1] - q[1], p[0] - q[0]) - math.atan2(r[1] - q[1], r[0] - q[0])
    return round(min(abs(math.degrees(turn)), 360 - abs(math.degrees(turn))), 6)


def oracle(centres: list[tuple[int, int]], squares: list[bool], question: list[int]) -> int:
    """Answer one question, slowly."""
    a, kind, subtype = question[:6].index(1), question[12:15].index(1), question[15:].index(1)
    (ax, ay), others = centres[a], [i for i in range(6) if i != a]
    if kind == 0:
        return [shape(squares[a]), YES if ax < 37.5 else NO, YES if ay < 37.5 else NO][subtype]
    if kind == 1:
        distances = {i: round(math.hypot(centres[i][0] - ax, centres[i][1] - ay), 9) for i in others}
        if subtype == 0:
            return shape(squares[next(i for i in others if distances[i] == min(distances.values()))])
        if subtype == 1:
            return shape(squares[next(i for i in others if distances[i] == max(distances.values()))])
        return 4 + len([i for i in others if squares[i] == squares[a]])
    b = question[6:12].index(1)
    (bx, by), rest = centres[b], [centres[i] for i in others if i != b]
    if subtype == 0:
        return 4 + len([x for x, y in rest if min(ax, bx) <= x <= max(ax, bx) and min(ay, by) <= y <= max(ay, by)])
    if subtype == 1:
        if ax == bx:
            return YES if any(x == ax for x, _ in rest) else NO
        heights = [abs(y - (ay + (by - ay) * (x - ax) / (bx - ax))) for x, y in rest]
        return YES if any(height <= 12 + 1e-9 for height in heights) else NO
    widest = [
        max(angle(c, (ax, ay), (bx, by)), angle((ax, ay), (bx, by), c), angle((ax, ay), c, (bx, by))) for c in rest
    ]
    return 4 + len([w for w in widest if 90 <= w < 180])


def test_every_answer_of_hundreds_of_scenes_is_that_of_a_slow_oracle() -> None:
    scenes = SortOfClevr('train', 300)
    questions = np.broadcast_to(EVERY_QUESTION, (300, len(EVERY_QUESTION), 18))
    answers = answer_questions(scenes.centres, scenes.squares, questions)
    for number in range(300):
        centres, squares = [tuple(c) for c in scenes.centres[number].tolist()], scenes.squares[number].tolist()
        assert answers[number].tolist() == [oracle(centres, squares, question) for question in EVERY_QUESTION]
    assert {*answers.flatten().tolist()} == set(range(10))  # no answer goes unseen


SCENE = [(20, 20), (20, 40), (20, 60), (40, 20), (40, 40), (60, 20)]
SHAPES = [True, False, True, True, False, False]


@pytest.mark.parametrize(
    ('last', 'question', 'answer'),
    [
        ((60, 20), bits(0, None, 1, 0), CIRCLE),  # 1 and 3 are 20 away: 1 counts
        ((60, 20), bits(0, None, 1, 1), RECTANGLE),  # 2 and 5 are 40 away: 2 counts
        ((60, 20), bits(0, None, 1, 2), 4 + 2),
        ((60, 20), bits(0, 4, 2, 0), 4 + 2),  # 1 and 3 are corners of the box
        ((60, 20), bits(0, 2, 2, 1), YES),  # 1 is on the vertical line
        ((60, 20), bits(3, 4, 2, 1), NO),  # nothing else is at x = 40
        ((60, 52), bits(1, 4, 2, 1), YES),  # 12 below the line
        ((60, 28), bits(1, 4, 2, 1), YES),  # 12 above it
        ((60, 53), bits(1, 4, 2, 1), NO),
        ((60, 20), bits(0, 3, 2, 2), 4 + 3),  # right angles with 1, 2 and 4, and 5 is on the line
        ((60, 20), bits(0, 4, 2, 2), 4 + 4),  # right angles with all
        ((60, 19), bits(0, 4, 2, 2), 4 + 3),  # no angle of 0, 4 and 5 is a right one any more
    ],
)
def test_answers_on_the_border(last: tuple[int, int], question: list[int], answer: int) -> None:
    centres = np.array([[*SCENE[:5], last]])
    assert answer_questions(centres, np.array([SHAPES]), np.array([[question]])).tolist() == [[answer]]
    assert oracle([*SCENE[:5], last], SHAPES, question) == answer


def test_questions_are_of_the_kinds_asked_for_and_colours_and_subtypes_equally_frequent() -> None:
    scenes = SortOfClevr('train', 1000, kinds=KINDS)
    asked = scenes.questions.reshape(1000, 3, 10, 18)
    first, second, kind, subtype = asked.split([6, 6, 3, 3], dim=-1)
    assert torch.equal(kind.mean(dim=(0, 2)), torch.eye(3))
    for part, places in ((first[:, :2], 6), (first[:, 2, :, :5], 5), (second[:, 2, :, :5], 5), (subtype, 3)):
        assert torch.equal(part.sum(dim=-1), torch.ones(part.shape[:-1]))
        assert part.flatten(0, -2).mean(dim=0) == pytest.approx([1 / places] * places, abs=0.02)
    assert not second[:, :2].any()
    assert not (first * second).any()  # two different objects
    only = SortOfClevr('train', 3, kinds=['ternary', 'nonrelational'])
    assert torch.equal(only.questions, asked[:3, [2, 0]].flatten(1, 2))
    image, question, answer = only[20]
    assert torch.equal(image, only.images[1] / 255)
    assert torch.equal(question, only.questions[1, 0])
    assert answer == only.answers[1, 0]
    assert len(only) == len([*only]) == 60


def test_every_ordered_pair_is_asked_about_and_each_kind_draws_its_own_subtypes() -> None:
    ternary = SortOfClevr('train', 200, kinds=['ternary']).questions.flatten(0, 1)
    counts = ternary[:, :5].T @ ternary[:, 6:11]  # (5, 5) of objects A and B, 100 each
    assert not counts.diagonal().any()
    assert counts[~torch.eye(5, dtype=torch.bool)].min() > 60
    asked = SortOfClevr('train', 50, kinds=['nonrelational', 'binary']).questions.reshape(50, 2, 10, 18)
    one, other = asked[..., 15:].argmax(dim=-1).unbind(dim=1)
    assert (one == other).float().mean() == pytest.approx(1 / 3, abs=0.08)


def test_binary_answers_stay_as_a_scene_is_turned_and_mirrored() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        centres, squares, questions = draw_centres(rng), rng.random(6) < 0.5, draw_questions(rng)
        image, others = paint_scene(centres, squares), {'mirrored': centres * [-1, 1] + [SIZE - 1, 0]}
        others['swapped'] = centres[:, ::-1]
        np.testing.assert_array_equal(paint_scene(others['mirrored'], squares), image[:, ::-1])
        np.testing.assert_array_equal(paint_scene(others['swapped'], squares), image.transpose(1, 0, 2))
        answers = [
            answer_questions(places[None], squares[None], questions[None, 1]) for places in (centres, *others.values())
        ]
        np.testing.assert_array_equal(answers[0], answers[1])
        np.testing.assert_array_equal(answers[0], answers[2])


def test_pixels_of_a_scene_are_those_of_its_objects() -> None:
    scenes, corners = SortOfClevr('test', 300), 0
    for image, centres, squares in zip(scenes.images.permute(0, 2, 3, 1), scenes.centres, scenes.squares, strict=True):
        for i, (x, y) in enumerate(centres.tolist()):
            others = [c for c in centres.tolist() if c != [x, y]]
            assert image[y, x].tolist() == list(COLOURS[i])
            for u, v in itertools.product((-5, -3, 3, 5), repeat=2):  # in the corners, and inside the circle alike
                if abs(u) == abs(v) and all(max(abs(x + u - p), abs(y + v - q)) > 5 for p, q in others):
                    assert (image[y + v, x + u].tolist() == list(COLOURS[i])) == (squares[i] or abs(u) == 3)
                    corners += 1
        assert (image == torch.tensor([255, 255, 255])).all(dim=-1).sum() >= 75 * 75 - 6 * 11 * 11
    assert corners > 12000
    distances = np.linalg.norm(scenes.centres[:, :, None] - scenes.centres[:, None], axis=-1) + 99 * np.eye(6)
    assert distances.min() == 10
    assert (scenes.centres.min(), scenes.centres.max()) == (5, 69)
    assert scenes.squares.mean() == pytest.approx(0.5, abs=0.04)


def test_equilateral_corners_have_equal_sides_to_rounding() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        a, b, c = corners = datasets.equilateral_corners(rng, 64).tolist()
        sides = math.dist(a, b), math.dist(b, c), math.dist(c, a)
        assert min(sides) > 0
        assert max(sides) - min(sides) <= math.sqrt(0.5) + 1e-9
        assert all(0 <= x < 64 for corner in corners for x in corner)


def blobs(pixels: list[list[int]]) -> list[tuple[float, float]]:
    """Centroids of the connected white areas."""
    left, found = {(x, y) for y, row in enumerate(pixels) for x, value in enumerate(row) if value}, []
    while left:
        queue = [left.pop()]
        for x, y in queue:
            near = {(x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)} & left
            left -= near
            queue += near
        found.append((sum(x for x, _ in queue) / len(queue), sum(y for _, y in queue) / len(queue)))
    return found


def test_a_triangle_is_drawn_as_three_clusters_which_stand_apart_alike_in_class_0_alone() -> None:
    spreads: dict[int, list[float]] = {0: [], 1: []}
    for image, label in Triangle('train', 100):
        assert image.shape == (3, 64, 64)
        assert image.unique().tolist() == [0, 1]
        border = image[:, [0, -1]].any() or image[:, :, [0, -1]].any()
        corners = blobs(image[0].tolist())
        if len(corners) == 3 and not border:  # apart from each other and not cut off
            sides = [math.dist(p, q) for p, q in itertools.combinations(corners, 2)]
            spreads[label].append(max(sides) - min(sides))
    assert min(len(spreads[0]), len(spreads[1])) > 15
    assert max(spreads[0]) < 2
    assert sum(spread < 2 for spread in spreads[1]) < 0.2 * len(spreads[1])


def test_points_lie_up_to_a_pixel_around_their_corner_and_have_a_radius_of_two() -> None:
    lit, triangles = np.zeros((11, 11)), Triangle('train', 400)
    for index in range(0, 400, 2):
        corners = datasets.equilateral_corners(datasets._generator(0, 'train', 0, index), 64)
        pixels = np.pad(np.asarray(triangles.draw(index)[0]), 5)
        if min(np.abs(p - q).max() for p, q in itertools.combinations(corners, 2)) > 12:  # the clusters stand apart
            for x, y in corners.tolist():
                lit += pixels[y : y + 11, x : x + 11] > 0
    for axis in (0, 1):
        places = np.nonzero(lit.any(axis))[0]
        assert (places.min(), places.max()) == (5 - 3, 5 + 3)
    assert np.abs(lit - lit[::-1, ::-1]).max() < 0.15 * lit.max()


def decode(dataset: AssociativeRecall, image: Image.Image) -> list[dict[str, int]]:
    """What each patch shows, in rows: symbols by 'key', 'value' and 'query', which are its colours."""
    side, cell = dataset.patch_size, dataset.patch_size // 4
    pixels, found = np.asarray(image), []
    for row, column in itertools.product(range(0, len(pixels), side), repeat=2):
        patch = pixels[row : row + side, column : column + side]
        assert np.array_equal(patch, patch[::cell, ::cell].repeat(cell, axis=0).repeat(cell, axis=1))
        shown = {}
        for channel, name in enumerate(('key', 'value', 'query')):
            if patch[..., channel].any():
                cells = (patch[::cell, ::cell, channel] == 255).flatten().tolist()
                code = sum(2**place for place, is_on in enumerate(cells) if is_on)
                shown[name] = code * pow(40503, -1, 2**16) % 2**16 - 1
        found.append(shown)
    return found


def decode_apart(dataset: AssociativeRecall, image: Image.Image) -> list[tuple[str, int] | None]:
    """The same where no patch shows two symbols: (name, symbol), or None."""
    patches = decode(dataset, image)
    assert all(len(patch) < 2 for patch in patches)
    return [next(iter(patch.items()), None) for patch in patches]


@pytest.mark.parametrize(
    'options',
    [
        dict(),
        dict(grid=5, patch_size=8, num_pairs=12, num_keys=13, num_values=3),  # no room for more
        dict(grid=5, num_pairs=1, num_keys=1, num_values=2, distractors=0.0),
        dict(grid=64, num_pairs=101, num_keys=211, num_values=7, distractors=0.5),
    ],
)
def test_the_recalled_value_follows_from_the_pixels(options: dict[str, Any]) -> None:
    dataset = AssociativeRecall('test', 5, **options)
    for index in range(5):
        image, label = dataset.draw(index)
        patches = decode_apart(dataset, image)
        assert len(patches) == dataset.grid**2
        pairs = {p[1]: patches[i + 1] for i, p in enumerate(patches) if p is not None and p[0] == 'key'}
        assert len(pairs) == sum(p is not None and p[0] == 'key' for p in patches) == dataset.num_pairs
        assert [p for p in patches if p is not None and p[0] == 'query'] == [patches[0]]
        assert patches[0] is not None
        assert pairs[patches[0][1]] == ('value', label) == ('value', index % dataset.num_classes)
        assert max(pairs) < dataset.num_keys
        values = [p for p in patches if p is not None and p[0] == 'value']
        assert all(value < dataset.num_classes for _, value in values)
        rest = dataset.grid**2 - 1 - 2 * dataset.num_pairs
        assert len(values) - dataset.num_pairs == pytest.approx(rest * dataset.distractors, rel=0.1)


@pytest.mark.parametrize(
    'options',
    [
        dict(),
        dict(grid=4, patch_size=8, num_pairs=15, num_keys=16, num_values=3),  # no room for more
        dict(grid=9, num_pairs=5, num_keys=9, distractors=0.0),
        dict(grid=40, num_pairs=50, num_keys=90, num_values=7, distractors=0.5),
    ],
)
def test_joined_pairs_share_a_patch(options: dict[str, Any]) -> None:
    dataset = AssociativeRecall('test', 5, joined=True, **options)
    for index in range(5):
        image, label = dataset.draw(index)
        query, *rest = decode(dataset, image)
        pairs = {patch['key']: patch['value'] for patch in rest if 'key' in patch}
        assert query.keys() == {'query'}
        assert pairs[query['query']] == label == index % dataset.num_classes
        assert len(pairs) == sum('key' in patch for patch in rest) == dataset.num_pairs
        assert max(pairs) < dataset.num_keys
        assert max(pairs.values()) < dataset.num_classes
        others = [patch for patch in rest if 'key' not in patch]
        assert all(patch.keys() <= {'value'} for patch in others)
        assert sum(map(len, others)) == pytest.approx(len(others) * dataset.distractors, rel=0.1)


def test_pairs_stand_anywhere_and_neither_place_nor_key_tells_which_one_is_asked_for() -> None:
    dataset = AssociativeRecall('train', 3000, grid=4, num_pairs=2, num_keys=3, num_values=2, distractors=0.0)
    places, asked, wrong = np.zeros(16), np.zeros(3), 0
    for index in range(3000):
        patches = decode_apart(dataset, dataset.draw(index)[0])
        starts = [i for i, p in enumerate(patches) if p is not None and p[0] == 'key']
        places[starts] += 1 / 3000
        assert patches[0] is not None
        asked[patches[0][1]] += 1 / 3000
        wrong += patches[starts[0]][1] != patches[0][1]  # type: ignore[index]
    # 78 ways to place two pairs on 15 patches: the first start is at 1 in 12 of them
    assert places[[0, 15]].tolist() == [0, 0]
    assert places[1] == pytest.approx(12 / 78, abs=0.03)
    assert places[3] == pytest.approx((10 + 1) / 78, abs=0.03)
    assert asked == pytest.approx([1 / 3] * 3, abs=0.03)
    assert wrong / 3000 == pytest.approx(0.5, abs=0.03)


def test_a_seed_gives_the_same_numbers_on_every_machine() -> None:
    first = SortOfClevr('train', 1)
    assert first.centres.tolist() == [[[60, 46], [38, 22], [25, 7], [9, 6], [16, 57], [47, 64]]]
    assert first.squares.tolist() == [[False, False, False, False, False, True]]
    recall = AssociativeRecall('validation', 1, seed=5, grid=4, num_pairs=2, num_keys=3, distractors=0.0)
    shown = {i: p for i, p in enumerate(decode_apart(recall, recall.draw(0)[0])) if p is not None}
    pairs = {9: ('key', 0), 10: ('value', 0), 13: ('key', 2), 14: ('value', 8)}
    assert shown == {0: ('query', 0), **pairs}


@pytest.mark.parametrize('task', [Triangle, AssociativeRecall])
def test_samples_repeat_in_any_order_and_worker_and_differ_between_splits_epochs_and_seeds(
    task: Callable[..., datasets.DrawnImages],
) -> None:
    dataset = task('train', 12, seed=3)
    images = torch.stack([dataset[i][0] for i in reversed(range(12))]).flip(0)
    assert len(images.flatten(1).unique(dim=0)) == 12
    loader = DataLoader(dataset, batch_size=3, num_workers=2, persistent_workers=True)
    assert torch.equal(torch.cat([x for x, _ in loader]), images)
    dataset.set_epoch(1)
    again = torch.cat([x for x, _ in loader])  # from workers that were there before
    assert torch.equal(again, torch.stack([x for x, _ in dataset]))
    others = [again, *(torch.stack([x for x, _ in other]) for other in (task('test', 12, 3), task('train', 12, 4)))]
    assert all((images != other).flatten(1).any(dim=1).all() for other in others)
    dataset.set_epoch(0)
    assert torch.equal(task('train', 99, 3)[11][0], dataset[11][0])  # however many there are
    test = task('test', 12, seed=3)
    test.set_epoch(1)
    assert torch.equal(torch.stack([x for x, _ in test]), others[1])
    with pytest.raises(IndexError):
        dataset[12]


@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_running_workers_see_the_epoch_of_a_copy_too(duplicate: Callable[[Any], Any]) -> None:
    dataset = duplicate(Triangle('train', 4))
    loader = DataLoader(dataset, batch_size=4, num_workers=1, persistent_workers=True)
    (first,) = (x for x, _ in loader)
    dataset.set_epoch(1)
    (second,) = (x for x, _ in loader)
    assert not torch.equal(first, second)


def test_the_command_for_train_py_validates_on_what_there_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets.main(['triangle', str(tmp_path / 'some'), *'--train 3 --validation 0 --test 0'.split()])
    said = capsys.readouterr().out
    assert '--val-split' not in said
    assert 'no images to validate on: write some with --validation' in said


def test_scenes_repeat_with_their_seed_alone() -> None:
    one, two = SortOfClevr('train', 5, seed=3, kinds=KINDS), SortOfClevr('train', 7, seed=3, kinds=KINDS)
    assert torch.equal(one.images, two.images[:5])
    assert torch.equal(one.questions, two.questions[:5])
    assert torch.equal(one.answers, two.answers[:5])
    for other in (SortOfClevr('test', 5, seed=3, kinds=KINDS), SortOfClevr('train', 5, seed=4, kinds=KINDS)):
        assert (one.images != other.images).flatten(1).any(dim=1).all()
        assert not torch.equal(one.questions, other.questions)


@pytest.mark.filterwarnings('ignore:.*unclosed file:ResourceWarning')  # timm leaves its images open
def test_folders_hold_the_images_under_their_classes_for_torchvision_and_timm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / 'recall'
    options = '--train 23 --validation 0 --test 13 --seed 7 --grid 5 --pairs 3 --keys 5 --values 11 --distractors 0.5'
    options += ' --joined'
    datasets.main(['recall', str(folder), *options.split()])
    needs = '--num-classes 11 --input-size 3 20 20 --img-size 20 --model-kwargs img_size=20 --no-aug --val-split test'
    assert f'--data-dir {folder} {needs}' in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ['recall']
    assert sorted(path.name for path in folder.iterdir()) == ['test', 'train']
    sizes = dict(grid=5, num_pairs=3, num_keys=5, num_values=11)
    dataset = AssociativeRecall('train', 23, 7, distractors=0.5, joined=True, **sizes)
    for read in (ImageFolder(folder / 'train'), create_dataset('', root=str(folder), split='train')):
        assert len(read) == 23
        drawn = sorted((label, image.tobytes()) for image, label in map(dataset.draw, range(23)))
        assert sorted((label, image.tobytes()) for image, label in read) == drawn


def test_nothing_is_left_of_a_folder_that_was_not_finished(tmp_path: Path) -> None:
    class Interrupted(Triangle):
        def draw(self, index: int) -> tuple[Image.Image, int]:
            if index == 3:
                raise KeyboardInterrupt
            return super().draw(index)

    with pytest.raises(KeyboardInterrupt):
        write_folders(tmp_path / 'new' / 'data', {'train': Triangle('train', 2), 'test': Interrupted('test', 4)})
    assert [*(tmp_path / 'new').iterdir()] == []
    write_folders(tmp_path / 'new' / 'data', {'test': Triangle('test', 2)})
    with pytest.raises(ValueError, match='expected a folder that does not exist yet, got'):
        write_folders(tmp_path / 'new' / 'data', {'test': Triangle('test', 2)})
    with pytest.raises(ValueError, match='expected at least 2 images in test, one a class, got 1'):
        write_folders(tmp_path / 'other', {'test': Triangle('test', 1)})


@pytest.mark.parametrize(
    ('wrong', 'message'),
    [
        (lambda: Triangle('val'), "a split out of .'train', 'validation', 'test'., got 'val'"),
        (lambda: Triangle(size=0), 'a size of at least 1, got 0'),
        (lambda: Triangle(seed=-1), 'a seed from 0 .*, got -1'),
        (lambda: SortOfClevr(kinds=['unary']), 'some of the kinds .*ternary.*, got .*unary'),
        (lambda: SortOfClevr(kinds='binary'), 'some of the kinds'),
        (lambda: SortOfClevr(kinds=[]), 'some of the kinds'),
        (lambda: AssociativeRecall(grid=4, num_pairs=8), 'num_pairs from 1 to 7, what 4x4 patches hold, got 8'),
        (lambda: AssociativeRecall(grid=4, num_pairs=16, joined=True), 'num_pairs from 1 to 15, .*, got 16'),
        (lambda: AssociativeRecall(grid=-4, num_pairs=3), 'a grid of at least 2, got -4'),
        (lambda: AssociativeRecall(grid=4.5, num_pairs=3), 'a whole number, got 4.5'),
        (lambda: AssociativeRecall(num_pairs=2.5), 'a whole number, got 2.5'),
        (lambda: AssociativeRecall(num_keys=7), 'num_keys from num_pairs, 8, to 65535, got 7'),
        (lambda: AssociativeRecall(num_values=1), 'num_values from 2 .*, got 1'),
        (lambda: AssociativeRecall(patch_size=6), 'a patch_size that 4 divides, got 6'),
        (lambda: AssociativeRecall(distractors=1.5), 'a share of distractors from 0 to 1, got 1.5'),
    ],
)
def test_a_wrong_argument_says_what_is_expected(wrong: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f'expected {message}'):
        wrong()


@pytest.mark.parametrize(
    'argv', ['triangle {} --train 1', 'recall {} --pairs 999', 'triangle {} --train 0 --validation 0 --test 0']
)
def test_the_command_line_says_what_is_wrong_without_a_traceback(
    tmp_path: Path, argv: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match='2'):
        datasets.main(argv.format(tmp_path / 'data').split())
    assert 'error: expected' in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == []


def test_a_folder_that_cannot_be_written_is_said_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / 'file').touch()
    with pytest.raises(SystemExit, match='2'):
        datasets.main(['triangle', str(tmp_path / 'file' / 'data'), '--train', '2'])
    assert 'Not a directory' in capsys.readouterr().err


def test_the_command_for_train_py_bears_a_folder_with_a_space(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / 'my images'
    datasets.main(['triangle', str(folder), '--train', '2', '--validation', '0', '--test', '0'])
    words = shlex.split(capsys.readouterr().out)
    assert words[words.index('--data-dir') + 1] == str(folder)


def test_a_cluster_has_eight_points_and_corners_of_class_1_stand_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    centres: list[list[tuple[float, float]]] = []

    class Pen:
        def __init__(self, image: Image.Image) -> None:
            centres.append([])

        def ellipse(self, box: tuple[float, ...], fill: int) -> None:
            centres[-1].append(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2))

    monkeypatch.setattr('timm_ait.datasets.ImageDraw.Draw', Pen)
    triangles = Triangle('train', 400)
    for index in range(400):
        triangles.draw(index)
    assert {len(points) for points in centres} == {3 * 8}
    corners = np.array(centres[1::2]).reshape(-1, 3, 8, 2).mean(axis=2)
    assert np.histogram(corners, bins=4, range=(0, 64))[0] / corners.size == pytest.approx([0.25] * 4, abs=0.05)


def test_all_values_of_recall_are_equally_frequent() -> None:
    counts = np.zeros(10)
    dataset = AssociativeRecall('train', 60, grid=8)
    for index in range(60):
        green = np.asarray(dataset.draw(index)[0]).reshape(8, 4, 8, 4, 3)[..., 1].swapaxes(1, 2).reshape(64, 16) > 0
        codes = green @ (1 << np.arange(16))
        values = codes[codes > 0] * pow(40503, -1, 2**16) % 2**16 - 1
        counts += np.bincount(values, minlength=10)
    assert counts / counts.sum() == pytest.approx([0.1] * 10, abs=0.025)

"""The keywords of a workspace, and what each of them may be."""

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

__all__ = ['WORKSPACE_ARGS', 'check_limits', 'is_count']

WRITE_MODES = ('train', 'always', 'never')
WRITE_RULES = ('published', 'distinct', 'additive', 'competing')
WRITE_SCOPES = ('batch', 'image')


def is_count(value: Any) -> bool:
    """Whether a value is an integer of at least 1."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


_COUNT = (is_count, 'an integer of at least 1, got {!r}; leave it out for the default')
# What each argument must be, and how an error says it.
LIMITS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(('num_slots', 'slot_dim', 'write_heads', 'bottleneck', 'retrieval_steps'), _COUNT),
    'beta': (lambda x: _is_number(x) and x > 0, 'a finite number above 0, got {!r}; the paper uses 1.0'),
    'memory_decay': (lambda x: _is_number(x) and 0 <= x <= 1, 'a number in [0, 1], got {!r}; the paper uses 0.9'),
    'balance_weight': (
        lambda x: _is_number(x) and x >= 0,
        'a finite number of at least 0, got {!r}; 0 turns it off',
    ),
    'retrieval_scale': (
        lambda x: x is None or _is_number(x),
        "a finite number, got {!r}; None gives the paper's sum",
    ),
    'write_grad': (lambda x: isinstance(x, bool), 'True or False, got {!r}'),
    'write_mode': (lambda x: x in WRITE_MODES, f'one of {WRITE_MODES}, got {{!r}}'),
    'write_rule': (lambda x: x in WRITE_RULES, f'one of {WRITE_RULES}, got {{!r}}'),
    'write_scope': (lambda x: x in WRITE_SCOPES, f'one of {WRITE_SCOPES}, got {{!r}}'),
}
WORKSPACE_ARGS = tuple(LIMITS)  # a model takes them for all its blocks


def check_limits(arguments: dict[str, Any]) -> None:
    """Check arguments of a layer, by name.

    Raises:
        ValueError: With what was expected and what came.
    """
    for name, (is_allowed, expected) in LIMITS.items():
        if name in arguments and not is_allowed(arguments[name]):
            raise ValueError(f'{name} must be {expected.format(arguments[name])}')

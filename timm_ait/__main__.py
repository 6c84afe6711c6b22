"""Register the models, then run a script: ``python -m timm_ait SCRIPT.py ARGS``, also under ``torchrun -m``.

This is for the scripts of timm that have no ``--device-modules``, such as validate.py, benchmark.py, inference.py and
onnx_export.py. The script runs as if you had called it directly: ``sys.argv``, ``__main__`` and the first import path
are the same.
"""

import os
import runpy
import sys

import timm_ait  # noqa: F401  registers the models

USAGE = 'usage: python -m timm_ait SCRIPT.py [ARGS...]'


def main() -> None:
    """Run the script that the command line names.

    Raises:
        SystemExit: With code 2 if it names no script, or one that does not exist.
    """
    script, *args = sys.argv[1:] or ['-h']
    if script in ('-h', '--help'):
        print(f'{USAGE}\n\n{__doc__}', file=sys.stdout if len(sys.argv) > 1 else sys.stderr)
        raise SystemExit(0 if len(sys.argv) > 1 else 2)
    if not os.path.isfile(script):
        print(f'{USAGE}\nno script at {os.path.abspath(script)!r}; give the path of a Python file', file=sys.stderr)
        raise SystemExit(2)
    sys.argv = [script, *args]
    if not getattr(sys.flags, 'safe_path', False):  # Python 3.10 has no safe_path
        sys.path[0] = os.path.dirname(os.path.abspath(script))
    runpy.run_path(script, run_name='__main__')


if __name__ == '__main__':
    main()

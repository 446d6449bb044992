"""Runs a program of this package; without arguments, lists them.

python -m benchmarks
python -m benchmarks kd_loss --quick        # benchmarks/bench_kd_loss.py, also python -m benchmarks.bench_kd_loss
"""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def programs() -> dict[str, str]:
    """Name of each program -> the first line of its docstring."""
    descriptions = {}
    for path in sorted(HERE.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if path.name != "__main__.py" and '__name__ == "__main__"' in text:
            descriptions[path.stem] = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    return descriptions


def main() -> int:
    known = programs()
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.stdout.write("python -m benchmarks PROGRAM [ARGUMENTS]; PROGRAM --help describes its arguments\n\n")
        sys.stdout.writelines(f"{name:22} {text}\n" for name, text in known.items())
        return 0
    name = sys.argv[1] if sys.argv[1] in known else f"bench_{sys.argv[1]}"
    if name not in known:
        sys.stderr.write(f"there is no program {sys.argv[1]!r}; choose one of: {', '.join(known)}\n")
        return 2
    del sys.argv[1]
    runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

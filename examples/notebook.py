"""Run notebooks and write what their cells print and show into them: python examples/notebook.py examples/*.ipynb

Plain Python: the notebooks use none of IPython's commands. Run it in a folder of its own; what they make stays there.
"""

from __future__ import annotations

import ast
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any


def run_cell(source: str, names: dict[str, Any], name: str) -> tuple[Any, str]:
    """Execute a cell; returns the value of its last expression, None where it ends with a statement, and what it printed."""
    tree, value = ast.parse(source, name), None
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with redirect_stdout(StringIO()) as printed, redirect_stderr(printed):
        exec(compile(tree, name, "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), name, "eval"), names)
    return value, printed.getvalue()


def outputs(value: Any, printed: str, count: int) -> list[dict[str, Any]]:
    """A cell's outputs in the notebook's format (nbformat 4)."""
    shown = [{"output_type": "stream", "name": "stdout", "text": printed.splitlines(keepends=True)}] if printed else []
    if value is None:
        return shown
    data = {"text/plain": [repr(value)]}
    if hasattr(value, "_repr_html_"):
        data["text/html"] = value._repr_html_().splitlines(keepends=True)
    return [*shown, {"output_type": "execute_result", "execution_count": count, "metadata": {}, "data": data}]


def run(path: Path) -> dict[str, Any]:
    """The notebook with the outputs of all its cells, run in the working folder. Raises what a cell raises."""
    notebook, names, count = json.loads(path.read_text(encoding="utf-8")), {"__name__": "notebook"}, 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            count += 1
            value, printed = run_cell("".join(cell["source"]), names, f"{path.name}, cell {count}")
            cell |= {"execution_count": count, "outputs": outputs(value, printed, count)}
    return notebook


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(json.dumps(run(path), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

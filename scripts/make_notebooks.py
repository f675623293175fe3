"""Run the notebooks, each from a clean kernel, and write them with their outputs.

    python scripts/make_notebooks.py                  # notebooks/*.py -> notebooks/*.ipynb
    python scripts/make_notebooks.py --check          # run them; write nothing; fail where a pair differs
    python scripts/make_notebooks.py 1_ask_a_picture  # of these alone

What is edited are the ``.py`` files (Jupytext's percent format); what is opened in Colab are the ``.ipynb`` files.
Needs the extra ``notebooks``.
"""

import argparse
import sys
import time
from pathlib import Path

import jupytext
import nbclient
import nbformat

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
MOST_BYTES = 400_000
"""Of a notebook with its outputs."""


def run(source: Path) -> nbformat.NotebookNode:
    """The notebook of a ``.py`` file with what its cells gave."""
    notebook = jupytext.read(source)
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    client = nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": NOTEBOOKS}})
    client.execute()
    for index, cell in enumerate(notebook.cells):
        cell.id = f"cell-{index}"
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [kept(output) for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def kept(output: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """An output without what would be there twice."""
    if "image/png" in output.get("data", {}):
        output.data.pop("image/jpeg", None)
    return output


def sources(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    """Kind and text of each cell."""
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="of notebooks, without a suffix; all by default")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a .ipynb is of another .py")
    args = parser.parse_args()
    chosen = [NOTEBOOKS / f"{name}.py" for name in args.names] or sorted(NOTEBOOKS.glob("*.py"))
    problems = []
    for source in chosen:
        begin, target = time.monotonic(), source.with_suffix(".ipynb")
        notebook = run(source)
        text = nbformat.writes(notebook) + "\n"
        if len(text) > MOST_BYTES:
            problems.append(f"{target.name} would have {len(text)} bytes; at most {MOST_BYTES} are kept")
        elif not args.check:
            target.write_text(text)
        elif not target.exists() or sources(nbformat.read(target, as_version=4)) != sources(notebook):
            problems.append(f"{target.name} is not of {source.name}: run scripts/make_notebooks.py {source.stem}")
        print(f"{source.stem}: {time.monotonic() - begin:.0f} s, {len(text) / 1000:.0f} kB", flush=True)
    print("\n".join(problems), file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

"""The notebook of examples/: every cell runs, here on a tiny base with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def executed(tiny_base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Run the notebook with its parameters replaced, as papermill does."""
    pytest.importorskip("courts_db")
    work = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    place = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
    replaced = f"BASE, FOLDER, PAIRS = {str(tiny_base_folder)!r}, 'project', 90"
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(replaced))
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(work)}}).execute()
    return notebook, work / "project"


@pytest.mark.slow
def test_notebook_leaves_evidence_and_a_report(executed: Any) -> None:
    _notebook, project = executed
    (folder,) = [found.parent for found in project.glob("evaluations/*/evidence.json")]
    assert (folder / "report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_notebook_prints_a_verdict_and_a_served_answer(executed: Any) -> None:
    notebook, _project = executed
    printed = [output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any(text.startswith(("ship", "don't ship", "can't tell")) for text in printed), printed
    answer = notebook.cells[-1].outputs[-1]["data"]["text/plain"]
    assert answer[0] in "'\""


def test_notebook_outputs_come_from_one_complete_run() -> None:
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in cells]
    assert counts in ([None] * len(cells), list(range(1, len(cells) + 1)))

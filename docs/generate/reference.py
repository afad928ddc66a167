"""The generated pages of the reference, which ``make reference`` writes to docs/reference.

They are committed, so that a reader of the repository has them without building the site.
"""

from __future__ import annotations

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(DOCS.parent / "src"), str(Path(__file__).parent)]

import reference_cli  # noqa: E402
import reference_config  # noqa: E402
import reference_documents  # noqa: E402
import reference_http  # noqa: E402
import reference_python  # noqa: E402

_MARK = "\n<!-- Written by `make reference`, from the code. -->\n"


def pages() -> dict[str, str]:
    """Return every generated page by its path in docs/."""
    parts = (reference_cli, reference_config, reference_http, reference_documents, reference_python)
    return {path: f"{text.rstrip()}\n{_MARK}" for part in parts for path, text in part.pages().items()}


def main() -> None:
    """Write the pages, and remove those of panels that no longer exist."""
    written = pages()
    for file in (DOCS / "reference" / "cli").glob("*.md"):
        if f"reference/cli/{file.name}" not in written:
            file.unlink()
    for path, text in written.items():
        (DOCS / path).parent.mkdir(exist_ok=True)
        (DOCS / path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

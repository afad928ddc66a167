"""Write the architectures that an installed vLLM lists, and whether it serves their adapters, from its source.

python tests/making/vllm_architectures.py build/vllm/lib/python3.11/site-packages/vllm
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

FILE = Path(__file__).parents[2] / "src" / "tunewright" / "engines" / "vllm" / "architectures.txt"
LISTS = ("_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS", "_TRANSFORMERS_SUPPORTED_MODELS")


def main(package: Path) -> None:
    """Write the file."""
    FILE.write_text(listing(package), encoding="utf-8")


def listing(package: Path) -> str:
    """Return vLLM's version, and a line for each architecture: its name, and ``lora`` if its class supports LoRA."""
    found = re.search(r"version = '([\d.]+)", (package / "_version.py").read_text(encoding="utf-8"))
    assert found is not None
    models = package / "model_executor" / "models"
    classes: dict[tuple[str, str], list[str]] = {}
    for file in models.rglob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                classes[file.stem, node.name] = [ast.unparse(base) for base in node.bases]

    def supports(module: str, name: str) -> bool:
        # A class of another file is found by its name, which vLLM uses once.
        here = (module, name) in classes
        bases = [base for (m, n), found in classes.items() if n == name and (m == module or not here) for base in found]
        return "SupportsLoRA" in bases or any(supports(module, base) for base in bases if base != name)

    lines = []
    for node in ast.parse((models / "registry.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in LISTS:
            for name, (module, kind) in ast.literal_eval(node.value).items():
                lines.append(f"{name} lora" if supports(module, kind) else name)
    return "\n".join([found[1], *sorted(lines)]) + "\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]))

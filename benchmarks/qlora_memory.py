"""Memory of a base's weights in bfloat16 and in NF4, each in a separate process.

    python benchmarks/qlora_memory.py [BASE]        (a folder or a hub id; without one the bundled base)

Counts the bytes of every weight after one pass over 128 tokens, quantization constants included, by kind of layer; on
a card also torch's peak allocation. (On the CPU the resident set says little: weights in the precision of their file
are memory-mapped pages, which the system drops and reads again.) Prints a table and one
JSON line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, get_args

from tunewright.config import Quantization
from tunewright.core.progress import LogReporter
from tunewright.models.bases import Base, resolve_base

KINDS = ("linear layers", "embeddings and head", "norms")
MIB = 2**20


def main() -> None:
    """Measure both sides, or (in the child) one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", default="bundled:smollm2-135m-instruct")
    parser.add_argument("--side", choices=get_args(Quantization), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        print(json.dumps(measured(resolve_base(given.base, None, Path.cwd(), LogReporter()), given.side)))
        return
    sides: dict[str, dict[str, Any]] = {}
    for side in get_args(Quantization):
        command = [sys.executable, __file__, given.base, "--side", side]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        sides[side] = json.loads(done.stdout)
    whole, nf4 = sides["none"], sides["nf4"]
    print(f"{given.base}, {whole['parameters']:,} parameters, on {whole['device']}; MiB")
    print(f"{'':<22} {'bfloat16':>9} {'NF4':>9} {'ratio':>7}")
    for row in [row for row in (*KINDS, "all weights", "most on the card") if row in whole]:
        print(f"{row:<22} {whole[row] / MIB:>9.1f} {nf4[row] / MIB:>9.1f} {whole[row] / nf4[row]:>6.2f}x")
    bits = 8 * nf4["linear layers"] / nf4["linear parameters"]
    print(f"a weight of a linear layer in NF4: {bits:.3f} bits")
    print(json.dumps({"base": given.base, "bytes": sides, "bits_per_linear_weight": bits}))


def measured(base: Base, side: Quantization) -> dict[str, Any]:
    """Return the bytes of the base with this quantization."""
    import torch

    from tunewright.models.loading import device, load_model

    model: Any = load_model(base, "bfloat16", side)
    with torch.inference_mode():
        model(input_ids=torch.arange(128, device=model.device)[None])
    by_kind, linear_parameters = _by_kind(model)
    return {
        "device": device(),
        "parameters": sum(_elements(weight) for weight in model.parameters()),
        "linear parameters": linear_parameters,
        **{kind: by_kind[kind] for kind in KINDS},
        "all weights": sum(by_kind.values()),
        **({"most on the card": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {}),
    }


def _by_kind(model: Any) -> tuple[Counter[str], int]:
    """Return the bytes of the weights by kind of layer, tied ones once, and the number of weights of linear layers."""
    found: Counter[str] = Counter()
    seen: set[int] = set()
    linear_parameters = 0
    for name, weight in model.named_parameters():
        kind = KINDS[0] if name.endswith("_proj.weight") else KINDS[2] if "norm" in name else KINDS[1]
        linear_parameters += _elements(weight) * (kind == KINDS[0])
        parts = [weight.data]
        state = getattr(weight, "quant_state", None)
        if state is not None:
            parts += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        for part in parts:
            storage = part.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                found[kind] += storage.nbytes()
    return found, linear_parameters


def _elements(weight: Any) -> int:
    state = getattr(weight, "quant_state", None)
    return int(weight.numel() if state is None else state.shape.numel())


if __name__ == "__main__":
    main()

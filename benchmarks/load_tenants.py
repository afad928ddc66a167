"""The tenants of `serve_load.py`: each with a key, an alias and an adapter."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tunewright.adapters.registry import CONFIG, WEIGHTS, Adapter, find_adapter, store_adapter
from tunewright.api.context import ProjectContext
from tunewright.core.clock import now
from tunewright.core.io import digest
from tunewright.serving.tenants import Grounds, State


@dataclass(frozen=True)
class Tenant:
    """One tenant."""

    name: str
    key: str
    alias: str
    adapter: Adapter


def make_tenants(opened: ProjectContext, state: State, count: int, seed: int, noise: float) -> list[Tenant]:
    """Create tenants with adapters that are not yet released; the first has the trained adapter.

    Args:
        noise: standard deviation of what is added to 1, by which each weight of the others' B matrices is multiplied;
            far enough from 0 for answers of another kind.
    """
    trained = find_adapter(opened.folder.adapters)
    made = []
    for number in range(count):
        adapter = trained if number == 0 else disturbed(opened.folder.adapters, trained, seed + number, noise)
        name, alias = f"tenant-{number:02}", f"model-{number:02}"
        state.tenants.add(name, [alias])
        key, _ = state.keys.create(name)
        made.append(Tenant(name, key, alias, adapter))
    return made


def release(state: State, tenant: Tenant) -> None:
    """Release the tenant's adapter under its alias."""
    state.releases.deploy(tenant.alias, tenant.adapter.name, tenant.adapter.digest, Grounds(None, None, "a benchmark"))


def disturbed(adapters: Path, trained: Adapter, seed: int, noise: float) -> Adapter:
    """Store an adapter of the same shape with other answers in ``adapters``; ``noise`` as above."""
    import torch
    from safetensors.torch import load_file, save_file

    draw = torch.Generator().manual_seed(seed)
    weights = load_file(trained.folder / WEIGHTS)
    for name, weight in weights.items():
        if ".lora_B." in name:
            weights[name] = weight * (1 + noise * torch.randn(weight.shape, generator=draw))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        shutil.copyfile(trained.folder / CONFIG, folder / CONFIG)
        inputs = digest({"parent": trained.digest, "seed": seed, "noise": noise})
        lineage = {**trained.lineage, "created": now(), "inputs_digest": inputs}
        return store_adapter(adapters, "disturbed", folder, {}, lineage, [], servable=True)

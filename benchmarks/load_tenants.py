"""The tenants of `serve_load.py` and `serve_rivals.py`: each with a key, an alias and an adapter."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tunewright.adapters.registry import CONFIG, WEIGHTS, Adapter, find_adapter, store_adapter
from tunewright.core.clock import now
from tunewright.core.io import digest
from tunewright.open_project import OpenProject
from tunewright.serving.tenants import State
from tunewright.serving.tenants.releases import Grounds


@dataclass(frozen=True)
class Tenant:
    """One tenant."""

    name: str
    key: str
    alias: str
    adapter: Adapter


def make_adapters(opened: OpenProject, count: int, seed: int, noise: float) -> list[Adapter]:
    """Return the trained adapter, followed by versions of it.

    Args:
        noise: standard deviation of what is added to 1, by which each weight of the others' B matrices is multiplied;
            far enough from 0 for answers of another kind.
    """
    folder = opened.folder.adapters
    trained = find_adapter(folder)
    return [trained, *(disturbed(folder, trained, seed + number, noise) for number in range(1, count))]


def add_tenants(state: State, adapters: Sequence[Adapter]) -> list[Tenant]:
    """Create a tenant for each adapter, which is not yet released."""
    made = []
    for number, adapter in enumerate(adapters):
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

"""The folder that a user works in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pydantic import ValidationError

from tunewright.config import ComputeConfig, Config
from tunewright.config.io import load_config
from tunewright.core.errors import UserError
from tunewright.core.io import write_text
from tunewright.core.progress import Reporter

CONFIG_FILE = "tunewright.yaml"


@dataclass(frozen=True)
class ProjectFolder:
    """A folder with a ``tunewright.yaml``, and the places of its files."""

    root: Path
    changed_config: Config | None = None
    """Used in place of the file's config if a command's options change values."""

    @cached_property
    def config(self) -> Config:
        """The validated config."""
        return self.changed_config or load_config(self.root / CONFIG_FILE)

    @property
    def has_config(self) -> bool:
        """True if this folder is a project."""
        return self.changed_config is not None or (self.root / CONFIG_FILE).exists()

    def on_cluster(self, cluster: str | None) -> ProjectFolder:
        """Return the folder with this ``compute.cluster`` (None: the config's)."""
        if cluster is None:
            return self
        try:
            compute = ComputeConfig(**{**self.config.compute.model_dump(), "cluster": cluster})
        except ValidationError:
            fix = "Use local, auto or ray://HOST:PORT."
            raise UserError(f"Not a cluster: {cluster!r}", where="--cluster", fix=fix) from None
        return ProjectFolder(self.root, self.config.model_copy(update={"compute": compute}))

    @property
    def dataset(self) -> Path:
        """Dataset versions: plain text, made to be committed to git."""
        return self.root / "dataset"

    @property
    def adapters(self) -> Path:
        """Trained adapters, one immutable folder each: NAME-DIGEST12."""
        return self.root / "adapters"

    @property
    def keys(self) -> Path:
        """Public keys that the project trusts to sign adapters: made to be committed to git."""
        return self.root / "keys"

    @property
    def fold_adapters(self) -> Path:
        """The folder of cross-validation adapters, separate from served adapters; all can be trained again."""
        return self.root / ".tunewright" / "crossval" / "adapters"

    @property
    def curve_adapters(self) -> Path:
        """The folder of learning-curve adapters, separate from served adapters; all can be trained again."""
        return self.root / ".tunewright" / "curve" / "adapters"

    @property
    def pilot_adapters(self) -> Path:
        """The folder of `advise`'s adapters, separate from served adapters; all can be trained again."""
        return self.root / ".tunewright" / "pilot" / "adapters"

    @property
    def advice(self) -> Path:
        """The folder of stored advice: one ID.json each."""
        return self.root / "advice"

    @property
    def prompts(self) -> Path:
        """The folder of optimized prompts: one ID.json each, made to be committed to git."""
        return self.root / "prompts"

    @property
    def curves(self) -> Path:
        """Learning curves, one folder for each: ID."""
        return self.root / "curves"

    @property
    def sweeps(self) -> Path:
        """Ledgers of sweeps, one folder for each: ID."""
        return self.root / "sweeps"

    @property
    def evaluations(self) -> Path:
        """Evidence, one folder for each evaluation: ID."""
        return self.root / "evaluations"

    @property
    def incumbents(self) -> Path:
        """Frozen answers of incumbents: plain text, made to be committed to git."""
        return self.root / "incumbents"

    @property
    def serving_state(self) -> Path:
        """Tenants, keys, releases and usage, unless serve.database_url puts them elsewhere; made at first use."""
        return self.root / "serving" / "state.sqlite"

    @property
    def record_key(self) -> Path:
        """The key of recorded requests; made when the first tenant is recorded."""
        return self.root / "serving" / "record.key"

    @property
    def exports(self) -> Path:
        """The folder of exports, with one folder each."""
        return self.root / "exports"

    @property
    def work(self) -> Path:
        """Checkpoints and cached generations, made at first use: git ignores it, all of it can be made again."""
        folder = self.root / ".tunewright"
        if not folder.exists():
            write_text(folder / ".gitignore", "*\n")
        return folder


class OpenFolder:
    """A project's folder and a reporter: enough for a verb that loads no base."""

    def __init__(self, folder: ProjectFolder, reporter: Reporter) -> None:
        self.folder = folder
        self.reporter = reporter
        self.clock: Callable[[], float] | None = None
        """Seconds since 1970 in the serving state, in place of the database's clock (tests)."""


def require_absent(root: Path, names: Iterable[str]) -> None:
    """Refuse a folder that has one of these files."""
    there = [name for name in names if (root / name).exists()]
    if there:
        fix = "Choose another folder, or remove them first."
        raise UserError(f"Already there: {', '.join(there)}", where=str(root), fix=fix)


def create_project(root: Path, files: dict[str, str]) -> ProjectFolder:
    """Write a new project's files, the config among them."""
    require_absent(root, files)
    # The config comes last: a folder without it is not a project yet, so `init` can be repeated after a crash.
    for name in sorted(files, key=lambda name: name == CONFIG_FILE):
        write_text(root / name, files[name])
    return ProjectFolder(root)

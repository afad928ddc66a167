"""``engine serve``: one engine with the project's adapters, for servers on other machines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from tunewright.adapters.registry import adapter_digest
from tunewright.chat.answers import grammar_compiler
from tunewright.config import Quantization
from tunewright.open_project import OpenProject
from tunewright.serving.engines.engine_server import EngineApp, EngineOrigin
from tunewright.serving.engines.start import EngineSpec, start_engine
from tunewright.serving.gateway.server import require_free, serve
from tunewright.serving.options import EngineOptions
from tunewright.serving.release_tests import EngineUnderTest


class EngineService:
    """An engine, loaded and ready to answer servers.

    Args:
        project: sets the engine; ``serve.engines`` of its config is for servers and has no influence.
        quantization: the precision of the base's weights.
        folders: the adapters to load, by name.
        locate: returns the folder of an adapter by its name and digest.

    Raises:
        UserError: the engine cannot listen on the address, is not installed, or cannot hold the base or an adapter.
    """

    def __init__(
        self,
        project: OpenProject,
        quantization: Quantization,
        folders: Mapping[str, Path],
        locate: Callable[[str, str], Path],
        options: EngineOptions,
    ) -> None:
        require_free(options.host, options.port)
        config, base = project.folder.config, project.base
        config = config.model_copy(update={"serve": config.serve.model_copy(update={"engines": ()})})
        kind = options.engine or config.serve.engine
        own = EngineUnderTest(project, config, quantization, kind)
        origin = EngineOrigin(base.digest, quantization, own.precision, own.versions, own.device)
        adapters = {adapter_digest(folder): folder for folder in folders.values()}
        spec = EngineSpec(base, project.chat, quantization, adapters, spare=config.serve.spare_adapters)
        self.engine = start_engine(kind, config, spec, project.reporter)
        self.app = EngineApp(self.engine, origin, locate, grammar_compiler(project.chat)).app
        self._address = options.host, options.port
        self._limits = config.gateway
        self._say = project.reporter.say

    def run(self, on_ready: Callable[[str], None]) -> None:
        """Answer until Ctrl-C or SIGTERM; ``on_ready`` is called with the address."""
        try:
            serve(self.app, *self._address, self._limits, on_ready=on_ready, say=self._say)
        finally:
            self.engine.stop()

"""The engine ``vllm``: vLLM in a separate environment, kept running as a child process."""

from __future__ import annotations

from importlib.resources import files


def vllm_support(architecture: str) -> str:
    """Return in one sentence what vLLM serves of an architecture, by the lists in its source."""
    version, *listed = files(__name__).joinpath("architectures.txt").read_text(encoding="utf-8").splitlines()
    if f"{architecture} lora" in listed:
        return f"vLLM {version} lists it and its adapters."
    if architecture in listed:
        return f"vLLM {version} lists it, but not its adapters: serve them with the engine peft, or merged."
    return f"vLLM {version} does not list it: serve it with the engine peft."

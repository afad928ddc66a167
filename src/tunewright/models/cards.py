"""CUDA GPUs: the memory of common ones by name, and the reason why torch cannot use one."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from difflib import get_close_matches

from tunewright.core.errors import UserError

_MEMORY_MIB = {
    "A10": 23028,
    "A10G": 23028,
    "A30": 24576,
    "A40": 46068,
    "A100 40GB": 40960,
    "A100 80GB": 81920,
    "B200": 183359,
    "H100 80GB": 81559,
    "H200": 143771,
    "L4": 23034,
    "L40S": 46068,
    "RTX 3090": 24576,
    "RTX 4070 Ti Super": 16376,
    "RTX 4080": 16376,
    "RTX 4090": 24564,
    "RTX 5070 Ti": 16303,
    "RTX 5080": 16303,
    "RTX 5090": 32607,
    "RTX 6000 Ada": 49140,
    "RTX A4000": 16376,
    "RTX A6000": 49140,
    "RTX PRO 6000": 97887,
    "T4": 15360,
    "V100 16GB": 16384,
    "V100 32GB": 32768,
}
"""The total that `nvidia-smi` shows: less than in the data sheet if ECC or the driver reserves a part."""
_LEFT_OUT = re.compile(r"nvidia|geforce|tesla|blackwell|generation|sxm\d?|pcie|hbm\d\w?|rtx|[\s_-]")
"""Parts of names, as torch and `nvidia-smi` print them, that distinguish no two GPUs of the table."""
_SIZE = re.compile(r" \d+GB$")


@dataclass(frozen=True)
class Card:
    """A GPU of the table."""

    name: str
    bytes: int


def card_named(text: str, where: str) -> Card:
    """Return the GPU that ``text`` names, such as ``RTX 4090``, ``h100`` or ``a100-80gb``.

    Raises:
        UserError: no GPU of the table, or several (``a100``).
    """
    wanted = _key(text)
    keys = {_key(name): name for name in _MEMORY_MIB}
    found = [name for name in _MEMORY_MIB if wanted in (_key(name), _key(_SIZE.sub("", name)))]
    if len(found) == 1:
        return Card(found[0], _MEMORY_MIB[found[0]] << 20)
    if found:
        both = " or ".join(name.replace(" ", "-").lower() for name in found)
        raise UserError(f"{text!r} exists with different memory sizes", where=where, fix=f"Write {both}.")
    parts = [name for key, name in keys.items() if key in wanted]
    near = [*parts, *(keys[key] for key in get_close_matches(wanted, keys, n=4, cutoff=0.5) if keys[key] not in parts)]
    raise UserError(
        f"{text!r} is neither a memory size nor a known GPU",
        where=where,
        fix=(f"Similar names: {', '.join(near)}. " if near else "") + "Or write its memory, such as 24GB or 24GiB.",
    )


def _key(name: str) -> str:
    return _LEFT_OUT.sub("", name.lower())


def unusable_card() -> str | None:
    """Return why a torch that is built for CUDA can use no GPU here.

    None if it uses one, if it is built without CUDA, or if CUDA_VISIBLE_DEVICES hides all GPUs.
    """
    import torch

    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if torch.version.cuda is None or hidden or torch.cuda.is_available():
        return None
    try:
        torch.cuda.init()
    except RuntimeError as error:
        # Torch's message states the cause first, and then advice.
        return str(error).split(" Please ")[0].strip().rstrip(".")
    return "torch finds no GPU"

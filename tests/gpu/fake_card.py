"""The fake card itself: tensors on ``cuda`` are FakeTensors, those on the CPU are real, and what happens is counted.

To be imported in a process of `card_process` only.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from types import FrameType
from typing import Any, Self

import bitsandbytes  # before `pretend`: it looks for CUDA's libraries where torch says that there is a card
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

_TORCH = str(Path(torch.__file__).parent)
_FAKE = FakeTensorMode(allow_non_fake_inputs=True)
"""One for the whole process: tensors of two modes do not mix."""

# Operations that only look at a tensor's memory in another way, or allocate it.
_WITHOUT_KERNEL = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided",
    "view", "_unsafe_view", "t", "transpose", "expand", "slice", "select", "unsqueeze", "squeeze", "detach", "alias",
    "permute", "split", "split_with_sizes", "unbind", "as_strided", "_reshape_alias", "lift_fresh", "view_as",
}  # fmt: skip


@dataclass(frozen=True)
class Transfer:
    """A copy between the host and the card, or a place where the host waits for the card."""

    where: str
    """The line that caused it, outside of torch."""
    operation: str
    bytes: int
    blocking: bool
    """Whether the host waits: for a copy, unless it is non-blocking and from pinned memory."""
    in_layer: bool
    """Whether it happens inside of a decoder layer, in the forward pass or its recomputation."""


class FakeCard(TorchDispatchMode):
    """While entered: operations on the card run on fake tensors, and are counted.

    Reading a number from the card gives 1, and copying a tensor from it gives ones; both are host syncs.

    Args:
        capability: the card's compute capability.
        built: the architectures that torch is built for, by default those of 2.13 for CUDA 13.
        limit: bytes from which on an allocation raises `torch.OutOfMemoryError`; None: the card is never full.
        reported: bytes that the driver says the card has; None: ``limit``, or 80 GB.

    Attributes:
        now, peak: bytes on the card, at the moment and at most. ``peak`` includes what kernels allocate for themselves
            (`_flash_workspace`); it may be set back to ``now``.
        peak_at: the operation that reached the peak.
        largest: elements of the largest tensor made on the card, with its operation and shape.
        copies: from the host to the card.
        syncs: where the host reads from the card.
        launches: operations that a card would launch kernels for, by name and type of their result.
    """

    def __init__(
        self,
        capability: tuple[int, int] = (9, 0),
        limit: int | None = None,
        built: Sequence[str] = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"),
        reported: int | None = None,
    ) -> None:
        super().__init__()
        self.limit = limit
        cuda: Any = torch.cuda
        cuda.get_arch_list = lambda: list(built)
        cuda.get_device_capability = lambda device=None: capability
        self.now = self.peak = 0
        cuda.max_memory_allocated = lambda device=None: self.peak
        whole = reported or limit or 80 * 10**9
        cuda.mem_get_info = lambda device=None: (whole - self.now, whole)
        cuda.memory_allocated = cuda.memory_reserved = lambda device=None: self.now
        self.peak_at = ""
        self.largest: tuple[int, str, tuple[int, ...]] = (0, "", ())
        self.copies: list[Transfer] = []
        self.syncs: list[Transfer] = []
        self.launches: Counter[tuple[str, torch.dtype | None]] = Counter()
        self._live: dict[int, int] = {}
        self._pinned: set[int] = set()
        self._contexts = ExitStack()
        cuda.Event = partial(_Event, self)

    def __enter__(self) -> Self:
        self._contexts.enter_context(torch.autograd.set_multithreading_enabled(False))
        super().__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)
        self._contexts.close()

    def count_weights(self, model: Any) -> None:
        """Count what a model holds on the card, which was put there before this card was entered."""
        for tensor in [*model.parameters(), *model.buffers()]:
            self._see(tensor)
            state = getattr(tensor, "quant_state", None)
            if state is not None:
                for part in (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code):
                    self._see(part)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled here, and the guard against it costs as much as an operation.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and _is_taken_apart(func):
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        tensors = list(_tensors((*args, *kwargs.values())))
        host = [each for each in tensors if not isinstance(each, FakeTensor)]
        to = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
        name: str = func._schema.name.split("::")[-1]
        if len(host) == len(tensors) and to != "cuda":
            out = func(*args, **kwargs)
            if "pin_memory" in name:
                self._pinned.add(out.untyped_storage().data_ptr())
            return out
        if name in ("_local_scalar_dense", "_to_copy", "copy_") and (
            name == "_local_scalar_dense" or to == "cpu" or (name == "copy_" and host and args[0] is host[0])
        ):
            return self._read(name, args, kwargs)
        for each in host:
            if each.ndim or name in ("_to_copy", "copy_"):
                pinned = each.untyped_storage().data_ptr() in self._pinned
                waits = not (pinned and (kwargs.get("non_blocking") or (name == "copy_" and True in args[2:])))
                self.copies.append(self._transfer(name, each.nbytes, blocking=waits))
        if len(host) == len(tensors):
            with _FAKE:
                out = func(*tree_map(_as_fake, args), **kwargs)
        else:
            if host:
                with _FAKE:
                    args, kwargs = tree_map(_as_fake, (args, kwargs))
            out = func(*args, **kwargs)
        for each in _tensors((out,)):
            self._see(each, name)
        if name not in _WITHOUT_KERNEL:
            self.launches[name, out.dtype if isinstance(out, Tensor) else None] += 1
            self.record(func, (*args, *kwargs.values()), out)
        if "scaled_dot_product_attention" in name:
            self.launches.update(_mask_conversions(args))
        if name == "_varlen_attn_backward":
            self._reach(self.now + _flash_workspace(args), name)
        return out

    def record(self, func: Any, inputs: tuple[Any, ...], out: Any) -> None:
        """Take note of one launch; for subclasses."""

    def _read(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Copy from the card: ones."""
        source: Tensor = args[1] if name == "copy_" else args[0]
        self.syncs.append(self._transfer(name, source.nbytes, blocking=not kwargs.get("non_blocking")))
        if name == "copy_":
            return args[0].fill_(1)
        ones = torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        return ones.item() if name == "_local_scalar_dense" else ones

    def _see(self, tensor: Tensor, name: str = "") -> None:
        if tensor.device.type != "cuda":
            return
        storage = tensor.untyped_storage()
        place = storage._cdata
        if place in self._live:
            return
        self._live[place] = storage.nbytes()
        self.now += storage.nbytes()
        weakref.finalize(storage, self._free, place)
        self.largest = max(self.largest, (tensor.numel(), name, tuple(tensor.shape)))
        self._reach(self.now, name)

    def _free(self, place: int) -> None:
        self.now -= self._live.pop(place, 0)

    def _reach(self, count: int, name: str) -> None:
        if self.limit is not None and count > self.limit:
            raise torch.OutOfMemoryError(f"CUDA out of memory in {name}: {count} bytes of {self.limit}")
        if count > self.peak:
            self.peak, self.peak_at = count, name

    def _transfer(self, operation: str, count: int, blocking: bool) -> Transfer:
        where, in_layer = "", False
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            if not where and not code.co_filename.startswith((_TORCH, __file__)):
                where = f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}"
            in_layer = in_layer or code.co_qualname.endswith("DecoderLayer.forward")
            frame = frame.f_back
        return Transfer(where, operation, count, blocking, in_layer)


class _Event:
    """An event of the card; waiting for it is a sync, which blocks unless the card got further work meanwhile."""

    def __init__(self, card: FakeCard) -> None:
        self.card = card

    def record(self) -> None:
        self.launches = self.card.launches.total()

    def synchronize(self) -> None:
        idle = self.card.launches.total() == self.launches
        self.card.syncs.append(self.card._transfer("synchronize", 0, blocking=idle))


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield tensors among an operation's arguments or results, and in the lists among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _is_taken_apart(func: Any) -> bool:
    """Return whether autograd, which inference mode leaves out, takes this operation apart before it comes here.

    Attention is one kernel on a card; without one it would be taken for its plain arithmetic.
    """
    name: str = func._schema.name
    return name.startswith("aten::") and "scaled_dot_product_attention" not in name and func._can_decompose()


def _as_fake(value: Any) -> Any:
    """Stand in for a real tensor of the host; FakeTensorMode itself would compute with its numbers."""
    if isinstance(value, Tensor) and not isinstance(value, FakeTensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")
    return value


def _mask_conversions(args: tuple[Any, ...]) -> dict[tuple[str, torch.dtype | None], int]:
    """Return the launches by which attention changes a mask before its kernel.

    A boolean one becomes numbers (two numbers and a `where`; `convert_boolean_attn_mask`), and one whose rows do not
    begin at multiples of 8 elements is copied (`pad_bias`, both in aten/src/ATen/native/transformers/attention.cpp).
    """
    mask = args[3] if len(args) > 3 else None
    if not isinstance(mask, Tensor):
        return {}
    aligned = all(stride % 8 == 0 for stride in mask.stride()[:-1])
    return {("mask conversion", mask.dtype): 3 * (mask.dtype == torch.bool) + (not aligned)}


def _flash_workspace(args: tuple[Any, ...]) -> int:
    """Return the bytes that FlashAttention's backward allocates for itself, which no tensor of Python's shows.

    FlashAttention 2's backward over ragged sequences (mha_varlen_bwd in PyTorch's
    aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp): the sum of dq and a number for each query and head
    in float32, with 128 further queries for each sequence, and where heads share keys, dk and dv of each query head.
    """
    query, key, ends = args[1], args[2], args[6]
    (queries, heads, size), (keys, kv_heads, _) = query.shape, key.shape
    padded: int = queries + 128 * (len(ends) - 1)
    whole = -(-size // 32) * 32
    expanded: int = 2 * keys * heads * size * query.element_size() if heads != kv_heads else 0
    sums: int = 4 * padded * heads * (whole + 1)
    return sums + expanded


_LIBRARY = torch.library.Library("aten", "IMPL")


def pretend() -> None:
    """Let torch and its libraries believe in the card; once for a process."""
    # bitsandbytes computes this table when it first needs it, and would do so on fake tensors.
    bitsandbytes.functional.name2qmap["dynamic"] = bitsandbytes.functional.create_dynamic_map()
    bitsandbytes.functional.get_4bit_type("nf4", device="cpu")
    cuda: Any = torch.cuda
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": "fake card",
        "is_bf16_supported": True,
        "set_device": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "synchronize": None,
        "empty_cache": None,
        "manual_seed": None,
        "manual_seed_all": None,
        "set_rng_state": None,
    }
    for name, answer in answers.items():
        setattr(cuda, name, _answering(answer))
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.zeros(16, dtype=torch.uint8)
    # Clipping launches one kernel for many gradients, but only for types listed here.
    torch.utils._foreach_utils._foreach_supported_types.append(FakeTensor)
    cuda._initialized = True
    cuda._lazy_init = _answering(None)
    cuda.amp.common.amp_definitely_not_available = _answering(False)
    # Numbers and lists become tensors on the host first, whose copy to the card is then seen.
    torch._C._set_only_lift_cpu_tensors(True)
    # A build without CUDA computes this from five others, which allocate; on a card it is one kernel.
    _LIBRARY.impl("silu_backward", torch.library.fallthrough_kernel, "AutogradCUDA")
    # A FakeTensor reads number by number; torch makes one copy of a tensor on a card.
    fake: Any = FakeTensor
    fake.tolist = lambda tensor: tensor.cpu().tolist()
    save: Any = torch.save
    torch.save = lambda saved, *args, **kwargs: save(tree_map(_on_host, saved), *args, **kwargs)
    every_module: Any = torch.nn.Module
    original = every_module.to

    def to(module: Any, *args: Any, **kwargs: Any) -> Any:
        """Leave a module alone that is where it is to go: torch cannot exchange fake parameters."""
        parse: Any = torch._C._nn._parse_to
        device, dtype, *_ = parse(*args, **kwargs)
        there = all(weight.device.type == "cuda" for weight in module.parameters())
        if device is not None and device.type == "cuda" and dtype is None and there:
            return module
        return original(module, *args, **kwargs)

    every_module.to = to


def _answering(answer: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: answer


def _on_host(value: Any) -> Any:
    return value.cpu() if isinstance(value, FakeTensor) else value


def put_on_card(model: Any) -> Any:
    """Replace a meta model's parameters and buffers by fake ones on the card, those of 4-bit layers packed."""
    with _FAKE:
        for module in model.modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                _pack_4bit(module)
                continue
            for name, weight in module._parameters.items():
                if weight is not None:
                    made = torch.empty(weight.shape, dtype=weight.dtype, device="cuda")
                    module._parameters[name] = torch.nn.Parameter(made, requires_grad=weight.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")
    return model


def _pack_4bit(layer: Any) -> None:
    """Give a 4-bit layer its packed weight; bitsandbytes' Params4bit cannot hold a fake tensor."""
    whole = torch.empty(layer.weight.shape, dtype=torch.bfloat16, device="cuda")
    packed, state = bitsandbytes.functional.quantize_4bit(
        whole, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    weight: Any = torch.nn.Parameter(packed, requires_grad=False)
    weight.quant_state, weight.bnb_quantized = state, True
    weight.compress_statistics, weight.quant_type = True, "nf4"
    layer._parameters["weight"], layer.quant_state = weight, state


def square_elements(tokens: int) -> int:
    """Return the elements from which on a tensor counts as one of tokens by tokens: a quarter of the square."""
    return prod((tokens, tokens)) // 4

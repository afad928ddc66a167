"""Bytes that one training step needs, by part: arithmetic over a base's shape, nothing is loaded.

Between forward and backward a step keeps the tensors that autograd saves in transformers' Llama and
Mistral with PEFT's LoRA layers. The tests count those tensors
(``torch.autograd.graph.saved_tensors_hooks``) and check these sums against them, to the byte.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from tunewright.models.families import Shape

FLOAT = 4
"""Bytes of a float32 number."""

_INDEX = 8
"""Bytes of an index."""

SHORT = 128
"""The same as ``SHORT`` in training.packing.attention."""

TILE_LOGITS = 1 << 25
"""The same as ``TILE_LOGITS`` in training.packing.fused_loss."""

CARD_RUNTIME = 1 << 30
"""Assumed, not measured: the CUDA context and cuBLAS's workspaces."""

CARD_SLACK = 0.05
"""Assumed, not measured: share of the temporary memory that the GPU's allocator holds on top of it. Steps differ in
size, so freed blocks do not fit the next ones exactly. With expandable segments, whose unit is 2
MiB, little is lost.
"""

_FLASH_PADDING = 128
"""Queries that FlashAttention's backward adds to each sequence, where it accumulates dq."""

PROCESS_SLACK = 0.15
"""Share of the temporary memory that malloc holds on top of it: benchmarks/fit_memory.py (SmolLM2-135M, glibc)."""

PROCESS_SLACK_NF4 = 0.30
"""The same share over 4-bit weights: each matrix that is unpacked for a moment leaves a gap between kept blocks."""

PROCESS_LEFTOVER = 32 << 20
"""Memory that malloc keeps after loading a base: seen where checkpointing leaves little else."""

PROCESS_RUNTIME = 800 << 20
"""Python with torch, transformers, peft and trl before a model is loaded: 570 to 800 MiB are resident here."""

_NF4_BLOCK = 64
_NF4_NESTED = 256
_NF4_TABLES = 4 * (16 + 256 + 1)
"""Per matrix, bitsandbytes keeps NF4's 16 values, the 256 of the nested quantization, and its offset."""


@dataclass(frozen=True)
class TrainingSetup:
    """A combination of training settings that decides memory."""

    targets: tuple[str, ...]
    rank: int
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    nf4: bool = False
    """The linear layers' weights in 4-bit NormalFloat, with double quantization (QLoRA)."""
    recomputed: int | Literal["all"] = 0
    """Layers, from the first, of which only the input is kept; the backward pass computes them again."""
    card: bool = False
    """True on a CUDA GPU, False on the CPU."""
    dropout: bool = False
    padded: bool = False
    """True on the plain path (training.packing.padding): padded rows, and the head's logits of all trained tokens."""

    @property
    def copies_inputs(self) -> bool:
        """True if each adapted layer keeps its own copy of its input.

        training.lora.FusedLinear and fused_linear_4bit keep the input that the layers share. peft's
        own layers, which dropout needs, convert it to the adapter's float32 and autocast converts
        it back, so each keeps a copy.
        """
        return self.dropout

    @property
    def flash(self) -> bool:
        """True if attention is FlashAttention, which takes 16 bits only."""
        return self.card and self.dtype == "bfloat16"

    @property
    def number(self) -> int:
        """The bytes of a number in the forward pass."""
        return 2 if self.dtype == "bfloat16" else FLOAT

    @property
    def name(self) -> str:
        """The display name."""
        return f"QLoRA {self.dtype}" if self.nf4 else f"LoRA {self.dtype}"

    def recomputed_of(self, layers: int) -> int:
        """Return how many of a base's ``layers`` are recomputed."""
        return layers if self.recomputed == "all" else min(self.recomputed, layers)


@dataclass(frozen=True)
class BatchShape:
    """The shape of one micro-batch: rows that share a prefix, packed into one row without padding, or padded rows."""

    rows: int
    shared: int
    """Tokens of the prefix that all rows share; computed once."""
    own: int
    """Tokens of each row after the prefix."""
    trained: int
    """Tokens of each row that have a label: the output layer runs only on these."""

    def __post_init__(self) -> None:
        assert self.rows >= 1
        assert self.shared >= 0
        assert 0 < self.trained <= self.own + bool(self.shared)

    @property
    def tokens(self) -> int:
        """The tokens that go through the model."""
        return self.shared + self.rows * self.own

    @property
    def blocks(self) -> list[tuple[int, int, int]]:
        """(rows, queries, preceding keys) of the prefix and of the suffixes."""
        blocks = ((1, self.shared, 0), (self.rows, self.own, self.shared))
        return [block for block in blocks if block[1]]

    @property
    def sequences(self) -> int:
        """The query sequences of a variable-length batch: the prefix, and each row."""
        return self.rows + bool(self.shared)

    @property
    def attended(self) -> int:
        """The tokens of the rows, counting the prefix once for each."""
        return self.rows * (self.shared + self.own)

    @property
    def keys(self) -> int:
        """The keys that attention reads: the prefix's for itself, and each row's."""
        return self.shared + self.attended


@dataclass(frozen=True)
class MemoryBreakdown:
    """Bytes by part at the moment of peak use."""

    weights: int
    adapter: int
    """LoRA weights in float32, and their copies in the precision of the forward pass."""
    gradients: int
    optimizer: int
    """AdamW's two moments of each LoRA weight, in float32."""
    activations: int
    """Kept by the layers for the backward pass, without attention."""
    attention: int
    """Kept by attention for the backward pass."""
    head: int
    """Memory of the output layer and the loss, in addition to the active layer's."""
    working: int
    """Temporary memory of the active layer."""
    allocator: int
    """Memory held by the allocator in addition to the requested bytes."""
    runtime: int
    """Libraries and driver, before any model."""

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(asdict(self).values())


def weight_bytes(shape: Shape, setup: TrainingSetup) -> int:
    """Return the bytes of the base: 16 (or 32) bits for each weight, or 4-bit linear layers and the rest in 16."""
    if not setup.nf4:
        return shape.parameters * setup.number
    count = shape.linear_parameters
    # A byte for each block's scale, a float32 for each 256 scales: Dettmers et al. 2023, section 3.
    scales = count // _NF4_BLOCK + FLOAT * count // (_NF4_BLOCK * _NF4_NESTED)
    tables = sum(each.count for each in shape.linears) * _NF4_TABLES
    return count // 2 + scales + tables + shape.others * setup.number


def adapter_copies(shape: Shape, setup: TrainingSetup) -> int:
    """Return the bytes of LoRA weight copies in the forward pass's precision; in float32 only of B, which is scaled."""
    if setup.dtype == "bfloat16":
        return setup.number * shape.adapter_parameters(setup.targets, setup.rank)
    if setup.dropout:
        return 0
    return sum(e.count * FLOAT * setup.rank * e.outputs for e in shape.linears if e.name in setup.targets)


def layer_saved(shape: Shape, setup: TrainingSetup, tokens: int) -> int:
    """Return the bytes that one layer keeps for the backward pass, without attention."""
    return _attention_half_saved(shape, setup, tokens) + _mlp_half_saved(shape, setup, tokens)


def _norm(shape: Shape) -> int:
    """Return the bytes that a norm keeps of each token: its input in float32, and one number for its scale."""
    return FLOAT * shape.hidden + FLOAT


def _inputs(shape: Shape, setup: TrainingSetup, names: tuple[str, ...]) -> int:
    """Return the bytes per token that adapted layers with the same input keep of this input."""
    adapted = [name for name in names if name in setup.targets]
    if setup.copies_inputs:
        # Each keeps its own copy; with dropout also a mask.
        return sum((setup.number + setup.dropout) * shape.linear(name)[0] for name in adapted)
    return setup.number * shape.hidden * bool(adapted)


def _attention_half_saved(shape: Shape, setup: TrainingSetup, tokens: int) -> int:
    """Return the bytes that a layer's first half keeps: its norm and its four linear layers."""
    b = setup.number
    reading, writing = shape.half(attention=True)
    inputs = _inputs(shape, setup, reading)
    if setup.copies_inputs:
        inputs += _inputs(shape, setup, writing)
    elif not setup.flash:
        # The output layer reads what FlashAttention returns and keeps already.
        inputs += b * shape.queries * any(name in setup.targets for name in writing)
    return tokens * (
        _norm(shape) + inputs + b * setup.rank * sum(name in setup.targets for name in (*reading, *writing))
    )


def _mlp_half_saved(shape: Shape, setup: TrainingSetup, tokens: int) -> int:
    """Return the bytes that a layer's second half keeps: its norm and its three linear layers."""
    if shape.experts:
        return tokens * _norm(shape) + experts_saved(shape, setup, tokens)
    b = setup.number
    reading, writing = shape.half(attention=False)
    inputs = _inputs(shape, setup, reading)
    # The outputs of gate, of its activation, and of up; their product, where down has an adapter.
    product = (
        (b + setup.dropout * setup.copies_inputs) * shape.intermediate * any(name in setup.targets for name in writing)
    )
    mlp = b * shape.intermediate * 3 + product
    return tokens * (
        _norm(shape) + inputs + mlp + b * setup.rank * sum(name in setup.targets for name in (*reading, *writing))
    )


def experts_saved(shape: Shape, setup: TrainingSetup, tokens: int) -> int:
    """Return the bytes that a layer's experts and router keep for the backward pass, computed as one grouped product.

    Per (token, expert) pair: the outputs of gate and up, of the activation, and of down, which the router's weight
    multiplies; three indices in the order by experts. Per token: the router's probabilities, and its choice.
    """
    b = setup.number
    pair = b * (3 * shape.intermediate + shape.hidden) + FLOAT + 3 * _INDEX
    token = FLOAT * shape.experts + FLOAT + shape.chosen * (FLOAT + _INDEX)
    return tokens * (shape.chosen * pair + token) + FLOAT * shape.experts


def attention_saved(shape: Shape, setup: TrainingSetup, load: BatchShape) -> int:
    """Return the bytes that one layer's attention keeps for the backward pass."""
    b = setup.number
    if setup.flash:
        # Queries, output and a number for each head; keys and values, gathered for each row if rows share a prefix.
        return load.tokens * (2 * b * shape.queries + FLOAT * shape.heads) + 2 * b * shape.keys * load.keys
    if setup.card:
        return _efficient_saved(shape, setup, load)
    kept, queries_whole, keys_whole = 0, False, False
    for rows, queries, before in load.blocks:
        keys = rows * (before + queries)
        if setup.dtype == "bfloat16" and queries <= SHORT:
            # Matrix products: the attention weights, and copies of queries, keys and values unless views suffice.
            kept += b * shape.heads * queries * keys
            views = rows == 1 and not before
            keys_whole = keys_whole or views
            kept += 0 if views else 2 * b * keys * shape.keys
            views = rows == 1 and shape.heads == shape.kv_heads
            queries_whole = queries_whole or views
            kept += 0 if views else b * rows * queries * shape.queries
        else:
            # The fused kernel: its output, a number for each head, its mask, and keys concatenated with the prefix's.
            kept += rows * queries * (b * shape.queries + FLOAT * shape.heads) + b * queries * (before + queries)
            kept += 2 * b * keys * shape.keys * bool(before)
            queries_whole, keys_whole = True, keys_whole or not before
    # A view keeps the whole packed row in memory.
    return kept + load.tokens * b * (shape.queries * queries_whole + 2 * shape.keys * keys_whole)


def _efficient_saved(shape: Shape, setup: TrainingSetup, load: BatchShape) -> int:
    """Return the bytes that SDPA's memory-efficient kernel keeps on a GPU, where float32 uses it; not measured."""
    b = setup.number
    kept = load.tokens * (2 * b * shape.queries + FLOAT * shape.heads)
    for rows, queries, before in load.blocks:
        # Keys and values for each query head; with a prefix also the mask, as booleans and as additive bias.
        kept += 2 * b * rows * (before + queries) * shape.queries
        kept += (1 + b) * queries * (before + queries) * bool(before)
    return kept


def attention_working(shape: Shape, setup: TrainingSetup, load: BatchShape) -> int:
    """Return the temporary bytes of the backward pass through one layer's attention, besides the saved tensors."""
    b, tokens = setup.number, load.tokens
    # The gradients of the layer's and of attention's output, and of queries, keys and values.
    gradients = tokens * b * (shape.hidden + 2 * shape.queries) + 2 * b * load.keys * shape.keys
    if not setup.flash:
        return gradients + 2 * b * load.keys * (shape.queries - shape.keys)
    # FlashAttention 2 (mha_varlen_bwd in PyTorch's flash_attn/flash_api.cpp) accumulates dq in float32, head sizes
    # rounded up to 32, and with grouped heads has dk and dv for each query head.
    padded = tokens + _FLASH_PADDING * load.sequences
    sums = FLOAT * padded * shape.heads * (-(-shape.head // 32) * 32 + 1)
    expanded = 2 * b * load.keys * shape.queries * (shape.heads != shape.kv_heads)
    # Then the gradients of gathered keys and values are summed in float32 (training.packing.attention).
    gathered = FLOAT * shape.keys * (load.keys + tokens) * bool(load.shared)
    return gradients + max(sums + expanded, gathered)


def layer_working(shape: Shape, setup: TrainingSetup, load: BatchShape) -> int:
    """Return the temporary bytes of the backward pass through one layer, besides the saved tensors."""
    b, tokens = setup.number, load.tokens
    written = any(name in setup.targets for name in shape.half(attention=False)[1])
    mlp = b * shape.intermediate * (2 if written else 3) + b * shape.hidden
    if shape.experts:
        mlp = b * shape.chosen * (3 * shape.intermediate + 2 * shape.hidden)
    norm = 3 * FLOAT * shape.hidden + b * shape.hidden
    largest = max(inputs * outputs for inputs, outputs in map(shape.linear, shape.names))
    working = tokens * max(mlp, norm) + (setup.number * largest if setup.nf4 else 0)
    if not setup.card:
        return working
    # When attention's backward runs, the tensors saved by the second half are already free.
    return max(working, attention_working(shape, setup, load) - _mlp_half_saved(shape, setup, tokens))


def head_bytes(shape: Shape, setup: TrainingSetup, trained: int) -> int:
    """Return the bytes of the head: a tile's logits and their sum in float32, states and their gradients.

    On the plain path it is all trained tokens' log-probabilities, their gradient, and that of the logits.
    """
    tile = min(trained, max(1, TILE_LOGITS // shape.vocabulary))
    logits = 3 * trained if setup.padded else 2 * tile
    return FLOAT * logits * shape.vocabulary + 2 * setup.number * shape.hidden * trained


def malloc_bytes(setup: TrainingSetup, passing: int) -> int:
    """Return the bytes that malloc holds without a request, where ``passing`` bytes come and go with each step."""
    return PROCESS_LEFTOVER + int((PROCESS_SLACK_NF4 if setup.nf4 else PROCESS_SLACK) * passing)


def estimate(shape: Shape, setup: TrainingSetup, load: BatchShape) -> MemoryBreakdown:
    """Return the memory that one step with this micro-batch needs at its peak."""
    b, tokens = setup.number, load.tokens
    adapter = shape.adapter_parameters(setup.targets, setup.rank)
    layer, attention = layer_saved(shape, setup, tokens), attention_saved(shape, setup, load)
    working, head = layer_working(shape, setup, load), head_bytes(shape, setup, load.rows * load.trained)
    # Rotary embeddings, which all layers share, and the last norm's input, which is free after the head.
    rotations, last_norm = tokens * 2 * b * shape.head, tokens * _norm(shape)
    recomputed = setup.recomputed_of(shape.layers)
    kept = shape.layers - recomputed
    inputs = recomputed * b * shape.hidden * tokens
    if kept == 0:
        # The head's backward is done before the last layer is recomputed.
        activations, kept_attention = rotations + inputs + layer, attention
        head = max(0, head + last_norm - working - layer - attention)
    else:
        # The first layers are recomputed: by then the backward pass has freed the others' activations.
        activations, kept_attention = rotations + inputs + last_norm + kept * layer, kept * attention
        head = max(0, head - working)
    passing = activations + kept_attention + head + working
    return MemoryBreakdown(
        weights=weight_bytes(shape, setup),
        adapter=FLOAT * adapter + adapter_copies(shape, setup),
        gradients=FLOAT * adapter,
        optimizer=2 * FLOAT * adapter,
        activations=activations,
        attention=kept_attention,
        head=head,
        working=working,
        allocator=int(CARD_SLACK * passing) if setup.card else malloc_bytes(setup, passing),
        runtime=CARD_RUNTIME if setup.card else PROCESS_RUNTIME,
    )

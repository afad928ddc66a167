"""Bytes that one training step needs, by part: arithmetic over a base's shape, nothing is loaded.

What a step keeps between forward and backward is what autograd saves, tensor by tensor, in transformers' Llama and
Mistral with PEFT's LoRA layers. The tests count those tensors (``torch.autograd.graph.saved_tensors_hooks``) and hold
these sums to them, to the byte.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from tunewright.models.families import ATTENTION, MLP
from tunewright.models.memory.shape import Shape

FLOAT = 4
"""Bytes of a float32 number."""

_INDEX = 8
"""Bytes of a place in a tensor."""

SHORT = 128
"""As in training.shared_prefix.attention."""

TILE_LOGITS = 1 << 25
"""As in training.head."""

CARD_RUNTIME = 1 << 30
"""Assumed, not measured: the CUDA context and cuBLAS's workspaces."""

CARD_SLACK = 0.05
"""Assumed, not measured: share of what comes and goes that the card's allocator holds beyond it. Steps differ in size,
so that freed blocks do not fit the next ones exactly; with expandable segments, whose unit is 2 MiB, little is lost."""

_FLASH_PADDING = 128
"""Queries that FlashAttention's backward adds to each sequence, where it sums up dq."""

PROCESS_SLACK = 0.15
"""Share of what comes and goes that malloc holds beyond it: benchmarks/fit_memory.py (SmolLM2-135M, glibc)."""

PROCESS_SLACK_NF4 = 0.30
"""The same over 4-bit weights: each matrix that is unpacked for a moment leaves a gap between what is kept."""

PROCESS_LEFTOVER = 32 << 20
"""What loading a base leaves with malloc, whatever comes after: seen where checkpointing leaves little else."""

PROCESS_RUNTIME = 800 << 20
"""Python with torch, transformers, peft and trl before a model is loaded: 570 to 800 MiB are resident here."""

_NF4_BLOCK = 64
_NF4_NESTED = 256
_NF4_TABLES = 4 * (16 + 256 + 1)
"""bitsandbytes keeps with each matrix: NF4's 16 values, the 256 of the nested quantisation, and its offset."""


@dataclass(frozen=True)
class Way:
    """One way of training an adapter."""

    targets: tuple[str, ...]
    rank: int
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    nf4: bool = False
    """The linear layers' weights in 4-bit NormalFloat, doubly quantised (QLoRA)."""
    checkpointing: bool = False
    """Only each layer's input is kept; the backward pass computes the layer once more."""

    card: bool = False
    """On a CUDA card, not on the processor."""
    dropout: bool = False

    @property
    def copies_inputs(self) -> bool:
        """True if each adapted layer keeps an input of its own.

        training.lora.FusedLinear and FusedLinear4bit keep the input that the layers share. peft's own layers, which
        dropout needs, convert it to the adapter's float32 and autocast converts it back, so that each keeps a copy.
        """
        return self.dropout

    @property
    def flash(self) -> bool:
        """True if attention is FlashAttention, which takes 16 bits only."""
        return self.card and self.dtype == "bfloat16"

    @property
    def number(self) -> int:
        """Bytes of a number in the forward pass."""
        return 2 if self.dtype == "bfloat16" else FLOAT

    @property
    def name(self) -> str:
        """As tables call it."""
        return f"QLoRA {self.dtype}" if self.nf4 else f"LoRA {self.dtype}"


@dataclass(frozen=True)
class Load:
    """What is in one micro-batch: rows that share a prefix, laid out as one packed row without padding."""

    rows: int
    shared: int
    """Tokens of the prefix that all rows share; computed once."""
    own: int
    """Tokens of each row after the prefix."""
    trained: int
    """Tokens of each row that have a label: the output layer runs on these alone."""

    def __post_init__(self) -> None:
        assert self.rows >= 1
        assert self.shared >= 0
        assert 0 < self.trained <= self.own + bool(self.shared)

    @property
    def tokens(self) -> int:
        """Tokens that go through the model."""
        return self.shared + self.rows * self.own

    @property
    def blocks(self) -> list[tuple[int, int, int]]:
        """Rows, queries and keys before those, of the prefix and of what follows it."""
        blocks = ((1, self.shared, 0), (self.rows, self.own, self.shared))
        return [block for block in blocks if block[1]]

    @property
    def sequences(self) -> int:
        """Sequences of queries in a ragged batch: the prefix, and each row."""
        return self.rows + bool(self.shared)

    @property
    def attended(self) -> int:
        """Tokens of the rows, the prefix's once for each."""
        return self.rows * (self.shared + self.own)

    @property
    def keys(self) -> int:
        """Keys that attention reads: the prefix's for itself, and each row's."""
        return self.shared + self.attended


@dataclass(frozen=True)
class Need:
    """Bytes by part at the moment when most are in use."""

    weights: int
    adapter: int
    """LoRA weights in float32, and their copies in the precision of the forward pass."""
    gradients: int
    optimizer: int
    """AdamW's two moments of each LoRA weight, in float32."""
    activations: int
    """What the layers keep for the backward pass, attention apart."""
    attention: int
    """What attention keeps for it."""
    head: int
    """What the output layer and the loss need beyond what the layer at work needs."""
    working: int
    """Needed for a moment only, by the layer at work."""
    allocator: int
    """What the allocator holds beyond what was asked for."""
    runtime: int
    """The libraries' and the driver's own, before any model."""

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(asdict(self).values())


def weight_bytes(shape: Shape, way: Way) -> int:
    """Return the base: 16 bits (or 32) each, or 4-bit linear layers and the rest in 16."""
    if not way.nf4:
        return shape.parameters * way.number
    count = shape.linear_parameters
    # A byte for each block's scale, a float32 for each 256 of those: Dettmers et al. 2023, section 3.
    scales = count // _NF4_BLOCK + FLOAT * count // (_NF4_BLOCK * _NF4_NESTED)
    tables = shape.layers * len(shape.names) * _NF4_TABLES
    return count // 2 + scales + tables + shape.other_parameters * way.number


def adapter_copies(shape: Shape, way: Way) -> int:
    """Copies of the LoRA weights in the forward pass's precision; of B, scaled, even where that is float32."""
    if way.dtype == "bfloat16":
        return way.number * shape.adapter_parameters(way.targets, way.rank)
    if way.dropout:
        return 0
    return shape.layers * sum(FLOAT * way.rank * shape.linear(name)[1] for name in way.targets)


def layer_saved(shape: Shape, way: Way, tokens: int) -> int:
    """Return what one layer keeps for the backward pass, attention apart."""
    return _attention_half_saved(shape, way, tokens) + _mlp_half_saved(shape, way, tokens)


def _norm(shape: Shape) -> int:
    """Return what a norm keeps of each token: its input in float32, and one number for its scale."""
    return FLOAT * shape.hidden + FLOAT


def _inputs(shape: Shape, way: Way, names: tuple[str, ...]) -> int:
    """Return what adapted layers that read the same keep of it, for each token."""
    adapted = [name for name in names if name in way.targets]
    if way.copies_inputs:
        # Its own copy for each; a dropped one also has a mask.
        return sum((way.number + way.dropout) * shape.linear(name)[0] for name in adapted)
    return way.number * shape.hidden * bool(adapted)


def _attention_half_saved(shape: Shape, way: Way, tokens: int) -> int:
    """Return what a layer's first half keeps: its norm and its four linear layers."""
    b = way.number
    inputs = _inputs(shape, way, ("q_proj", "k_proj", "v_proj"))
    if way.copies_inputs:
        inputs += _inputs(shape, way, ("o_proj",))
    elif not way.flash:
        # What FlashAttention returns, and keeps itself, is what the output layer reads.
        inputs += b * shape.queries * ("o_proj" in way.targets)
    return tokens * (_norm(shape) + inputs + b * way.rank * sum(name in way.targets for name in ATTENTION))


def _mlp_half_saved(shape: Shape, way: Way, tokens: int) -> int:
    """Return what a layer's second half keeps: its norm and its three linear layers."""
    if shape.experts:
        return tokens * _norm(shape) + experts_saved(shape, way, tokens)
    b = way.number
    inputs = _inputs(shape, way, ("gate_proj", "up_proj"))
    # The outputs of gate, of its activation, and of up; their product, where down has an adapter.
    product = (b + way.dropout * way.copies_inputs) * shape.intermediate * ("down_proj" in way.targets)
    mlp = b * shape.intermediate * 3 + product
    return tokens * (_norm(shape) + inputs + mlp + b * way.rank * sum(name in way.targets for name in MLP))


def experts_saved(shape: Shape, way: Way, tokens: int) -> int:
    """Return what a layer's experts and their router keep for the backward pass, computed as one grouped product.

    Of each (token, expert) pair: the outputs of gate and up, of the activation, and of down, which the router's weight
    multiplies; three places in the order by experts. Of each token: the router's probabilities, and its choice.
    """
    b = way.number
    pair = b * (3 * shape.intermediate + shape.hidden) + FLOAT + 3 * _INDEX
    token = FLOAT * shape.experts + FLOAT + shape.chosen * (FLOAT + _INDEX)
    return tokens * (shape.chosen * pair + token) + FLOAT * shape.experts


def attention_saved(shape: Shape, way: Way, load: Load) -> int:
    """Return what one layer's attention keeps for the backward pass."""
    b = way.number
    if way.flash:
        # Queries, output and a number for each head; keys and values, gathered for each row where rows share a prefix.
        return load.tokens * (2 * b * shape.queries + FLOAT * shape.heads) + 2 * b * shape.keys * load.keys
    if way.card:
        return _efficient_saved(shape, way, load)
    kept, queries_whole, keys_whole = 0, False, False
    for rows, queries, before in load.blocks:
        keys = rows * (before + queries)
        if way.dtype == "bfloat16" and queries <= SHORT:
            # Matrix products: the attention weights, and copies of queries, keys and values where views don't do.
            kept += b * shape.heads * queries * keys
            views = rows == 1 and not before
            keys_whole = keys_whole or views
            kept += 0 if views else 2 * b * keys * shape.keys
            views = rows == 1 and shape.heads == shape.kv_heads
            queries_whole = queries_whole or views
            kept += 0 if views else b * rows * queries * shape.queries
        else:
            # The fused kernel: its output, a number for each head, its mask, and keys put together with the prefix's.
            kept += rows * queries * (b * shape.queries + FLOAT * shape.heads) + b * queries * (before + queries)
            kept += 2 * b * keys * shape.keys * bool(before)
            queries_whole, keys_whole = True, keys_whole or not before
    # A view keeps the whole packed row.
    return kept + load.tokens * b * (shape.queries * queries_whole + 2 * shape.keys * keys_whole)


def _efficient_saved(shape: Shape, way: Way, load: Load) -> int:
    """Return what SDPA's memory-efficient kernel keeps on a card, which float32 is left to; not measured."""
    b = way.number
    kept = load.tokens * (2 * b * shape.queries + FLOAT * shape.heads)
    for rows, queries, before in load.blocks:
        # Keys and values for each query head, and where there is a prefix the mask, also as what is added to scores.
        kept += 2 * b * rows * (before + queries) * shape.queries
        kept += (1 + b) * queries * (before + queries) * bool(before)
    return kept


def attention_working(shape: Shape, way: Way, load: Load) -> int:
    """Return what the backward pass through one layer's attention needs for a moment, beyond what was kept for it."""
    b, tokens = way.number, load.tokens
    # The gradients of the layer's and of attention's output, and of queries, keys and values.
    gradients = tokens * b * (shape.hidden + 2 * shape.queries) + 2 * b * load.keys * shape.keys
    if not way.flash:
        return gradients + 2 * b * load.keys * (shape.queries - shape.keys)
    # FlashAttention 2 (mha_varlen_bwd in PyTorch's flash_attn/flash_api.cpp) sums dq in float32, heads rounded up to 32
    # numbers, and where heads share keys has dk and dv of each query head.
    padded = tokens + _FLASH_PADDING * load.sequences
    sums = FLOAT * padded * shape.heads * (-(-shape.head // 32) * 32 + 1)
    expanded = 2 * b * load.keys * shape.queries * (shape.heads != shape.kv_heads)
    # Then the gradients of gathered keys, and of values, are summed in float32 (training.shared_prefix.attention).
    gathered = FLOAT * shape.keys * (load.keys + tokens) * bool(load.shared)
    return gradients + max(sums + expanded, gathered)


def layer_working(shape: Shape, way: Way, load: Load) -> int:
    """Return what the backward pass through one layer needs for a moment, beyond what was kept for it."""
    b, tokens = way.number, load.tokens
    mlp = b * shape.intermediate * (2 if "down_proj" in way.targets else 3) + b * shape.hidden
    if shape.experts:
        mlp = b * shape.chosen * (3 * shape.intermediate + 2 * shape.hidden)
    norm = 3 * FLOAT * shape.hidden + b * shape.hidden
    largest = max(inputs * outputs for inputs, outputs in map(shape.linear, shape.names))
    working = tokens * max(mlp, norm) + (way.number * largest if way.nf4 else 0)
    if not way.card:
        return working
    # By the time of attention what the second half kept is free again.
    return max(working, attention_working(shape, way, load) - _mlp_half_saved(shape, way, tokens))


def head_bytes(shape: Shape, way: Way, trained: int) -> int:
    """Logits, tile by tile of trained tokens in float32 and once more while they are summed up; states, gradients."""
    tile = min(trained, max(1, TILE_LOGITS // shape.vocabulary))
    return 2 * FLOAT * tile * shape.vocabulary + 2 * way.number * shape.hidden * trained


def malloc_bytes(way: Way, passing: int) -> int:
    """Return what malloc holds that nobody asked for, where so many bytes come and go with each step."""
    return PROCESS_LEFTOVER + int((PROCESS_SLACK_NF4 if way.nf4 else PROCESS_SLACK) * passing)


def need(shape: Shape, way: Way, load: Load) -> Need:
    """Return what one step with this micro-batch needs, at the moment when most is in use."""
    b, tokens = way.number, load.tokens
    adapter = shape.adapter_parameters(way.targets, way.rank)
    layer, attention = layer_saved(shape, way, tokens), attention_saved(shape, way, load)
    working, head = layer_working(shape, way, load), head_bytes(shape, way, load.rows * load.trained)
    # The positions' rotations, which all layers share, and the last norm's input, which is free after the head.
    rotations, last_norm = tokens * 2 * b * shape.head, tokens * _norm(shape)
    if way.checkpointing:
        # The head is done before the first layer is computed again.
        inputs = shape.layers * b * shape.hidden * tokens
        activations, kept_attention = rotations + inputs + layer, attention
        head = max(0, head + last_norm - working - layer - attention)
    else:
        activations, kept_attention = rotations + last_norm + shape.layers * layer, shape.layers * attention
        head = max(0, head - working)
    passing = activations + kept_attention + head + working
    return Need(
        weights=weight_bytes(shape, way),
        adapter=FLOAT * adapter + adapter_copies(shape, way),
        gradients=FLOAT * adapter,
        optimizer=2 * FLOAT * adapter,
        activations=activations,
        attention=kept_attention,
        head=head,
        working=working,
        allocator=int(CARD_SLACK * passing) if way.card else malloc_bytes(way, passing),
        runtime=CARD_RUNTIME if way.card else PROCESS_RUNTIME,
    )

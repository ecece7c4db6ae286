"""The shape of a decoder and what follows from it: parameters, operations and bytes of a token.

It owns the table of known shapes and the reading of a config.json. It refuses mixtures of experts, layers that do not attend
and families that its count has not been compared with: it would be wrong for some.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastreason.errors import ModelError


@dataclass(frozen=True)
class Shape:
    """A decoder of gated MLPs (gate, up, down), or others (up, down), and grouped-query attention.

    qkv_bias: q, k and v have one. qk_norm: a norm of `head_dim` on q and on k. tied: the head is the embedding.
    """

    name: str
    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    tied: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    gated: bool = True

    @property
    def query_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def layer_matrices(self) -> int:
        """Parameters of one layer that are multiplied with: D (2 Q + 2 K) of attention, 3 D F of the MLP, 2 without a gate."""
        return self.hidden * (2 * self.query_width + 2 * self.kv_width + self.mlp_matrices * self.mlp)

    @property
    def mlp_matrices(self) -> int:
        return 3 if self.gated else 2

    @property
    def body_matrices(self) -> int:
        return self.num_layers * self.layer_matrices

    @property
    def head_matrix(self) -> int:
        return self.vocab * self.hidden

    @property
    def num_parameters(self) -> int:
        """All of them: embedding, head unless tied, matrices, biases, norms."""
        vectors = 2 * self.hidden
        vectors += (self.query_width + 2 * self.kv_width) * self.qkv_bias + 2 * self.head_dim * self.qk_norm
        heads = self.head_matrix * (1 if self.tied else 2)
        return heads + self.body_matrices + self.num_layers * vectors + self.hidden

    def adapter_parameters(self, rank: int, head: bool = False) -> int:
        """Of a low-rank adapter on all linear layers: r times in plus out of each; `head`: of the head too."""
        attention = 4 * self.hidden + 2 * self.query_width + 2 * self.kv_width
        widths = self.num_layers * (attention + self.mlp_matrices * (self.hidden + self.mlp))
        return rank * (widths + (self.hidden + self.vocab) * head)

    def kv_bytes(self, itemsize: int = 2) -> int:
        """Of one token in the KV cache: a key and a value in every layer."""
        return 2 * self.num_layers * self.kv_width * itemsize

    def forward_flops(self, tokens: float, seen: float, head_tokens: float) -> float:
        """Operations of a forward: 2 a matrix element, 4 Q a layer and seen token; and 2 D V a row of logits (`head_tokens`).

        seen: mean number of tokens that a token attends to.
        """
        attention = 4.0 * self.num_layers * self.query_width * seen
        return tokens * (2.0 * self.body_matrices + attention) + head_tokens * 2.0 * self.head_matrix


# layers, D, heads, kv heads, head width, F, V: of the published config.json of each.
SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("smollm2-135m", 30, 576, 9, 3, 64, 1536, 49152, tied=True),
        Shape("qwen2.5-1.5b", 28, 1536, 12, 2, 128, 8960, 151936, tied=True, qkv_bias=True),
        Shape("qwen2.5-7b", 28, 3584, 28, 4, 128, 18944, 152064, tied=False, qkv_bias=True),
        Shape("qwen2.5-32b", 64, 5120, 40, 8, 128, 27648, 152064, tied=False, qkv_bias=True),
        Shape("llama-3-8b", 32, 4096, 32, 8, 128, 14336, 128256, tied=False),
        Shape("llama-3-70b", 80, 8192, 64, 8, 128, 28672, 128256, tied=False),
    )
}
SHORT_NAMES = {
    "135m": "smollm2-135m",
    "1.5b": "qwen2.5-1.5b",
    "7b": "qwen2.5-7b",
    "8b": "llama-3-8b",
    "32b": "qwen2.5-32b",
    "70b": "llama-3-70b",
}


def named_shape(name: str) -> Shape:
    """A row of the table by its name or its size ("7b"); raises ModelError that lists the rows."""
    key = name.lower()
    shape = SHAPES.get(SHORT_NAMES.get(key, key))
    if shape is None:
        raise ModelError(f"--model-shape {name}: no such shape. There are: {', '.join([*SHORT_NAMES, *SHAPES])}.")
    return shape


def shape_of(config: Mapping[str, Any], name: str) -> Shape:
    """The shape that a config.json tells; raises ModelError for what this arithmetic does not cover."""
    config = config.get("text_config") or config
    kind = config.get("model_type", "unknown")
    experts = [key for key in ("num_experts", "num_local_experts", "n_routed_experts") if (config.get(key) or 0) > 1]
    if experts:
        raise ModelError(f"{name}: a {kind} model has {experts[0]}={config[experts[0]]}: experts are not planned for.")
    strange = set(config.get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    if strange:
        raise ModelError(
            f"{name}: a {kind} model has layers of {', '.join(sorted(strange))}: they are not planned for."
        )
    try:
        heads = int(config["num_attention_heads"])
        hidden = int(config["hidden_size"])
        if kind not in (*GATED, *UNGATED):
            raise ModelError(
                f"{name}: a {kind} model's parameters have not been compared with this count. Planned for are: "
                f"{', '.join([*GATED, *UNGATED])}."
            )
        return Shape(
            name=name,
            num_layers=int(config["num_hidden_layers"]),
            hidden=hidden,
            num_heads=heads,
            num_kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            mlp=int(config["intermediate_size"]),
            vocab=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", kind in TIED_BY_DEFAULT)),
            qkv_bias=bool(config.get("attention_bias", kind in ("qwen2", "phi", "starcoder2"))),
            qk_norm=kind in ("qwen3", "gemma3_text"),
            gated=kind in GATED,
        )
    except KeyError as error:
        raise ModelError(f"{name}: its config.json has no {error}: a shape that is not planned for.") from error


# Families whose count is within some per cent of transformers' own models, by their MLP.
GATED: tuple[str, ...] = ("llama", "qwen2", "qwen3", "mistral", "ministral3", "gemma", "gemma2", "gemma3_text", "phi3")
GATED += ("olmo", "olmo2", "olmo3", "smollm3", "cohere", "cohere2", "granite", "hyperclovax", "glm", "glm4", "exaone4")
GATED += ("seed_oss", "stablelm", "ernie4_5")
UNGATED = ("phi", "starcoder2", "nemotron", "arcee", "apertus", "nanochat", "jais2", "gpt_neox", "persimmon")
# Families whose config.json leaves tie_word_embeddings out where it is true.
TIED_BY_DEFAULT = ("gemma", "gemma2", "gemma3_text", "cohere", "cohere2", "smollm3", "starcoder2", "ernie4_5")

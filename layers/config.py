"""The settings of the models. No PyTorch here: the scripts read their flags from this file."""

import math
from dataclasses import MISSING, dataclass

from system.cli import not_negative, positive, share, whole
from system.errors import UsageError
from system.settings import check_settings, setting

NORMS = ("layernorm", "rmsnorm")
ACTIVATIONS = ("gelu", "relu2")
LAWS = ("newton", "published")
PUBLISHED_RADIUS = math.log1p(math.exp(4.0))  # softplus(4), where the first release starts
NEWTON_RADIUS = 16.0
LARGEST_EXPONENT = 1024  # the field is then practically a Gaussian
# of a model: those of a stranger's config must not take minutes, or overflow, before memory ends
LARGEST_SIZES = {
    **dict.fromkeys(("vocab_size", "block_size", "hidden_dim", "num_heads", "mlp_dim"), 1 << 24),
    **dict.fromkeys(("coord_dim", "head_coord_dim"), 1 << 24),
    **{"num_layers": 1000, "exponent": LARGEST_EXPONENT},
}
POSITIONS = ("learned", "rotary", "alibi")
SMEARS = ("none", "keys", "keys-values")


@dataclass
class ModelConfig:
    """The settings of both kinds of model; those made by `setting` are flags, except vocab_size.

    The defaults are those of `--recipe gpt2`, so that the config of an older checkpoint, which
    lacks the newer fields, still describes the same model.
    """

    vocab_size: int = setting(MISSING, "tokens of the vocabulary, set by the tokenizer", whole)
    block_size: int = setting(64, "tokens of a training window", whole)
    hidden_dim: int = setting(128, "channels of the hidden state", whole)
    num_layers: int = setting(4, "layers", whole)
    num_heads: int = setting(4, "attention heads per layer", whole)
    mlp_dim: int = setting(
        512,
        "width of the feed-forward layer (default: the preset's, which gives compared models equal "
        "parameters; if sizes are given, 4 x hidden-dim for newton, and for the others the width "
        "that gives them as many parameters)",
        whole,
    )
    dropout: float = setting(
        0.0, "dropout on embeddings and on the outputs of attention and feed-forward", share
    )
    tie_head: bool = True  # the output layer shares its matrix with the token embedding
    norm: str = setting(
        "layernorm", "layernorm, or rmsnorm: no mean is subtracted, no bias added", choices=NORMS
    )
    bias: bool = setting(True, "biases in linear maps")
    activation: str = setting(
        "gelu", "gelu, or relu2: the square of ReLU, in the feed-forward layer", choices=ACTIVATIONS
    )
    zero_init_outputs: bool = setting(
        False, "start the last maps of attention and feed-forward at 0"
    )
    value_residual: bool = setting(
        False, "mix the first layer's values into those of later layers, by a learned share"
    )
    embedding_skip: bool = setting(
        False, "before each layer, add the embedding to the hidden state, by learned weights"
    )
    logit_softcap: float = setting(
        0.0, "c tanh(logits / c) for the logits, with this c; 0: the plain logits", not_negative
    )

    def __post_init__(self):
        check_settings(self)
        for name, largest in LARGEST_SIZES.items():
            if getattr(self, name, 0) > largest:
                flag = "--" + name.replace("_", "-")
                raise UsageError(f"{flag} is {getattr(self, name)}: give at most {largest}")
        if self.hidden_dim % self.num_heads:
            raise UsageError(
                f"--hidden-dim {self.hidden_dim} is not divisible by --num-heads "
                f"{self.num_heads}: every head takes an equal share of the channels"
            )


@dataclass
class NGTConfig(ModelConfig):
    """Everything that shapes an NGT."""

    coord_dim: int = setting(64, "dimensions of the space that tokens live in (NGT)", whole)
    head_coord_dim: int = setting(16, "dimensions of that space that one head sees (NGT)", whole)
    law: str = setting("newton", "newton, or the published law of the first release", choices=LAWS)
    exponent: int = setting(4, "exponent of the field mass / (1 + r2)^exponent (newton)", whole)
    radius: float | None = setting(
        None,
        "radius of the cutoff, in softenings; fixed under the hard cutoff of newton, otherwise "
        "learned, starting there (default: newton 16, published 4.02)",
        positive,
    )
    use_radius_cutoff: bool = setting(
        True,
        "no pull from beyond the radius (default: on if --radius, --use-soft-cutoff or "
        "--no-background is given and under the published law, otherwise off)",
        flag="--radius-cutoff",
    )
    use_soft_cutoff: bool = setting(
        False, "fade out towards a learned radius instead of a hard edge"
    )
    use_rsqrt: bool = setting(False, "compute 1/r2 by a reciprocal root (published law only)")
    mass_in_value: bool = setting(False, "multiply values by the mass, not the pull")
    retardation: bool = setting(
        True,
        "let a token pull, by a learned share, from the place of the token before it (newton; "
        "without it the loss is 0.09 higher after 1500 steps: reports/study.md)",
    )
    coords_from: str = setting(
        "pull",
        "what moves a token's coordinates after each layer: the pull that it felt, or its hidden "
        "state (default: state under newton, pull under published)",
        choices=("pull", "state"),
    )
    retarded_values: bool = setting(
        False,
        "let a token also pass on, by a learned share, the value of the token before it (newton) "
        "(default: on)",
    )
    background: bool = setting(
        False,
        "add a learned number per head to the sum of fields, so that what a token receives fades "
        "with the field (newton) (default: on)",
    )
    background_start: float = setting(
        0.0015, "where that number starts (newton with a background)", positive
    )
    farthest_time_scale: float = setting(
        0.0035,
        "initial softenings per token of the head that looks farthest back (newton)",
        positive,
    )
    fixed_farthest: bool = setting(
        False,
        "that head keeps this number: short windows cannot teach it how far to look (newton)",
    )
    field_tolerance: float | None = setting(
        None,
        "leave out older tokens that together provably weigh less than this share "
        "(default: 1e-4 with a background and under bf16 and fp16, otherwise 1e-6; 0: nothing)",
        share,
    )

    def __post_init__(self):
        if self.radius is None:
            self.radius = NEWTON_RADIUS if self.law == "newton" else PUBLISHED_RADIUS
        super().__post_init__()
        if self.use_soft_cutoff and not self.use_radius_cutoff:
            raise UsageError(
                "--no-radius-cutoff and --use-soft-cutoff exclude each other: drop one of them"
            )
        for name in ("background", "retarded_values"):
            if getattr(self, name) and self.law == "published":
                raise UsageError(
                    f"--{name.replace('_', '-')} and --law published exclude each other: drop one "
                    "of them"
                )

    @property
    def cutoff(self):
        """The argument of the operator: one of `gravity.law.CUTOFFS`."""
        if not self.use_radius_cutoff:
            return "none"
        return "soft" if self.use_soft_cutoff else "hard"


@dataclass
class VanillaConfig(ModelConfig):
    """Everything that shapes a vanilla transformer."""

    pos: str = setting("learned", "position encoding of a vanilla model", choices=POSITIONS)
    qk_norm: bool = setting(
        False, "RMSNorm over each head's channels of queries and keys (vanilla)"
    )
    smear: str = setting(
        "none",
        "mix keys, or keys and values, with those of the token before, by learned shares, as "
        "--retardation does in NGT (vanilla)",
        choices=SMEARS,
    )
    sink: bool = setting(
        False, "a learned logit per head in the softmax's denominator, for no token (vanilla)"
    )
    head_bias: bool = False  # True only for checkpoints of the first release that have one

    def __post_init__(self):
        super().__post_init__()
        if self.pos == "rotary" and self.hidden_dim // self.num_heads % 2:
            raise UsageError(
                f"--pos rotary turns pairs of channels: --hidden-dim {self.hidden_dim} over "
                f"--num-heads {self.num_heads} leaves an odd number per head"
            )

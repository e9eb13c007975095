"""The settings that both models share."""

from dataclasses import MISSING, dataclass

from system.cli import not_negative, share, whole
from system.errors import UsageError
from system.settings import check_settings, setting

NORMS = ("layernorm", "rmsnorm")
ACTIVATIONS = ("gelu", "relu2")


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
        if self.hidden_dim % self.num_heads:
            raise UsageError(
                f"--hidden-dim {self.hidden_dim} is not divisible by --num-heads "
                f"{self.num_heads}: every head takes an equal share of the channels"
            )

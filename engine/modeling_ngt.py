"""Newton Gravity Transformer for Hugging Face's transformers, in one file of plain PyTorch.

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
    tokens = tokenizer("Once", return_tensors="pt")
    print(tokenizer.decode(model.generate(**tokens, max_new_tokens=50)[0]))

In each head, token i is pulled by itself and the tokens before it:

    q_i   = P z_i
    k_j   = (1 - retardation) S z_j + retardation S z_(j-1)
    r2    = |q_i - k_j|^2 + (time_scale * (t_i - t_j - time_offset))^2
    field = mass_j / (1 + r2)^exponent
    out_i = sum_j field * v_j / (background + sum_j field)

This computes all pairs, (T, T) per head: right for reading and for short texts. Training and long
texts are faster with the project that wrote this file. Letters in shapes: B batch, H heads, T
tokens, N tokens with those of the cache, C coordinates of a head, D channels of a value.
"""

import dataclasses

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

TINY = 1e-30  # in place of a background, so that a token which nothing pulls gets 0
EPS = torch.finfo(torch.float32).eps
NAMES = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
CACHE_NAME = "cache" if "cache" in NAMES else "past_key_values"  # before transformers 5.20


class NGTConfig(PretrainedConfig):
    """The settings of an NGT, under the names that training gives them."""

    model_type = "ngt"
    attribute_map = {
        "hidden_size": "hidden_dim",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "max_position_embeddings": "block_size",
    }

    def __init__(
        self,
        vocab_size=256,
        block_size=64,
        hidden_dim=128,
        num_layers=4,
        num_heads=4,
        mlp_dim=512,
        norm="layernorm",
        bias=True,
        activation="gelu",
        value_residual=False,
        embedding_skip=False,
        logit_softcap=0.0,
        coord_dim=64,
        head_coord_dim=16,
        exponent=4,
        cutoff="none",
        radius=16.0,
        mass_in_value=False,
        coords_from="pull",
        retardation=True,
        retarded_values=False,
        background=False,
        **others,
    ):
        for name, value in locals().copy().items():
            if name not in ("self", "others", "__class__"):
                setattr(self, name, value)
        others.setdefault("tie_word_embeddings", True)
        super().__init__(**others)


def linear(config, inputs, outputs):
    return nn.Linear(inputs, outputs, bias=config.bias)


def norm(config, width):
    return nn.RMSNorm(width, eps=1e-6) if config.norm == "rmsnorm" else nn.LayerNorm(width)


def mixed(x, share, is_first):
    """`(1 - share) x_j + share x_(j-1)` for each token j of x (B, N, C).

    A text's first token, which `is_first` (B, N, 1) marks, keeps its own.
    """
    before = torch.cat([x[:, :1], x[:, :-1]], 1)
    return torch.lerp(x, torch.where(is_first, x, before), share)


class Attention(nn.Module):
    """The pull of earlier tokens."""

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        heads, points = config.num_heads, config.num_heads * config.head_coord_dim
        self.probe_proj = linear(config, config.coord_dim, points)
        self.source_proj = linear(config, config.coord_dim, points)
        self.retardation = nn.Parameter(torch.zeros(points)) if config.retardation else None
        self.v_proj = linear(config, config.hidden_dim, config.hidden_dim)
        self.out_proj = linear(config, config.hidden_dim, config.hidden_dim)
        if config.retarded_values:
            self.value_retardation = nn.Parameter(torch.zeros(config.hidden_dim))
        residual = config.value_residual and layer > 0
        self.value_share = nn.Parameter(torch.tensor(0.5)) if residual else None
        self.time_scale_raw = nn.Parameter(torch.zeros(heads))
        self.time_offset = nn.Parameter(torch.zeros(heads))
        if config.cutoff == "soft":
            self.radius_raw = nn.Parameter(torch.zeros(heads))
        self.background_raw = nn.Parameter(torch.zeros(heads)) if config.background else None

    def split(self, x):
        """(B, T, H * C) to (B, H, T, C)."""
        return x.view(*x.shape[:2], self.config.num_heads, -1).transpose(1, 2)

    def forward(self, h, z, mass, mask, is_first, first_values, cache):
        """What each new token receives (B, T, hidden_dim), and the values of all N tokens.

        `h` (B, T, hidden_dim) is normalised, `z` (B, T, coord_dim), `mass` (B, T); `mask` (B, N)
        is 0 for padding, and `is_first` (B, N, 1) marks the first token that is not.
        """
        config = self.config
        q, source, values = self.split(self.probe_proj(z)), self.source_proj(z), self.v_proj(h)
        if cache is not None:  # it keeps what each token is by itself, (B, 1, N, C)
            source = torch.cat([source, mass[..., None].to(source)], -1)
            source, values = cache.update(source[:, None], values[:, None], self.layer)
            (source, mass), values = (
                source[:, 0].split([q.shape[1] * q.shape[3], 1], -1),
                values[:, 0],
            )
            mass = mass[..., 0]
        if self.retardation is not None:
            source = mixed(source, self.retardation, is_first)
        if config.retarded_values:
            values = mixed(values, self.value_retardation, is_first)
        if self.value_share is not None:
            values = torch.lerp(values, first_values, self.value_share)
        k, v = self.split(source), self.split(values)
        field = self.field(q, k, mass) * mask[:, None, None, :]  # (B, H, T, N)
        if config.mass_in_value:
            v = v * mass[:, None, :, None]
        background = TINY
        if self.background_raw is not None:
            background = F.softplus(self.background_raw)[:, None, None]
        pulled = field.to(v) @ v / (background + field.sum(-1, keepdim=True))
        return self.out_proj(pulled.transpose(1, 2).flatten(2).to(h)), values

    def field(self, q, k, mass):
        """The field of every source at every new token, (B, H, T, N)."""
        config = self.config
        r2 = torch.cdist(q, k, compute_mode="donot_use_mm_for_euclid_dist").square()
        here = torch.arange(k.shape[2], device=q.device)
        age = here[-q.shape[2] :, None] - here  # (T, N), in tokens
        scale = F.softplus(self.time_scale_raw)[:, None, None]
        r2 = r2 + (scale * (age - self.time_offset[:, None, None])).square()
        field = (1 + r2) ** -config.exponent
        if config.cutoff != "none":
            radius2 = r2.new_tensor(config.radius).square()
            if config.cutoff == "soft":
                radius2 = F.softplus(self.radius_raw)[:, None, None].square()
                field = field * F.relu(1 - r2 / radius2).square()
            else:
                field = field * (r2 <= radius2)
        if not config.mass_in_value:
            field = field * mass[:, None, None, :]
        return field * (age >= 0)


class FeedForward(nn.Module):
    """Two linear maps with a GELU or a squared ReLU between them."""

    def __init__(self, config):
        super().__init__()
        self.squares = config.activation == "relu2"
        self.up_proj = linear(config, config.hidden_dim, config.mlp_dim)
        self.down_proj = linear(config, config.mlp_dim, config.hidden_dim)

    def forward(self, h):
        h = self.up_proj(h)
        return self.down_proj(F.relu(h).square() if self.squares else F.gelu(h))


class Layer(nn.Module):
    """Attention, feed-forward, and the motion of the coordinates."""

    def __init__(self, config, layer):
        super().__init__()
        self.config = config
        self.skip = nn.Parameter(torch.tensor([1.0, 0.0])) if config.embedding_skip else None
        self.norm1 = norm(config, config.hidden_dim)
        self.attn = Attention(config, layer)
        self.norm2 = norm(config, config.hidden_dim)
        self.ffn = FeedForward(config)
        self.coord_proj_next = linear(config, config.hidden_dim, config.coord_dim)
        self.coord_norm = norm(config, config.coord_dim)

    def forward(self, h, z, embedding, *others):
        """The new h (B, T, hidden_dim) and z (B, T, coord_dim), and the layer's values."""
        if self.skip is not None:
            h = self.skip[0] * h + self.skip[1] * embedding
        a, values = self.attn(self.norm1(h), z, *others)
        h = h + a
        h = h + self.ffn(self.norm2(h))
        if self.config.coords_from == "state":
            a = h * (h.square().mean(-1, keepdim=True) + EPS).rsqrt()
        return h, self.coord_norm(z + self.coord_proj_next(a)), values


class NGTForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model: token ids (B, T) to logits (B, T, vocab_size)."""

    config_class = NGTConfig
    _tied_weights_keys = {"head.weight": "token_emb.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.token_emb = nn.Embedding(config.vocab_size, config.hidden_dim)
        self.mass_emb = nn.Embedding(config.vocab_size, 1)
        self.coord_proj = linear(config, config.hidden_dim, config.coord_dim)
        self.coord_norm = norm(config, config.coord_dim)
        self.layers = nn.ModuleList(Layer(config, n) for n in range(config.num_layers))
        self.norm = norm(config, config.hidden_dim)
        self.head = nn.Linear(config.hidden_dim, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module):
        """Keep PyTorch's start: weights come from a trained checkpoint."""

    def get_input_embeddings(self):
        return self.token_emb

    def get_output_embeddings(self):
        return self.head

    def forward(
        self,
        input_ids,
        attention_mask=None,
        cache=None,
        past_key_values=None,
        labels=None,
        use_cache=False,
        logits_to_keep=0,
        **_,
    ):
        """Logits, and the loss if `labels` (B, T) are given: -100 is left out, as usual.

        `attention_mask` (B, N) is 0 for padding, which must be on the left; `past_key_values` is
        the name of `cache` before transformers 5.
        """
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache()
        before = 0 if cache is None else cache.get_seq_length()
        count = before + input_ids.shape[1]
        if attention_mask is None:
            attention_mask = input_ids.new_ones(len(input_ids), count)
        mask = attention_mask[:, -count:]
        mass = F.softplus(self.mass_emb(input_ids).float())[..., 0]  # (B, T)
        is_first = torch.cat([torch.ones_like(mask[:, :1]), 1 - mask[:, :-1]], 1)[..., None] > 0
        h = embedding = self.token_emb(input_ids)
        z, first_values = self.coord_norm(self.coord_proj(h)), None
        for layer in self.layers:
            h, z, v = layer(h, z, embedding, mass, mask, is_first, first_values, cache)
            first_values = v if first_values is None else first_values
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, cap = self.head(self.norm(h[:, kept])), self.config.logit_softcap
        logits = cap * torch.tanh(logits.float() / cap) if cap else logits
        loss = None
        if labels is not None:
            targets = labels[:, 1:].reshape(-1)
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE_NAME: cache})

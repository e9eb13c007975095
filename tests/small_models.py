"""Small random models of each kind, and checkpoints of them."""

import dataclasses

import torch
import torch.nn.functional as F

from engine.checkpoint import FORMAT_VERSION, save_checkpoint
from engine.models import build_model
from engine.pulls import visit_pulls
from gravity.heads import softplus_inverse
from model import NGT, NGTConfig
from text.tokenizer import CharTokenizer
from vanilla_model import Vanilla, VanillaConfig

VOCAB, BLOCK = 29, 16
SMALL = dict(vocab_size=VOCAB, block_size=BLOCK, hidden_dim=24, num_layers=2, num_heads=4)
NGT_SMALL = dict(**SMALL, coord_dim=12, head_coord_dim=6, mlp_dim=32)
RADIUS = 3.0
MODERN = dict(
    **{"norm": "rmsnorm", "bias": False, "activation": "relu2", "value_residual": True},
    **{"embedding_skip": True, "logit_softcap": 3.0},
)
MODERN_VANILLA = MODERN | {"qk_norm": True, "smear": "keys-values", "sink": True}
NEWTON = {
    "newton none": dict(use_radius_cutoff=False),
    "newton hard": dict(radius=RADIUS),
    "newton soft": dict(radius=RADIUS, use_soft_cutoff=True),
    "newton mass in value": dict(radius=RADIUS, use_soft_cutoff=True, mass_in_value=True),
    "newton modern": dict(radius=RADIUS, **MODERN),
    "newton state": dict(radius=RADIUS, coords_from="state", retarded_values=True, **MODERN),
    "newton background": dict(use_radius_cutoff=False, background=True, field_tolerance=1e-6),
}
PUBLISHED = {
    "published none": dict(law="published", use_radius_cutoff=False),
    "published hard": dict(law="published"),
    "published soft": dict(law="published", use_soft_cutoff=True, mass_in_value=True),
    "published modern": dict(law="published", use_soft_cutoff=True, **MODERN),
}
VANILLA = {f"vanilla {pos}": dict(pos=pos) for pos in ("learned", "rotary", "alibi")}
VANILLA |= {f"{name} modern": pos | MODERN_VANILLA for name, pos in VANILLA.items()}
ALL = {**NEWTON, **PUBLISHED, **VANILLA}


def lively(name, **sizes):
    """A model whose every parameter is random and large enough that each part is felt in the
    logits; heads of newton reach 5 to 14 tokens back. `sizes` replace those of `SMALL`."""
    if name in VANILLA:
        model = Vanilla(VanillaConfig(**SMALL | {"mlp_dim": 32} | VANILLA[name] | sizes))
    else:
        model = NGT(NGTConfig(**NGT_SMALL | ALL[name] | sizes))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(("time_scale_raw", "radius_raw")):
                continue
            if parameter.dim() == 2 and "emb" not in parameter_name:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            elif parameter_name == "norm.weight":
                parameter.normal_()  # of either sign, or the tied head repeats the last token
            elif parameter_name.endswith("bias"):
                parameter.normal_(std=0.1)  # more, and one token always wins
            elif "norm" in parameter_name and parameter_name.endswith("weight"):
                parameter.uniform_(0.7, 1.3)
            else:
                parameter.normal_(std=0.5)
        # equally long, or the longest embedding is always the likeliest
        model.token_emb.weight.copy_(2 * F.normalize(model.token_emb.weight, dim=-1))
        if name in NEWTON:
            for layer in model.layers:
                for proj in (layer.attn.probe_proj, layer.attn.source_proj):
                    proj.weight *= 0.4  # well within the radius of each other
                scale = torch.tensor([0.25, 0.4, 0.7, 1.1])
                layer.attn.time_scale_raw.copy_(torch.log(torch.expm1(scale)))
                layer.attn.time_offset.copy_(torch.tensor([1.0, -1.0, 0.5, 0.0]))
    return model.eval()


def ids(length, batch=1):
    return torch.randint(VOCAB, (batch, length))


LETTERS = CharTokenizer.train("abcdefghijklmnopqrstuvwxyz :\n\x1b")


def make_checkpoint(path, tokenizer=LETTERS, **config):
    """A small random model, saved as training saves it."""
    torch.manual_seed(1)
    config = {
        **{"model_type": "ngt", "vocab_size": tokenizer.vocab_size, "block_size": 16},
        **{"hidden_dim": 16, "num_layers": 2, "num_heads": 2, "mlp_dim": 16},
        **config,
    }
    model = build_model(config)
    for parameter in model.parameters():  # livelier than the start of training
        torch.nn.init.normal_(parameter, std=0.3)
    _save(path, model, config, tokenizer)
    return model.eval()


def _save(path, model, config, tokenizer):
    checkpoint = {
        **{"format_version": FORMAT_VERSION, "model_state": model.state_dict(), "iter": 7},
        **{"config": config, "vocab": tokenizer.to_vocab(), "best_val": 1.0},
    }
    save_checkpoint(path, checkpoint)


@torch.no_grad()
def make_checkpoint_with_background(path, background=1e-5, tokenizer=LETTERS):
    """As `make_checkpoint`, without a radius; at 1e-5 heads are about as quiet as loud."""
    config = {"background": True, "use_radius_cutoff": False, "field_tolerance": 1e-6}
    model = make_checkpoint(path, tokenizer, **config)
    for layer in model.layers:
        layer.attn.background_raw.fill_(softplus_inverse(background))
    _save(path, model, {"model_type": "ngt", **dataclasses.asdict(model.config)}, tokenizer)
    return model


def pull_weights(model, tokens):
    """The shares of `visit_pulls` as one tensor (num_layers, num_heads, T, T); tokens (1, T)."""
    count, config = tokens.shape[1], model.config
    shape = (config.num_layers, config.num_heads, count, count)
    weights = model.token_emb.weight.new_zeros(shape)

    def keep(layer, rows, shares):
        weights[layer, :, rows, : rows.stop] = shares

    visit_pulls(model, tokens, keep)
    return weights

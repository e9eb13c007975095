"""Exported folders: opened by transformers, read back by us, and damaged."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import export
from conftest import SENTENCES
from engine.checkpoint import FORMAT_VERSION, load_model, save_checkpoint
from engine.generation import TokenStream
from small_models import LETTERS, lively, make_checkpoint
from system.errors import UserError
from text.tokenizer import BPETokenizer

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")
NEWTON = ("none", "hard", "soft", "mass in value", "state", "background")
TEXT = "the fox : jumps\nover"


@pytest.fixture
def saved(in_tmp):
    """A function that saves a lively model of a kind with a tokenizer, and returns the model."""

    def saved(name, tokenizer, **others):
        model = lively(name, vocab_size=tokenizer.vocab_size, block_size=64)
        kind = "vanilla" if name.startswith("vanilla") else "ngt"
        config = {"model_type": kind, **vars(model.config)}
        checkpoint = {
            **{"format_version": FORMAT_VERSION, "model_state": model.state_dict()},
            **{"config": config, "vocab": tokenizer.to_vocab(), **others},
        }
        save_checkpoint(f"{name}.pt", checkpoint)
        return model

    return saved


def exported(name, form):
    folder = f"{form} {name}"
    flags = ["--checkpoint-path", f"{name}.pt", "--output", folder, "--format", form]
    assert export.main(flags) == 0
    return Path(folder)


@pytest.mark.parametrize("kind", NEWTON)
@torch.no_grad()
def test_transformers_gives_the_same_logits(kind, saved):
    """The same logits, the same greedy text, with and without cache and padding on the left."""
    tokenizer = LETTERS if kind != "background" else BPETokenizer.train(SENTENCES, 300)
    model = saved(f"newton {kind}", tokenizer)
    folder = exported(f"newton {kind}", "huggingface")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    reader = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    ids = tokenizer.encode(TEXT)
    assert reader(TEXT)["input_ids"] == ids and reader.decode(ids) == TEXT
    tokens = torch.tensor([ids])
    expected = model(tokens)
    result = theirs(tokens, labels=tokens)
    assert torch.allclose(result.logits, expected, atol=1e-5)
    log_chances = expected[0, :-1].log_softmax(-1)
    loss = -log_chances.gather(1, tokens[0, 1:, None]).mean()
    assert torch.allclose(result.loss, loss, atol=1e-5)
    stream = TokenStream(model)
    stream.feed(ids)
    written = list(stream.generate(12, temperature=0))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), tokens], 1)
    mask = (torch.arange(padded.shape[1]) >= 3).long()[None]
    found = theirs(padded, attention_mask=mask).logits[:, 3:]
    assert torch.allclose(found, expected, atol=1e-5)
    both = torch.cat([padded, padded.flip(1)]), torch.cat([mask, torch.ones_like(mask)])
    for use_cache in (True, False):
        found = theirs.generate(
            both[0], attention_mask=both[1], max_new_tokens=12, do_sample=False, use_cache=use_cache
        )
        assert found[0, padded.shape[1] :].tolist() == written


@pytest.mark.parametrize("name", ["newton background", "published soft", "vanilla rotary modern"])
def test_there_and_back(name, saved, capsys):
    others = {} if name.startswith("published") else {"iter": 7, "best_val": 1.5}
    model = saved(name, LETTERS, **others)
    forms = ("safetensors", "huggingface") if name.startswith("newton") else ("safetensors",)
    for form in forms:
        folder = exported(name, form)
        assert export.main(["--from", str(folder), "--output", f"{form}.pt"]) == 0
        again, tokenizer, checkpoint = load_model(f"{form}.pt")
        tokens = torch.randint(LETTERS.vocab_size, (1, 20))
        assert torch.equal(again(tokens), model(tokens))
        assert tokenizer.fingerprint == LETTERS.fingerprint
        assert {key: checkpoint[key] for key in others} == others
        for flags in (
            ["--checkpoint-path", f"{name}.pt", "--output", str(folder)],
            ["--from", str(folder), "--output", f"{form}.pt"],
        ):
            with pytest.raises(UserError, match="is there already"):
                export.main(flags)
    if len(forms) == 1:
        with pytest.raises(UserError, match="only NGT's law newton"):
            exported(name, "huggingface")


def test_damaged_folders(in_tmp):
    make_checkpoint("x.pt")
    folder = exported("x", "safetensors")

    def refused(words, change):
        damaged = in_tmp / "damaged"
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(folder, damaged)
        change(damaged)
        with pytest.raises(UserError, match=words):
            export.main(["--from", str(damaged), "--output", "again.pt"])
        assert not Path("again.pt").exists()

    def edited(damaged, **changes):
        given = json.loads((damaged / "config.json").read_text())
        given["newton_gravity"] |= changes
        (damaged / "config.json").write_text(json.dumps(given))

    def cut(damaged):
        weights = damaged / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])

    refused("no config that export.py wrote", lambda d: (d / "config.json").unlink())
    refused("no config that export.py wrote", lambda d: (d / "config.json").write_text("[" * 9999))
    refused("no config that export.py wrote", lambda d: (d / "config.json").write_text("{}"))
    refused("is damaged", lambda d: edited(d, config={}))
    refused("is damaged", lambda d: edited(d, config=[]))
    refused("is damaged", lambda d: edited(d, vocab={"type": "char", "itos": ["a"]}))
    refused("is damaged", lambda d: edited(d, iter="many"))
    refused("cannot be read", cut)
    refused("cannot be read", lambda d: (d / "model.safetensors").unlink())

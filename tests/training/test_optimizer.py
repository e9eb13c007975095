"""AdamW and Muon: which weights each has, their rates, their state in a checkpoint."""

import copy

import pytest
import torch

from engine.models import build_model
from small_models import SMALL
from small_runs import same
from training import optimizer as module
from training.config import DEFAULTS
from training.ranks import Ranks

CPU = torch.device("cpu")
SETTINGS = {"weight_decay": 0.1, "beta2": 0.95, "learning_rate": 2e-3, "shard": "none"}
SCHEDULE = {"min_learning_rate": 2e-4, "matrix_learning_rate": None, "warmup_steps": 10}
SCHEDULE |= {"max_steps": 110, "use_cosine_schedule": True}


def optimizer_of(kind="vanilla", optimizer="muon", **settings):
    """`(model, optimizer)` of a small model that has taken one step."""
    model = build_model(SMALL | {"model_type": kind, "mlp_dim": 32, "bias": False, **settings})
    made = module.make_optimizer(model, SETTINGS | {"optimizer": optimizer}, CPU, Ranks())
    step(model, made)
    return model, made


def step(model, optimizer):
    generator = torch.Generator().manual_seed(len(list(model.parameters())))
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["ngt", "vanilla"])
def test_muon_has_the_matrices_inside_the_model(kind):
    """Not the embeddings (the head is tied to one), masses, norms or what a head learns."""
    model, optimizer = optimizer_of(kind)
    names = {id(x): name for name, x in model.named_parameters()}
    *of_adamw, of_muon = ({names[id(x)] for x in g["params"]} for g in optimizer.param_groups)
    inside = "probe_proj", "source_proj", "q_proj", "k_proj", "v_proj", "out_proj", "up_proj"
    inside += "down_proj", "coord_proj", "coord_proj_next"
    assert of_muon == {name for name in names.values() if name.split(".")[-2] in inside}
    assert len(of_muon) == (15 if kind == "ngt" else 12)
    assert of_adamw[0] == {"token_emb.weight"} | (
        {"pos_emb.weight"} if kind == "vanilla" else set()
    )
    assert set.union(*of_adamw, of_muon) == set(names.values())
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0, 0.1]
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)


def test_muons_step_is_orthogonal_and_as_long_as_adamws():
    """The singular values of a change are alike, and its root mean square is about 0.2 rates."""
    model, optimizer = optimizer_of()
    weight = model.layers[0].attn.q_proj.weight
    before = weight.detach().clone()
    step(model, optimizer)
    change = (weight.detach() - before * (1 - 2e-3 * 0.1)) / 2e-3
    values = torch.linalg.svdvals(change) / (0.2 * 24**0.5)
    assert values.min() > 0.5 and values.max() < 1.3
    assert float(change.square().mean().sqrt()) == pytest.approx(0.2, rel=0.2)


def test_rates_of_both_follow_one_schedule():
    _, optimizer = optimizer_of()
    for given, scale in ((None, 1.0), (1e-2, 5.0), (1e-4, 0.05)):
        config = SETTINGS | SCHEDULE | {"matrix_learning_rate": given}
        for step, share in ((0, 0.1), (10, 1.0), (60, 0.55), (110, 0.1)):
            module.set_learning_rates(optimizer, step, config)
            rates = [group["lr"] for group in optimizer.param_groups]
            assert rates == pytest.approx([share * 2e-3] * 2 + [share * 2e-3 * scale])
    config = SETTINGS | SCHEDULE | {"learning_rate": 0.0, "matrix_learning_rate": 1e-2}
    module.set_learning_rates(optimizer, 10, config)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0, 1e-2]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_restored_optimizer_takes_the_same_step(kind):
    """State and step are those of the optimizer that was saved, bit for bit."""
    model, optimizer = optimizer_of(optimizer=kind)
    saved = copy.deepcopy(module.state_of(optimizer, Ranks()))
    other = copy.deepcopy(model)
    restored = module.make_optimizer(other, SETTINGS | {"optimizer": kind}, CPU, Ranks())
    module.restore_optimizer(restored, copy.deepcopy(saved["state"]))
    assert same(module.state_of(restored, Ranks()), saved)
    step(model, optimizer)
    step(other, restored)
    assert same(model.state_dict(), other.state_dict())
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    assert numbers == [*range(len(list(model.parameters())))] and sorted(saved["state"]) == numbers


def test_adamws_state_has_the_format_of_older_checkpoints():
    """That of torch.optim.AdamW over the same two groups."""
    _, optimizer = optimizer_of(optimizer="adamw")
    assert type(optimizer) is torch.optim.AdamW
    state = module.state_of(optimizer, Ranks())
    assert all(x.keys() == {"step", "exp_avg", "exp_avg_sq"} for x in state["state"].values())
    assert DEFAULTS["beta2"] == 0.99 and DEFAULTS["optimizer"] == "adamw"


@pytest.mark.parametrize("name", ["AdamW's under Muon", "Muon's under AdamW", "NaN", "shape"])
def test_state_of_another_optimizer_is_refused(name):
    _, optimizer = optimizer_of()
    state = copy.deepcopy(module.state_of(optimizer, Ranks())["state"])
    last = max(state)
    if name == "AdamW's under Muon":
        state[last] = state[0]
    elif name == "Muon's under AdamW":
        state[0] = state[last]
    elif name == "NaN":
        state[last]["momentum_buffer"][0, 0] = float("nan")
    else:
        state[last]["momentum_buffer"] = torch.zeros(3, 3)
    with pytest.raises(ValueError, match="optimizer_state"):
        module.restore_optimizer(optimizer, state)

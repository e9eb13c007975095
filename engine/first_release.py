"""Translates checkpoints of the first release to this release's names (law `published`)."""

import torch

FIRST_RELEASE_VERSION = 1


def from_first_release(checkpoint):
    """A first-release checkpoint with this release's weight names and config fields.

    Raises:
        KeyError, TypeError, AttributeError, IndexError, ValueError: if parts of it are missing.
    """
    state = _renamed_weights(checkpoint["model_state"])
    config = dict(checkpoint["config"])
    config["block_size"] = config.pop("max_seq_len")
    config["mlp_dim"] = state["layers.0.ffn.up_proj.weight"].shape[0]
    config["vocab_size"] = state["token_emb.weight"].shape[0]
    config["tie_head"] = torch.equal(state["head.weight"], state["token_emb.weight"])
    config.setdefault("model_type", "ngt" if "coord_emb.weight" in state else "vanilla")
    if config["model_type"] == "ngt":
        points = state["layers.0.attn.coord_proj_attn.weight"].shape[0]
        config["head_coord_dim"] = points // config["num_heads"]
        config["law"] = "published"
        if "layers.0.attn.radius_raw" not in state:
            config["use_radius_cutoff"] = False
            for layer in {name.split(".")[1] for name in state if name.startswith("layers.")}:
                state[f"layers.{layer}.attn.radius_raw"] = torch.tensor(4.0)
        if not config.get("use_radius_cutoff", True):
            config["use_soft_cutoff"] = False  # the first release ignored it without a radius
    else:
        config["pos"] = "learned"
        config["head_bias"] = "head.bias" in state
    return {
        **checkpoint,
        "model_state": state,
        "config": config,
        "format_version": FIRST_RELEASE_VERSION,
    }


def _renamed_weights(old_state):
    state = {}
    for name, tensor in old_state.items():
        # torch.compile and DistributedDataParallel put a prefix before every name
        name = name.replace("_orig_mod.", "").removeprefix("module.")
        name = name.replace(".ffn.net.0.", ".ffn.up_proj.")
        name = name.replace(".ffn.net.3.", ".ffn.down_proj.")
        name = name.replace(".attn.coord_proj_next.", ".coord_proj_next.")
        name = name.replace(".attn.radius_param", ".attn.radius_raw")
        if name.endswith(".attn.gamma"):
            name, tensor = name + "_raw", tensor.flatten()
        elif name.endswith(".attn.gravity_bias"):
            tensor = tensor.flatten()
        state[name] = tensor
    return state


def is_first_release(checkpoint):
    """Whether a checkpoint from `read_checkpoint` was written by the first release."""
    return checkpoint["format_version"] == FIRST_RELEASE_VERSION

"""Show where a checkpoint's tokens are: coordinates in 3-D, as one self-contained HTML page."""

import html
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import torch
from sklearn.decomposition import PCA

from checkpoint import load_model
from errors import UsageError, UserError, run_script, write_whole
from options import choose_device, script_parser, whole, whole_or_zero
from page import to_page
from token_files import open_token_data

EXAMPLES = """examples:
  python visualize_coords.py --checkpoint-path checkpoints/shakespeare.pt_best.pt
  python visualize_coords.py --text "To be, or not to be, that is the question" --output be.html
  python visualize_coords.py --layer 0 --num-tokens 512
"""
MIN_TOKENS = 4  # three axes need four points


def make_parser():
    parser = script_parser(__doc__, EXAMPLES)
    add = parser.add_argument
    add(
        "--checkpoint-path",
        default="checkpoints/shakespeare.pt_best.pt",
        help="an NGT checkpoint (default: %(default)s)",
    )
    add("--output", default="coords.html", help="the page to write (default: %(default)s)")
    text = parser.add_mutually_exclusive_group()
    text.add_argument(
        "--text", help="the text to show (default: the start of the validation split)"
    )
    text.add_argument("--text-file", help="a UTF-8 file with the text to show")
    add("--num-tokens", type=whole, default=256, help="at most so many (default: %(default)s)")
    add(
        "--layer",
        type=whole_or_zero,
        help="coordinates after this many blocks; 0: before the first (default: after the last)",
    )
    add("--device", default="auto", help="auto, cpu, cuda, ... (default: %(default)s)")
    return parser


def tokens_to_show(args, tokenizer, checkpoint, limit):
    """Ids of the text that the user chose, or of the validation split."""
    if args.text_file is not None:
        try:
            text = Path(args.text_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--text-file {args.text_file} cannot be read as UTF-8 text: {error}"
            ) from None
    else:
        text = args.text
    if text is not None:
        tokens = tokenizer.encode(text)
    else:
        directory = checkpoint["config"].get("token_directory")
        if directory is None or not Path(directory).is_dir():
            raise UserError(
                "the validation text of this checkpoint is not here: give --text or --text-file"
            )
        data = open_token_data(directory)
        if data.tokenizer.fingerprint != tokenizer.fingerprint:
            raise UserError(f"{directory} is of another tokenizer: give --text or --text-file")
        tokens = data.valid[:limit].tolist()
    tokens = tokens[:limit]
    if len(tokens) < MIN_TOKENS:
        raise UserError(
            f"only {len(tokens)} tokens to show: give a --text (or --num-tokens) of at least "
            f"{MIN_TOKENS}"
        )
    return tokens


@torch.no_grad()
def coordinates(model, tokens, layer):
    """`(z, mass)` of tokens as numpy arrays, (T, coord_dim) and (T,)."""
    device = next(model.parameters()).device
    _, geometry = model(torch.tensor([tokens], device=device), return_geometry=True)
    z = geometry.layers[-1 if layer is None else layer][0].float().cpu().numpy()
    if not np.isfinite(z).all():
        raise UserError("the coordinates of this checkpoint are not finite: use another")
    return z, geometry.mass[0].float().cpu().numpy()


def figure(z, mass, labels, title):
    """A 3-D scatter: one marker a token, size and colour by mass."""
    if float(np.ptp(z, axis=0).max()) < 1e-6:
        raise UserError("all tokens are at the same place: there is nothing to show")
    pca = PCA(n_components=3, random_state=0)
    xyz = pca.fit_transform(z)
    spread = mass.max() - mass.min()
    size = 6 + 12 * (mass - mass.min()) / (spread if spread > 0 else 1)
    axes = [
        f"component {n + 1} ({100 * ratio:.1f} % of variance)"
        for n, ratio in enumerate(pca.explained_variance_ratio_)
    ]
    marker = {
        "size": size,
        "color": mass,
        "colorscale": "Cividis",
        "colorbar": {"title": {"text": "mass"}},
        "opacity": 0.85,
    }
    scatter = go.Scatter3d(
        x=xyz[:, 0],
        y=xyz[:, 1],
        z=xyz[:, 2],
        mode="markers",
        marker=marker,
        # Plotly reads a little HTML in hover texts: a token must stay text
        customdata=[
            [html.escape(label), position, f"{m:.4f}"]
            for position, (label, m) in enumerate(zip(labels, mass, strict=True))
        ],
        hovertemplate=(
            "token <b>%{customdata[0]}</b><br>position %{customdata[1]}"
            "<br>mass %{customdata[2]}<extra></extra>"
        ),
    )
    page = go.Figure(scatter)
    page.update_layout(
        title={"text": html.escape(title)},
        scene={
            **{f"{axis}axis": {"title": {"text": n}} for axis, n in zip("xyz", axes, strict=True)},
            "camera": {"eye": {"x": 1.6, "y": 1.6, "z": 1.0}},
        },
        margin={"l": 0, "r": 0, "b": 0, "t": 60},
    )
    return page


def main(argv=None):
    """Write the page; returns the exit code."""
    args = make_parser().parse_args(argv)
    model, tokenizer, checkpoint = load_model(args.checkpoint_path, choose_device(args.device))
    if checkpoint["config"]["model_type"] != "ngt":
        raise UsageError(
            f"--checkpoint-path {args.checkpoint_path} is a vanilla transformer, which has no "
            "coordinates: name an NGT checkpoint"
        )
    num_layers = model.config.num_layers
    if args.layer is not None and args.layer > num_layers:
        raise UsageError(f"--layer {args.layer}: this checkpoint has {num_layers} blocks")
    limit = min(args.num_tokens, model.max_context or args.num_tokens)
    tokens = tokens_to_show(args, tokenizer, checkpoint, limit)
    z, mass = coordinates(model, tokens, args.layer)
    after = num_layers if args.layer is None else args.layer
    title = f"Where {len(tokens)} tokens are after {after} of {num_layers} blocks"
    page = figure(z, mass, [tokenizer.label(token) for token in tokens], title)
    write_whole(Path(args.output), to_page(page, title).encode())
    print(f"wrote {args.output}: {len(tokens)} tokens, open it in a browser")
    return 0


if __name__ == "__main__":
    run_script(main)

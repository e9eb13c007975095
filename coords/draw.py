"""Draws the map that the flags of visualize_coords.py ask for."""

import logging
from pathlib import Path

from coords.data import align, measure, project
from coords.heads import fades, field_by_distance, heads_table, pull_by_distance
from coords.page import Run, map_page, run_data
from coords.vocabulary import frequencies, training_text_or_none, vocabulary
from engine.checkpoint import load_model
from system.errors import UsageError, UserError, warn
from system.files import write_whole
from text.labels import labels_in_text, unknown_characters
from text.stream import read_text, typed_text
from text.token_files import data_of_checkpoint
from text.tokenizer import TextStream


def draw_map(args, device):
    """Write the page and the stills.

    Raises:
        UserError: if a file cannot be used, or a flag does not fit the checkpoint.
    """
    paths = {"--checkpoint-path": args.checkpoint_path}
    if args.compare is not None:
        paths["--compare"] = args.compare
    loaded = {flag: load_model(path, device) for flag, path in paths.items()}
    for path, (model, *_) in zip(paths.values(), loaded.values(), strict=True):
        if args.png is not None and not hasattr(model, "mass"):
            raise UsageError(
                f"--png: {path} is a vanilla transformer, which has no coordinates: drop --png"
            )
    deepest = max(model.config.num_layers for model, *_ in loaded.values())
    if args.layer is not None and args.layer > deepest:
        raise UsageError(f"--layer {args.layer}: this checkpoint has {deepest} layers")
    runs = read_runs(args, paths, loaded)
    write_files(args, runs)


def tokens_to_show(args, tokenizer, checkpoint):
    """`(ids, a description of the text)`: of the text that the user gave, or of a split.

    Raises:
        UserError: if the text cannot be read or --offset is beyond its end.
    """
    stop = args.offset + args.num_tokens
    if args.text_file is not None:
        text = read_text(args.text_file, "--text-file")
        every, source = encode(tokenizer, text), Path(args.text_file).name
    elif args.text is not None:
        every, source = encode(tokenizer, typed_text(args.text)), "the text given"
    else:
        data = data_of_checkpoint(checkpoint, tokenizer, "give --text or --text-file")
        split = args.split or "valid"
        every, source = data.splits[split], f"the {split} split"
    if args.offset and args.offset >= len(every):
        raise UsageError(f"--offset {args.offset}: {source} has {len(every):,} tokens")
    tokens = [int(token) for token in every[args.offset : stop]]
    if args.offset:
        source += f", from token {args.offset:,}"
    return tokens, source


def encode(tokenizer, text, who="this model"):
    """The ids of a text, with a warning if the vocabulary lacks some of its characters."""
    if unknown := unknown_characters(tokenizer, text):
        warn(unknown.replace("this model", str(who)))
    return tokenizer.encode(text)


def read_run(loaded, path, tokens, source, method="pca", live=False):
    """The `Run` of a loaded checkpoint on these tokens.

    Args:
        live: answer within a second: count the tokens of this text only, and switch heads off
            only if it is short.
    """
    model, tokenizer, checkpoint = loaded
    if model.max_context is not None and len(tokens) > model.max_context:
        warn(f"{path} reads at most {model.max_context} tokens: the others are left out")
        tokens = tokens[: model.max_context]
    if not tokens:
        raise UserError("no tokens to show: give a --text of at least one")
    measured = measure(model, tokens, live)
    has_gravity = measured.kind != "vanilla"
    points, axes = project(measured.z, method) if has_gravity else (None, None)
    labels, texts = labels_in_text(tokenizer, tokens)
    data = None if live else training_text_or_none(checkpoint, tokenizer)
    counts, counted = frequencies(data, tokens, model.config.vocab_size)
    return Run(
        name=Path(path).name,
        step=checkpoint.get("iter", 0),
        law=model.config.law if has_gravity else "dot product",
        source=source,
        labels=labels,
        texts=texts,
        starts=character_starts(tokenizer, tokens),
        names=names(tokenizer, measured),
        measured=measured,
        points=points,
        axes=axes,
        counts=[int(counts[token]) for token in tokens],
        counted=counted,
        is_corpus=data is not None,
        heads=heads_table(model, measured),
        field=field_by_distance(model, len(tokens)),
        pull=pull_by_distance(measured.profile, fades(model)),
        vocabulary=vocabulary(model, tokenizer, counts) if has_gravity else None,
    )


def names(tokenizer, measured):
    """The labels of all tokens that predictions name, by id."""
    found = {int(token) for token in measured.lens.ids.flat}
    if measured.off is not None:
        found.update(int(token) for token in measured.off.ids.flat)
    return {token: tokenizer.label(token) for token in found}


def character_starts(tokenizer, tokens):
    """The character of the text at which each token begins."""
    stream, starts, length = TextStream(tokenizer), [], 0
    for token in tokens:
        starts.append(length)
        length += len(stream.push(token))
    return starts


def read_runs(args, paths, loaded):
    """A `Run` per checkpoint, all on the same text. `paths` and `loaded` are dicts by flag."""
    _, tokenizer, checkpoint = loaded["--checkpoint-path"]
    tokens, source = tokens_to_show(args, tokenizer, checkpoint)
    runs = []
    for flag, path in paths.items():
        own = loaded[flag][1]
        is_same = own.fingerprint == tokenizer.fingerprint
        ids = tokens if is_same else encode(own, tokenizer.decode(tokens), path)
        runs.append(read_run(loaded[flag], path, ids, source, args.method))
    first, second = runs[0], runs[-1]  # with one run both are the same, and nothing is mirrored
    if first.measured.tokens == second.measured.tokens and None not in (first.axes, second.axes):
        second.points = align(second.points, first.points)
    return runs


def write_files(args, runs):
    """Write the page and the stills that the flags ask for."""
    title = " and ".join(run.name for run in runs)
    page = map_page([run_data(run) for run in runs], f"{title}: what pulls each token", args.layer)
    write_whole(Path(args.output), page)
    size = Path(args.output).stat().st_size / 1e6
    tokens = len(runs[0].labels)
    plural = "" if tokens == 1 else "s"
    written = [f"wrote {args.output}: {tokens} token{plural}, {size:.1f} MB, open it in a browser"]
    if args.png is not None or args.heads_png is not None:
        # matplotlib reports on its own folders there
        logging.getLogger("matplotlib").setLevel(logging.ERROR)
        from coords.still import heads_still, still  # takes a second to import
    if args.png is not None:
        layer = args.layer
        if layer is None:
            layer = max(run.measured.attention.q.shape[0] for run in runs)
        write_whole(Path(args.png), still(runs, layer))
        written.append(f"wrote {args.png}: layer {layer}")
    if args.heads_png is not None:
        write_whole(Path(args.heads_png), heads_still(runs))
        written.append(f"wrote {args.heads_png}: the field of each head")
    print("\n".join(written))  # after all is written: the output may fail

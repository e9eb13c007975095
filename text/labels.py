"""The tokens of a text as people read them, and what a vocabulary lacks."""

from text.tokenizer import LONGEST_LABEL, CharTokenizer, marked


def unknown_characters(tokenizer, text):
    """A sentence about the characters of a text that a vocabulary lacks; "" if it has them all."""
    count = tokenizer.num_unknown(text) if isinstance(tokenizer, CharTokenizer) else 0
    are = "character is" if count == 1 else "characters are"
    return f"{count:,} {are} new to this model's vocabulary" if count else ""


def labels_in_text(tokenizer, tokens):
    """Labels of ids in their places in a text, where a character may be spread over several tokens.

    Bytes that make no character are in hex.

    Returns:
        `(labels, texts)`, two lists of str. In `labels` a part of a character is named by the
        whole, as in `옛(2/3)`; in `texts` each character stands once, in the token that begins it,
        so that a token which only continues one has "".
    """
    labels = [tokenizer.label(token) for token in tokens]
    texts = list(labels)
    if isinstance(tokenizer, CharTokenizer):  # each token is a whole character
        return labels, texts
    data = [tokenizer.bytes_of(token) for token in tokens]
    token_of_byte = [n for n, its_bytes in enumerate(data) for _ in its_bytes]
    parts, begun, spread, place = [[] for _ in data], [[] for _ in data], set(), 0
    for character in b"".join(data).decode("utf-8", errors="surrogateescape"):
        size = len(character.encode("utf-8", errors="surrogateescape"))
        holders = list(dict.fromkeys(token_of_byte[place : place + size]))
        place += size
        is_broken = "\udc80" <= character <= "\udcff"
        shown = f"\\x{ord(character) - 0xDC00:02x}" if is_broken else marked(character)
        begun[holders[0]].append(shown)
        for n, holder in enumerate(holders, 1):
            parts[holder].append(shown if len(holders) == 1 else f"{shown}({n}/{len(holders)})")
        if len(holders) > 1:
            spread.update(holders)
    for n in spread:
        labels[n] = "".join(parts[n])[:LONGEST_LABEL]
        texts[n] = "".join(begun[n])[:LONGEST_LABEL]
    return labels, texts

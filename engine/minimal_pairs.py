"""Minimal pairs: does a model find the grammatical one of two sentences that differ in one word?

As in BLiMP (Warstadt et al. 2020, https://arxiv.org/abs/1912.00582) the model sees no question: the
sentence with the higher probability is its answer. The sentences are our own, made by the grammar
below, so that nothing is downloaded. A model that knows nothing gets half of them right.
"""

from itertools import product

import numpy as np

from engine.losses import start_of_text

PEOPLE = (("man", "men"), ("woman", "women"), ("child", "children"), ("friend", "friends"))
THINGS = (("book", "books"), ("house", "houses"), ("letter", "letters"), ("tree", "trees"))
VERBS = (("walks", "walk"), ("sleeps", "sleep"), ("is", "are"), ("has", "have"))
NUMBERS = (0, 1)  # singular, plural


def _agreement():
    for noun, verb, n in product(PEOPLE, VERBS, NUMBERS):
        yield (f"The {noun[n]} {verb[form]} here." for form in (n, 1 - n))


def _agreement_across():
    for noun, thing, verb, n in product(PEOPLE, THINGS, VERBS[2:], NUMBERS):
        between = thing[1 - n]
        yield (f"The {noun[n]} with the {between} {verb[form]} here." for form in (n, 1 - n))


def _determiners():
    for verb, thing, n in product(("saw", "had"), THINGS, NUMBERS):
        for pair in (("this", "these"), ("that", "those")):
            yield (f"He {verb} {pair[form]} {thing[n]}." for form in (n, 1 - n))


def _reflexives():
    own = {"The man": "himself", "The woman": "herself", "The men": "themselves"}
    for who, verb, other in product(own, ("saw", "loved", "killed", "praised"), own.values()):
        if other != own[who]:
            yield (f"{who} {verb} {word}." for word in (own[who], other))


def _pronouns():
    for verb, name in product(("saw", "loved", "heard", "told"), ("king", "mother")):
        yield (f"The {name} {verb} {word}." for word in ("him", "he"))
        for good, bad in (("He", "Him"), ("They", "Them"), ("She", "Her")):
            yield (f"{word} {verb} the {name}." for word in (good, bad))


def _verb_forms():
    forms = (("will", "see", "sees"), ("can", "go", "goes"), ("did not", "know", "knew"))
    forms += (("has", "seen", "saw"), ("had", "gone", "went"), ("to", "speak", "spoke"))
    for who, (before, good, bad) in product(("He", "She", "The king", "My friend"), forms):
        wants = " wants" if before == "to" else ""
        yield (f"{who}{wants} {before} {word} it." for word in (good, bad))


def _word_order():
    for verb, adjective, thing in product(("saw", "had"), ("old", "good", "little"), THINGS):
        yield (
            f"She {verb} {words} {thing[0]}." for words in (f"the {adjective}", f"{adjective} the")
        )


PHENOMENA = {
    "subject and verb agree": _agreement,
    "the same, with a noun between": _agreement_across,
    "determiner and noun agree": _determiners,
    "reflexive pronouns": _reflexives,
    "cases of pronouns": _pronouns,
    "forms of verbs": _verb_forms,
    "order of words": _word_order,
}


def pairs():
    """Lists of `(grammatical, not grammatical)` sentences, by phenomenon."""
    return {name: [tuple(pair) for pair in make()] for name, make in PHENOMENA.items()}


def minimal_pairs(losses, tokenizer):
    """How often the grammatical sentence has the higher probability.

    Args:
        losses: the `Losses` of the model.

    Returns:
        A list of dicts per phenomenon, and a last one for all: `phenomenon`, `pairs`, `accuracy`
        and its standard `error`.
    """
    start = [start_of_text(tokenizer)]
    found, every = [], []
    for name, sentences in pairs().items():
        nats = _losses(losses, [start + tokenizer.encode(s) for pair in sentences for s in pair])
        is_right = nats[::2] < nats[1::2]
        every.append(is_right)
        found.append({"phenomenon": name, **_accuracy(is_right)})
    return [*found, {"phenomenon": "all", **_accuracy(np.concatenate(every))}]


def _accuracy(is_right):
    share, count = float(is_right.mean()), len(is_right)
    error = (share * (1 - share) / count) ** 0.5
    return {"pairs": count, "accuracy": share, "error": error}


def _losses(losses, sequences):
    """The sum of losses of each sequence, (N,): those of one length are read together."""
    lengths = np.array([len(sequence) for sequence in sequences])
    found = np.zeros(len(sequences))
    for length in np.unique(lengths):
        (chosen,) = (lengths == length).nonzero()
        rows = np.array([sequences[n] for n in chosen])
        found[chosen] = losses.of_all(rows, length - 1, "minimal pairs").sum(1)
    return found

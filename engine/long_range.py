"""Measures whether a model uses what is far behind it.

Three questions: a pass key, a phone book, and a string that is repeated. In each trial an answer
was given somewhere in the text, and the text ends where the answer comes again. The same text with
something else in that place is the reference:

    gain = loss of the answer without it in the text - loss of the answer with it

in nats per token. A gain of 0 means that what was given had no effect on the answer: all else is
the same in both texts. The trials are the same for all models with the same tokenizer and text.
"""

from typing import NamedTuple

import numpy as np

from system.errors import warn

DISTANCES = (64, 128, 256, 512, 1024, 2048, 4096)
STRING = 20  # tokens of a string that is repeated
LEAD = 32  # tokens of real text before what is given, at least
BOOKS = (2, 4, 8, 16, 32, 64)  # names in a phone book
FACT, QUESTION = "\nThe pass key is {}. Remember it.\n", "\nThe pass key is "
NAMES = """
    Adam Alice Andrew Anna Arthur Barbara Ben Betty Brian Carl Carol Charles Clara Daniel David
    Donna Dorothy Edward Elizabeth Ellen Emily Emma Eric Eva Frank Fred George Grace Hannah Harry
    Helen Henry Hugh Jack James Jane Joan John Joseph Julia Karen Kate Laura Lewis Linda Louis Lucy
    Margaret Maria Mark Martha Martin Mary Nancy Oliver Paul Peter Ralph Robert Rose Ruth Samuel
    Sarah Thomas
"""


class Trial(NamedTuple):
    """One answer and where it was given; all but `end` are lists of ids.

    The text is real text up to `end` in the corpus, with `given` put into it some distance before,
    and ends with `question` and `answer`. The reference has `other` in place of `given`.
    """

    end: int
    given: list
    other: list
    question: list
    answer: list

    def text(self, tokens, given, between, length):
        """The whole text, (length,): `between` tokens lie between `given` and the question."""
        asked = self.question + self.answer
        middle = self.end - between
        start = middle - (length - len(given) - between - len(asked))
        return np.concatenate(
            [tokens[start:middle], given, tokens[middle : self.end], asked]
        ).astype(np.int64)


def long_range(losses, tokens, tokenizer, count, block_size):
    """Ask all three questions.

    Args:
        losses: a `Losses` of the model.
        tokens: of a text that the model was not trained on, (N,). Distances that need more than a
            quarter of it are left out, with a warning.
        count: number of trials behind each number.
        block_size: of the model; no text is shorter.

    Returns:
        `{"trials": count, "passkey": rows, "phone_book": rows, "repeats": rows}`. Each row is a
        dict with `context`, the length of the text in tokens; `loss`, `reference`, their difference
        `gain`, and `error`, its standard error (None for a single trial); `exact`, the share of
        trials whose whole answer greedy decoding finds. All but `context` are None if the text is
        longer than the positions that the model has learned. A vocabulary that cannot spell the
        names and digits leaves the first two empty, with a warning.
    """
    ask = _Questions(losses, tokens, count, block_size)
    # a tokenizer may make every letter small
    spelled = FACT.format("0123456789") + NAMES
    can_spell = tokenizer.decode(tokenizer.encode(spelled)).lower() == spelled.lower()
    if not can_spell:
        warn("the vocabulary lacks digits or letters: the pass key and the phone book are left out")
    return {
        "trials": count,
        "passkey": ask.passkey(tokenizer) if can_spell else [],
        "phone_book": ask.phone_book(tokenizer) if can_spell else [],
        "repeats": ask.repeats(),
    }


class _Questions:
    def __init__(self, losses, tokens, count, block_size):
        self.losses, self.tokens = losses, tokens
        self.count, self.block_size = count, block_size

    def passkey(self, tokenizer):
        """Five digits named in one sentence, asked for after so many tokens of real text.

        Mohtashami & Jaggi 2023 (arXiv:2305.16300), whose figure `exact` is: the share of trials in
        which the greedy answer is all five digits. Guessing finds one in 100,000. The gain also
        shows a memory that is too weak for that. The reference names five other digits, so that
        expecting digits at all gains nothing.
        """
        generator = np.random.default_rng(0)
        trials = [passkey_trial(self.tokens, tokenizer, generator) for _ in range(self.count)]
        return self._by_distance(trials, DISTANCES, 0, "pass key")

    def phone_book(self, tokenizer):
        """Lines `Name: number`, and one of the names asked for right after the last line.

        Jelassi et al. 2024 (arXiv:2402.01032). In the reference that name has another number.
        A model that repeats any number of the book has an `exact` of 1 / names, and some gain.
        """
        rows = []
        for names in BOOKS:
            generator = np.random.default_rng(0)
            trials = [
                phone_book_trial(self.tokens, tokenizer, generator, names)
                for _ in range(self.count)
            ]
            row = self._row(trials, 0, f"phone book of {names}")
            rows += [{"names": names} | row] if row else []
        return rows

    def repeats(self):
        """A string of real text that comes again so many tokens after its first start.

        The reference is the same text without its first occurrence. The first token is not counted,
        because nothing before it tells that the string begins. `share` is the gain as a share of
        that at the shortest distance; None if that one is within two standard errors of 0.
        """
        generator = np.random.default_rng(0)
        trials = [repeat_trial(self.tokens, generator) for _ in range(self.count)]
        rows = self._by_distance(trials, (STRING, *DISTANCES), STRING, "string")
        for row in rows:
            first = rows[0]
            is_known = row["gain"] is not None and first["gain"] > 2 * (first["error"] or 0)
            row["share"] = row["gain"] / first["gain"] if is_known else None
        return rows

    def _by_distance(self, trials, distances, length, title):
        """A row for each distance; `length` tokens of it are what is given."""
        rows = []
        for distance in distances:
            row = self._row(trials, distance - length, f"{title} after {distance}")
            rows += [{"distance": distance} | row] if row else []
        return rows

    def _row(self, trials, between, title):
        """The numbers of one group of trials, a dict; None if the corpus is too short for it."""
        parts = [max(len(t.given), len(t.other)) + len(t.question) + len(t.answer) for t in trials]
        # a model that learned windows is not judged on shorter ones; and the last token is no input
        length = max(self.block_size + 1, LEAD + between + max(parts))
        if length > len(self.tokens) // 4:
            warn(f"the validation text is too short: {title} is left out")
            return None
        row = {"context": length - 1}
        if self.losses.limit is not None and row["context"] > self.losses.limit:
            return row | dict.fromkeys(("loss", "reference", "gain", "error", "exact"))
        loss, exact = self._answers(trials, [t.given for t in trials], between, length, title)
        reference, _ = self._answers(trials, [t.other for t in trials], between, length, title)
        gains = reference - loss
        error = float(gains.std(ddof=1) / len(gains) ** 0.5) if len(gains) > 1 else None
        return row | {
            "loss": float(loss.mean()),
            "reference": float(reference.mean()),
            "gain": float(gains.mean()),
            "error": error,
            "exact": float(exact.mean()),
        }

    def _answers(self, trials, given, between, length, title):
        """The answer's loss per token, and whether greedy decoding finds all of it, by trial."""
        texts = [
            t.text(self.tokens, g, between, length) for t, g in zip(trials, given, strict=True)
        ]
        sizes = np.array([len(t.answer) for t in trials])
        count = sizes.max()
        found, is_right = self.losses.graded_all(np.stack(texts), count, title)
        counted = np.arange(count) >= count - sizes[:, None]  # digits may be one token, or five
        return (found * counted).sum(1) / sizes, (is_right | ~counted).all(1)


def passkey_trial(tokens, tokenizer, generator):
    """A `Trial` of the pass key; the other digits differ from the digits in every place."""
    digits, others = _two_numbers(generator)
    return Trial(
        _end(tokens, generator),
        tokenizer.encode(FACT.format(digits)),
        tokenizer.encode(FACT.format(others)),
        *_question_and_answer(tokenizer, QUESTION, digits),
    )


def phone_book_trial(tokens, tokenizer, generator, names):
    """A `Trial` with a book of so many names, any of which is asked for."""
    digits, others = _two_numbers(generator)
    chosen = generator.permutation(NAMES.split())[:names]
    numbers = [_two_numbers(generator)[0] for _ in chosen]
    asked = generator.integers(names)

    def book(number):
        listed = [*numbers[:asked], number, *numbers[asked + 1 :]]
        lines = (f"{name}: {of_name}\n" for name, of_name in zip(chosen, listed, strict=True))
        return tokenizer.encode("\n" + "".join(lines))

    return Trial(
        _end(tokens, generator),
        book(digits),
        book(others),
        *_question_and_answer(tokenizer, f"{chosen[asked]}: ", digits),
    )


def repeat_trial(tokens, generator):
    """A `Trial` with a string from the first half of the text."""
    start = generator.integers(max(1, len(tokens) // 2 - STRING))
    string = tokens[start : start + STRING].tolist()
    return Trial(_end(tokens, generator), string, [], string[:1], string[1:])


def _end(tokens, generator):
    # windows of up to a quarter of the text then lie in its second half, apart from all strings
    return len(tokens) - int(generator.integers(max(1, len(tokens) // 4)))


def _two_numbers(generator):
    digits = generator.integers(10, size=5)
    others = (digits + generator.integers(1, 10, size=5)) % 10
    return "".join(map(str, digits)), "".join(map(str, others))


def _question_and_answer(tokenizer, question, answer):
    """The ids of both, as they are in one text: the first digit may share a token with a space."""
    both = tokenizer.encode(question + answer)
    alone = tokenizer.encode(question)
    differing = (n for n, (one, other) in enumerate(zip(both, alone, strict=False)) if one != other)
    size = next(differing, len(alone))
    return both[:size], both[size:]

"""The live page `/look`: the page of coords/ for a sentence of the reader's own, and what if.

A question is checked as it comes, then answered on the model's thread. No answer changes the model
or the conversation.
"""

import re

import torch

from engine.generation import TokenStream
from engine.interventions import logits_after
from system.errors import UserError
from talk.conversation import DRAWING, NO_TEXT_YET
from talk.requests import Refused, checked_text
from talk.suggestions import suggestions
from text.labels import unknown_characters
from text.stream import typed_text

MOST_TOKENS = 512  # of a text that is shown
MOST_CHANGES = 8
SHOWN_TOKENS = 10  # the likeliest, before or after the changes
ADDED_TOKENS = 24  # to a branch
LARGEST_FACTOR = 100  # of a mass
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # not in a text that may be sent again
FIELDS = {
    "mass": {"token", "factor"},
    "move": {"token", "toward", "share"},
    "cut": {"layer", "head", "token", "source"},
    "off": {"layer", "head"},
}


class Look:
    """What the live page shows of a conversation's model.

    Attributes:
        suggestions: a few texts to begin with.
        actions: by the path of a request, the function that checks its JSON object and returns the
            question for the model, a function that returns the answer's plain types. Both may raise
            `Refused` or `UserError`.

    Args:
        conversation: a `Conversation` that keeps tokens.
        checkpoint, path: of its model.
        page: what makes the page, `coords.live`, handed in because talk stands beside coords.
    """

    def __init__(self, conversation, checkpoint, path, page):
        self.conversation = conversation
        self.model, self.tokenizer = conversation.stream.model, conversation.tokenizer
        self.checkpoint, self.path, self.page = checkpoint, path, page
        self.most_tokens = min(MOST_TOKENS, self.model.max_context or MOST_TOKENS)
        self.suggestions = suggestions(checkpoint, self.tokenizer)
        self.actions = {
            "/look": self.text,
            "/look/what-if": self.what_if,
            "/look/branch": self.branch,
        }

    def files(self):
        """The page and its files, by path, as `requests.read_files` gives them."""
        return self.page.live_files(self.path, self.suggestions)

    def text(self, request):
        """A question: a run of the text, or of the conversation if `conversation` is true."""
        if request.get("conversation") is True:
            tokens = [token.id for token in self.conversation.kept()]
            if not tokens:
                raise Refused(409, NO_TEXT_YET)
            return lambda: self._run(tokens, "the conversation")
        text = typed_text(checked_text(request.get("text")))

        def question():
            unknown = unknown_characters(self.tokenizer, text)
            return self._run(self.tokenizer.encode(text), "your text", unknown)

        return question

    def what_if(self, request):
        """A question: what would come after token `at`, without and with the `changes`."""
        tokens = self._tokens(request)
        at = _whole(request, "at", 0, len(tokens) - 1)
        changes = request.get("changes")
        if type(changes) is not list or not 1 <= len(changes) <= MOST_CHANGES:
            raise Refused(400, f"changes must be a list of 1 to {MOST_CHANGES}")
        for change in changes:
            self._check_change(change, len(tokens))
        return lambda: self._compare(tokens, changes, at)

    def branch(self, request):
        """A question: a run of the text up to token `at`, then token `id`, then what follows.

        What follows is drawn with the chat's settings, but always from the same random numbers.
        """
        tokens = self._tokens(request)
        at = _whole(request, "at", 0, len(tokens) - 1)
        token = _whole(request, "id", 0, self.model.config.vocab_size - 1)
        begun = [*tokens[: at + 1], token]

        def question():
            settings = {name: self.conversation.settings.get(name) for name in DRAWING}
            settings |= {"max_new_tokens": ADDED_TOKENS}
            with self.conversation.unrecorded():
                stream = TokenStream(self.model)
                stream.feed(begun)
                generator = torch.Generator().manual_seed(0)
                added = list(stream.generate(**settings, generator=generator))
            answer = self._run(begun + added, "your text")
            chosen = len(answer["runs"][0]["tokens"]) - len(added) - 1
            return answer | {"token": chosen}

        return question

    def _run(self, tokens, source, note=""):
        """The answer for a list of tokens: their run, their text, and a note for the reader."""
        count, most = len(tokens), self.most_tokens
        if not tokens:
            raise UserError(f"this model has no token for it: {NO_TEXT_YET}")
        if count > most:
            tokens = tokens[-most:]
            cut = f"the last {most:,} of {count:,} tokens are shown"
            cut += ": this model reads no more" if most < MOST_TOKENS else ""
            note = f"{note}; {cut}" if note else cut
        loaded = self.model, self.tokenizer, self.checkpoint
        run = self.page.live_run(loaded, self.path, tokens, source)
        return {
            "layer": None,
            "text": CONTROL.sub("\ufffd", self.tokenizer.decode(tokens)),
            "note": note,
            "runs": [run],
        }

    def _compare(self, tokens, changes, at):
        """The answer of `what_if`: rows [label, chance before, chance after] of the likeliest
        tokens, and the losses of the token that really follows; None at the end of the text."""
        logits = [logits_after(self.model, tokens, some)[at] for some in ([], changes)]
        chances = torch.log_softmax(torch.stack(logits).double().cpu(), -1)  # (2, vocab_size)
        if not chances.exp().isfinite().all():
            raise UserError("the model's logits are not finite: its weights are damaged")
        likeliest = chances.amax(0).topk(min(SHOWN_TOKENS, chances.shape[1])).indices
        rows = [
            [self.conversation.label(token), *chances[:, token].exp().tolist()]
            for token in likeliest.tolist()
        ]
        is_last = at == len(tokens) - 1
        loss = None if is_last else (-chances[:, tokens[at + 1]]).tolist()
        return {"rows": rows, "loss": loss}

    def _tokens(self, request):
        """The checked list `tokens` of a request."""
        tokens, size = request.get("tokens"), self.model.config.vocab_size
        if type(tokens) is not list or not 1 <= len(tokens) <= self.most_tokens:
            raise Refused(400, f"tokens must be a list of 1 to {self.most_tokens}")
        if not all(type(token) is int and 0 <= token < size for token in tokens):
            raise Refused(400, f"tokens must be whole numbers from 0 to {size - 1}")
        return tokens

    def _check_change(self, change, count):
        """Raise `Refused` unless this is a change that this model and a text of so many tokens
        can have."""
        config = self.model.config
        kind = change.get("kind") if isinstance(change, dict) else None
        if not isinstance(kind, str) or kind not in FIELDS:
            raise Refused(400, f"a change is an object whose kind is one of {', '.join(FIELDS)}")
        if change.keys() != FIELDS[kind] | {"kind"}:
            fields = " and ".join(sorted(FIELDS[kind]))
            raise Refused(400, f"a change of the kind {kind} has {fields}, and nothing else")
        if kind in ("mass", "move") and not hasattr(config, "law"):
            raise Refused(400, "a vanilla transformer has no masses and no places: cut or off")
        if "layer" in change:
            _whole(change, "layer", 1, config.num_layers)
        if "head" in change and not (kind == "cut" and change["head"] is None):
            _whole(change, "head", 0, config.num_heads - 1)
        if "token" in change:
            _whole(change, "token", 0, count - 1)
        if kind == "mass":
            _number(change, "factor", 0, LARGEST_FACTOR)
        elif kind == "move":
            _whole(change, "toward", 0, count - 1)
            _number(change, "share", 0, 1)
        elif kind == "cut":  # nothing later pulls a token
            _whole(change, "source", 0, change["token"])


def _whole(given, name, low, high):
    """The whole number of this name in a dict; `Refused` if it is none of this range."""
    value = given.get(name)
    if type(value) is not int or not low <= value <= high:
        raise Refused(400, f"{name} must be a whole number from {low} to {high}")
    return value


def _number(given, name, low, high):
    """Raise `Refused` unless the number of this name in a dict is in this range."""
    value = given[name]
    if type(value) not in (int, float) or not low <= value <= high:
        raise Refused(400, f"{name} must be a number from {low} to {high}")

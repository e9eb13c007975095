"""Sampling, and the stream of tokens through the cache."""

import pytest
import torch

from engine.generation import TokenStream, sample
from engine.pulls import newest_pulls
from small_models import ALL, BLOCK, NEWTON, ids, lively

PROBABILITIES = torch.tensor([0.1, 0.4, 0.02, 0.3, 0.05, 0.13])
LOGITS = PROBABILITIES.log() + 2.5


def draws(logits, number=1500, **settings):
    """How often each token is drawn."""
    generator = torch.Generator().manual_seed(1)
    found = [sample(logits, generator=generator, **settings) for _ in range(number)]
    return torch.bincount(torch.tensor(found), minlength=len(logits)) / number


def test_temperature():
    """0 is argmax; others give softmax(logits / temperature)."""
    assert sample(LOGITS, temperature=0) == 1
    assert sample(LOGITS, temperature=0, top_k=3, top_p=0.1) == 1
    for temperature in (1.0, 0.5, 2.0):
        expected = PROBABILITIES ** (1 / temperature)
        expected = expected / expected.sum()
        found = draws(LOGITS, temperature=temperature)
        assert (found - expected).abs().max() < 0.05


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-42])
def test_tiny_temperatures_are_greedy(temperature):
    """Any temperature close to 0 draws the likeliest token."""
    assert sample(LOGITS * 20, temperature=temperature) == 1


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 1}, {1}),
        ({"top_k": 3}, {1, 3, 5}),
        ({"top_k": 6}, {0, 1, 2, 3, 4, 5}),
        ({"top_k": 100}, {0, 1, 2, 3, 4, 5}),
        ({"top_p": 1e-6}, {1}),
        ({"top_p": 0.39}, {1}),
        ({"top_p": 0.41}, {1, 3}),
        ({"top_p": 0.69}, {1, 3}),
        ({"top_p": 0.84}, {0, 1, 3, 5}),
        ({"top_p": 0.95}, {0, 1, 3, 4, 5}),
        ({"top_p": 1.0}, {0, 1, 2, 3, 4, 5}),
        ({"top_k": 3, "top_p": 0.5}, {1, 3}),
        # after top_k the three left have 0.482, 0.361, 0.157 of the probability
        ({"top_k": 3, "top_p": 0.45}, {1}),
        ({"top_k": 3, "top_p": 0.9}, {1, 3, 5}),
        # a temperature of 1/2 squares: 0.560, 0.315, 0.059, 0.035, 0.009, 0.001
        ({"temperature": 0.5, "top_p": 0.5}, {1}),
        ({"temperature": 0.5, "top_p": 0.87}, {1, 3}),
        ({"temperature": 0.5, "top_p": 0.93}, {1, 3, 5}),
        # shares of the likeliest: 0.25, 1, 0.05, 0.75, 0.125, 0.325, and their squares
        ({"min_p": 0.0}, {0, 1, 2, 3, 4, 5}),
        ({"min_p": 0.24}, {0, 1, 3, 5}),
        ({"min_p": 0.26}, {1, 3, 5}),
        ({"min_p": 1.0}, {1}),
        ({"min_p": 0.26, "temperature": 0.5}, {1, 3}),
        ({"min_p": 0.1, "top_k": 3}, {1, 3, 5}),
        ({"min_p": 0.5, "top_p": 0.95}, {1, 3}),
    ],
    ids=str,
)
def test_what_is_drawn_from(settings, kept):
    """top_k, top_p and min_p keep the sets computed by hand, with unchanged proportions."""
    found = draws(LOGITS, **settings)
    assert set(found.nonzero().flatten().tolist()) == kept
    expected = torch.zeros(6)
    for token in kept:
        expected[token] = PROBABILITIES[token] ** (1 / settings.get("temperature", 1))
    assert (found - expected / expected.sum()).abs().max() < 0.05


@torch.no_grad()
def test_repetition_penalty():
    """The likeliest token of full passes, after each logit of a token so far became smaller.

    Also of tokens that no head reaches any more, and after a return to an earlier state.
    """
    model = lively("newton soft")
    stream, tokens = TokenStream(model), [1, 2, 3]
    stream.feed(tokens)
    start = stream.copy_of_state()
    for _ in range(40):
        logits = model(torch.tensor([tokens]))[0, -1].tolist()
        for token in set(tokens):
            x = logits[token]
            logits[token] = x / 1.7 if x > 0 else x * 1.7
        tokens.append(max(range(len(logits)), key=logits.__getitem__))
    for _ in range(2):
        found = stream.generate(40, temperature=0, repetition_penalty=1.7)
        assert list(found) == tokens[3:] and len(stream.context) < len(tokens)
        stream.return_to(start)
    plain = list(stream.generate(40, temperature=0))
    assert plain != tokens[3:]
    for penalty, seen in ((1e-45, {1, 2, 3}), (1e38, {*range(4, 29), 0})):
        stream.return_to(start)
        assert next(stream.generate(1, repetition_penalty=penalty, temperature=0)) in seen


def test_the_same_seed_draws_the_same():
    """The generator alone decides; another seed gives other tokens."""
    runs, model = [], lively("newton soft")
    for seed in (5, 5, 6):
        stream = TokenStream(model)
        stream.feed([1, 2, 3])
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(len(runs))  # the global generator must not matter
        runs.append(list(stream.generate(30, temperature=1.5, generator=generator)))
    assert runs[0] == runs[1] != runs[2]


@torch.no_grad()
def greedy(model, context, interruptions):
    """Greedy decoding by full passes, with an extra token fed after each generated one.

    A full context continues with its newer half.

    Returns:
        `(tokens, how often the context slid)`.
    """
    context, tokens, slides = list(context), [], 0
    for interruption in interruptions:
        tokens.append(int(model(torch.tensor([context]))[0, -1].argmax()))
        for token in (tokens[-1], interruption):
            if len(context) == model.max_context:
                context, slides = context[-(model.max_context // 2) :], slides + 1
            context.append(token)
    return tokens, slides


@pytest.mark.parametrize("name", ALL)
def test_streaming_is_greedy_decoding(name):
    """Over three block sizes the cache gives the tokens of full passes.

    Only models with a limited context slide, and they never remember more than they may.
    """
    model = lively(name)
    prompt, interruptions = ids(6)[0].tolist(), ids(3 * BLOCK // 2)[0].tolist()
    stream = TokenStream(model)
    stream.feed(prompt)
    found, lengths = [], []
    for interruption in interruptions:
        found += stream.generate(1, temperature=0)
        lengths.append(stream.cache.length)
        stream.feed([interruption])
        lengths.append(stream.cache.length)
    expected, slides = greedy(model, prompt, interruptions)
    assert found == expected
    assert len(set(found)) > 4
    assert stream.slides == slides
    if name in NEWTON:
        assert slides == 0 and lengths[-1] == 6 + 3 * BLOCK
    else:
        assert slides > 2 and max(lengths) == BLOCK


def test_generate_goes_on_from_its_own_tokens():
    """The tokens of one call are fed back: the logits equal those of a full pass."""
    model = lively("newton soft")
    stream = TokenStream(model)
    stream.feed([3, 1, 4])
    generator = torch.Generator().manual_seed(0)
    tokens = list(stream.generate(40, temperature=1.5, generator=generator))
    assert len(tokens) == 40 and stream.cache.length == 43
    with torch.no_grad():
        expected = model(torch.tensor([[3, 1, 4, *tokens]]))[0, -1]
    torch.testing.assert_close(stream.logits, expected, rtol=1e-4, atol=1e-4)


def test_prompts_longer_than_the_context():
    """vanilla slides and ends with the logits of what it remembers; newton reads all of it."""
    prompt = ids(2 * BLOCK + 5)[0].tolist()
    vanilla = TokenStream(lively("vanilla learned"))
    vanilla.feed(prompt)
    assert vanilla.slides == 3 and vanilla.cache.length <= BLOCK  # 16, 8 + 8, 8 + 8, 8 + 5
    newest = torch.tensor([prompt[-vanilla.cache.length :]])
    with torch.no_grad():
        torch.testing.assert_close(vanilla.logits, vanilla.model(newest)[0, -1])
    newton = TokenStream(lively("newton soft"))
    newton.feed(prompt)
    with torch.no_grad():
        torch.testing.assert_close(newton.logits, newton.model(torch.tensor([prompt]))[0, -1])
    assert newton.slides == 0
    newton.reset()
    with pytest.raises(ValueError, match="feed"):
        next(newton.generate(1))


@pytest.mark.parametrize("name", ["vanilla learned", "published soft"])
def test_a_long_text_is_read_at_the_cost_of_one_context(name):
    """Slides are counted but not all read: logits and counts as when fed token by token."""
    model, tokens = lively(name), ids(23 * BLOCK + 3)[0].tolist()
    slowly, at_once = TokenStream(model), TokenStream(model)
    for token in tokens:
        slowly.feed([token])
    read = []
    hook = model.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].numel()))
    at_once.feed(tokens)
    hook.remove()
    assert sum(read) <= BLOCK and at_once.slides == slowly.slides > 30
    assert at_once.context == slowly.context
    torch.testing.assert_close(at_once.logits, slowly.logits, rtol=1e-4, atol=1e-4)


def test_a_conversation_of_any_length_takes_constant_memory():
    """The stream uses as much memory after 2,000 tokens as after 500."""
    stream = TokenStream(lively("newton soft"))
    stream.feed([1])
    sizes = []
    for _ in range(4):
        for _ in stream.generate(500, generator=torch.Generator().manual_seed(1)):
            pass
        sizes.append((stream.cache.num_bytes(), len(stream.context) <= 2 * 256))
        newest_pulls(stream)
    assert stream.cache.length == 2001 and set(sizes) == {sizes[0]} and sizes[0][1]

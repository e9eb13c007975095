"""From text to token files: corpora, tokenizers, encoding."""

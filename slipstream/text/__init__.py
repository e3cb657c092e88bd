"""Tokenizers, chat templates, the incremental detokenizer and stop strings. Import the file you need."""

"""GGUF files: the weights, the configuration and the tokenizer of a model in one file, or in one that is split."""

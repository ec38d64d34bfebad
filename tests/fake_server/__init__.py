"""A server whose engine is a formula: everything but the model is real."""

VOCAB, EOS = 400, 2  # of its model

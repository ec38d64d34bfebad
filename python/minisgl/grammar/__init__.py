"""Structured output: what a request's `Grammar` allows as the next token. Built on llguidance; knows no requests.

`source` writes a grammar in llguidance's language and gives it the model's tokens, `trial` compiles in a process that
may be killed, `store` keeps what compiled. The state of a running request is kept beside the planner
(`scheduler/grammar.py`).
"""

"""What a grammar may cost. One that costs more is refused, and must not be felt by anyone else."""

from __future__ import annotations

from llguidance import LLParserLimits

MAX_TEXT = 256 << 10  # characters of a schema, or a grammar
COMPILE_SECONDS = 3  # of one core
TRIAL_SECONDS = 10.0  # by the clock, when cores are busy
TRIAL_BYTES = 1 << 30  # of memory, beyond what the trial process has when it starts
TRIAL_STACK = 2 << 20  # bytes, a quarter of what threads have: what passes the trial passes everywhere
MAX_STORED_BYTES = 512 << 20  # compiled grammars that no request uses


def parser_limits() -> LLParserLimits:
    """A mask is computed between two tokens, so the limits of a step are milliseconds."""
    return LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=100_000,
        step_max_items=50_000,
        max_lexer_states=50_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )

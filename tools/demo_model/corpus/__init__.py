"""The training corpus of the demo model: hand-written facts and small grammars, all seeded."""

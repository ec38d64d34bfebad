"""The trace: what becomes of each request, and what each step was made of. Always on, and bounded. docs/tracing.md
describes the JSON that is made here; times are Unix seconds."""

"""What processes tell each other: one tagged union of structs per channel. See `codec` for the bytes."""

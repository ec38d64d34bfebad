"""Kinds of layers whose cache is a state: of one size, however long its sequence is. No torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DeltaNet:
    """A gated delta net (arXiv 2412.06464): heads of queries and keys, heads of values, their sizes, and how many
    tokens its short convolution spans."""

    num_k_heads: int  # on all ranks
    num_v_heads: int
    k_dim: int
    v_dim: int
    width: int
    is_grouped: bool = False  # checkpoints have what belongs to a head of keys side by side, not all of a kind

    @property
    def num_channels(self) -> int:
        """Of the convolution: features of queries, keys and values."""
        return 2 * self.num_k_heads * self.k_dim + self.num_v_heads * self.v_dim

    def shapes(self, tp_size: int, draft_len: int = 0) -> tuple[tuple[int, ...], ...]:
        """Of the tensors that one rank holds for each sequence: what the convolution has last seen, in the type that is
        computed in; what the net remembers, in float32; and what it was given of the tokens of a draft."""
        memory, given = (self.num_v_heads // tp_size, self.k_dim, self.v_dim), self.num_v_heads * (self.v_dim + 2)
        kept = draft_len, (self.num_channels + given) // tp_size
        return (self.num_channels // tp_size, self.width - 1), memory, kept

    def num_weights(self, hidden_size: int, tp_size: int) -> int:
        return (self.num_channels + 2 * self.num_v_heads * (self.v_dim + 1)) * hidden_size // tp_size


@dataclass(frozen=True, slots=True)
class ShortConv:
    """A convolution over so many tokens, with gates before and behind it: channels, as many as hidden features."""

    num_channels: int  # on all ranks
    width: int
    bias: bool

    def shapes(self, tp_size: int, draft_len: int = 0) -> tuple[tuple[int, ...], ...]:
        """Of what the convolution has last seen, and what it was given of the tokens of a draft."""
        return (self.num_channels // tp_size, self.width - 1), (draft_len, 3 * self.num_channels // tp_size)

    def num_weights(self, hidden_size: int, tp_size: int) -> int:
        return 4 * self.num_channels * hidden_size // tp_size


State = DeltaNet | ShortConv

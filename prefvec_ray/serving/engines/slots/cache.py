"""The slot cache: one row of keys and values for each running request, at its own length.

A request keeps its row while others come and go around it, so nothing is padded to a common start, and a prompt joins
between two steps of the others. Keys and values belong to the coefficients that they were computed with: one cache
serves one set of coefficients, or per-row coefficients that stay with their row.
"""

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig

from prefvec_ray.common.errors import InputError

FIRST_ROWS, FIRST_TOKENS = 4, 128


class SlotCache(Cache):
    """Keys and values of `rows` requests, each (row, head, position, channel). Row r holds `lengths[r]` tokens.

    Between `begin_*` and the model's forward pass it knows where the new tokens go. Memory grows by doubling, from
    `rows` rows.
    """

    def __init__(self, rows: int = FIRST_ROWS) -> None:
        super().__init__(layers=[])
        self._first_rows = rows
        self.lengths: list[int] = []
        self._kv: dict[int, tuple[Tensor, Tensor]] = {}
        self._new_rows = 0
        self._chunk: slice | None = None
        self._rows_R: Tensor | None = None
        self._positions_R: Tensor | None = None
        self._seen = 0

    @property
    def rows(self) -> int:
        return len(self.lengths)

    def begin_prefill(self, lengths: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """The next pass brings new rows: prompts of these lengths, padded on the right.

        Returns position_ids (new rows, T) and attention_mask (new rows, 1, T, T). What padding writes is overwritten
        before anything looks at it.
        """
        self._new_rows, self._chunk = len(lengths), None
        width = max(lengths)
        positions_RT = torch.arange(width, device=device).expand(self._new_rows, width)
        causal_TT = torch.ones(width, width, dtype=torch.bool, device=device).tril()
        self.lengths += lengths
        return positions_RT, causal_TT.expand(self._new_rows, 1, width, width)

    def begin_chunk(self, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The next pass brings the next `width` tokens of the only row's prompt, or its first ones.

        Returns position_ids (1, width) and attention_mask (1, 1, width, L), L tokens being in the row then.
        """
        start = self.lengths[0] if self.lengths else 0
        self.lengths, self._new_rows = [start + width], 0
        self._chunk = slice(start, start + width)
        positions_1T = torch.arange(start, start + width, device=device)[None]
        mask_TL = torch.arange(start + width, device=device) <= positions_1T.mT
        return positions_1T, mask_TL[None, None]

    def begin_decode(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The next pass brings one token for every row.

        Returns position_ids (rows, 1) and attention_mask (rows, 1, 1, L).
        """
        self._new_rows, self._chunk = 0, None
        self._rows_R = torch.arange(self.rows, device=device)
        self._positions_R = torch.tensor(self.lengths, device=device)
        self.lengths = [length + 1 for length in self.lengths]
        self._seen = max(self.lengths)
        positions_R1 = self._positions_R.unsqueeze(-1)
        mask_RL = torch.arange(self._seen, device=device) <= positions_R1
        return positions_R1, mask_RL[:, None, None, :]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Called by the model's attention: store the new keys and values, return those to attend to."""
        if self._new_rows:
            first, width = self.rows - self._new_rows, key_states.shape[2]
            keys, values = self._room(layer_idx, key_states, value_states, width)
            keys[first : self.rows, :, :width] = key_states
            values[first : self.rows, :, :width] = value_states
            return key_states, value_states
        if self._chunk:
            keys, values = self._room(layer_idx, key_states, value_states, self._chunk.stop)
            keys[:1, :, self._chunk] = key_states
            values[:1, :, self._chunk] = value_states
            return keys[:1, :, : self._chunk.stop], values[:1, :, : self._chunk.stop]
        keys, values = self._room(layer_idx, key_states, value_states, self._seen)
        keys[self._rows_R, :, self._positions_R] = key_states[:, :, 0]
        values[self._rows_R, :, self._positions_R] = value_states[:, :, 0]
        return keys[: self.rows, :, : self._seen], values[: self.rows, :, : self._seen]

    def take(self, other: "SlotCache") -> None:
        """The only row of `other` becomes the last row here."""
        (length,) = other.lengths
        self.lengths.append(length)
        for layer, (keys, values) in other._kv.items():
            mine = self._room(layer, keys, values, length)
            mine[0][self.rows - 1, :, :length] = keys[0, :, :length]
            mine[1][self.rows - 1, :, :length] = values[0, :, :length]

    def free(self, row: int) -> None:
        """Forget a row; the last row moves into its place."""
        last = self.rows - 1
        length = self.lengths.pop()
        if row != last:
            self.lengths[row] = length
            for keys, values in self._kv.values():
                keys[row, :, :length] = keys[last, :, :length]
                values[row, :, :length] = values[last, :, :length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(self.lengths, default=0)

    def _room(self, layer: int, keys: Tensor, values: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """The layer's buffers, grown where the rows or tokens do not fit."""
        old = self._kv.get(layer)
        if old and old[0].shape[0] >= self.rows and old[0].shape[2] >= tokens:
            return old
        self._kv[layer] = (
            _grown(old[0] if old else None, keys, self.rows, tokens, self._first_rows),
            _grown(old[1] if old else None, values, self.rows, tokens, self._first_rows),
        )
        return self._kv[layer]


def _grown(old: Tensor | None, like: Tensor, rows: int, tokens: int, first_rows: int) -> Tensor:
    """A larger buffer that holds what `old` held. The rest is 0: attention multiplies what it masks by 0, and 0 times
    whatever lay in that memory before could be NaN."""
    have_rows, _, have_tokens, _ = old.shape if old is not None else (first_rows, 0, FIRST_TOKENS, 0)
    rows, tokens = _doubled(have_rows, rows), _doubled(have_tokens, tokens)
    new = like.new_zeros(rows, like.shape[1], tokens, like.shape[3])
    if old is not None:
        new[:have_rows, :, :have_tokens] = old
    return new


def _doubled(size: int, needed: int) -> int:
    while size < needed:
        size *= 2
    return size


def context_length(config: PreTrainedConfig) -> int:
    """Most tokens that a row may hold: the model's positions, or a shorter sliding window (within one window, sliding
    attention is full attention).

    Raises InputError for models with other kinds of layers, whose state is not keys and values by position.
    """
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if kinds - {"full_attention", "sliding_attention"}:
        raise InputError(
            f"base model of type '{text.model_type}' has layers of kind {', '.join(sorted(kinds))};"
            " the transformers engine serves full and sliding attention only"
        )
    limits = [getattr(text, "max_position_embeddings", None)]
    if "sliding_attention" in kinds or not getattr(text, "layer_types", None):
        limits.append(getattr(text, "sliding_window", None))
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        # Beyond this length their angles depend on the longest row of the batch, so on a request's neighbours.
        limits.append(rope.get("original_max_position_embeddings"))
    known = [int(limit) for limit in limits if limit]
    if not known:
        raise InputError(f"base model of type '{text.model_type}': its config has no max_position_embeddings")
    return min(known)

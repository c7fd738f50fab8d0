"""The slot cache: one row of keys and values for each running request, at its own length.

A request keeps its row while others come and go around it, so nothing is padded to a common start, and a prompt joins
between two steps of the others. Keys and values belong to the coefficients that they were computed with: one cache
serves one set of coefficients, or per-row coefficients that stay with their row.

A layer with a sliding window keeps that many tokens of a row and no more: position p is in slot p % window, where what
it overwrites is out of everybody's sight. Attention does not look at the order of the slots, only at the positions that
the keys were turned by.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig

from prefvec_ray.common.errors import InputError

FIRST_ROWS, FIRST_TOKENS = 4, 128
FULL, SLIDING = "full_attention", "sliding_attention"

Masks = dict[str, Tensor]
"""Kind of layer -> which keys each query sees: (rows, 1, queries, keys), True where it does."""


@dataclass(frozen=True)
class CacheLayout:
    """What a model's layers look back at: the kind of each layer, and how many tokens back a layer of a kind sees."""

    kinds: tuple[str, ...]
    windows: Mapping[str, int]

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "CacheLayout":
        """Raises InputError for models with other kinds of layers, whose state is not keys and values by position."""
        text = config.get_text_config()
        kinds = getattr(text, "layer_types", None)
        window = getattr(text, "sliding_window", None)
        if not kinds:
            kinds = [SLIDING if window else FULL] * text.num_hidden_layers
        if unknown := sorted(set(kinds) - {FULL, SLIDING}):
            raise InputError(
                f"base model of type '{text.model_type}' has layers of kind {', '.join(unknown)};"
                " the transformers engine serves full and sliding attention only"
            )
        if getattr(text, "num_kv_shared_layers", None):
            raise InputError(
                f"base model of type '{text.model_type}' has layers that share keys and values;"
                " the transformers engine serves layers with their own only"
            )
        windows = {FULL: sys.maxsize, SLIDING: int(window or sys.maxsize)}
        return cls(tuple(kinds), {kind: windows[kind] for kind in sorted(set(kinds))})


class SlotCache(Cache):
    """Keys and values of `rows` requests, each (row, head, slot, channel). Row r holds `lengths[r]` tokens.

    Between `begin_*` and the model's forward pass it knows where the new tokens go. Memory grows by doubling, from
    `rows` rows.
    """

    def __init__(self, layout: CacheLayout, rows: int = FIRST_ROWS) -> None:
        super().__init__(layers=[])
        self._layout = layout
        self._first_rows = rows
        self.lengths: list[int] = []
        self._kv: dict[int, tuple[Tensor, Tensor]] = {}
        self._new_rows = 0
        self._chunk: tuple[int, int] | None = None
        self._rows_R: Tensor | None = None
        self._slots_R: dict[str, Tensor] = {}

    @property
    def rows(self) -> int:
        return len(self.lengths)

    def begin_prefill(self, lengths: list[int], device: torch.device) -> tuple[Tensor, Masks]:
        """The next pass brings new rows: prompts of these lengths, padded on the right.

        Returns position_ids (new rows, T) and masks (new rows, 1, T, T). What padding writes is overwritten before
        anything looks at it.
        """
        self._new_rows, self._chunk = len(lengths), None
        width = max(lengths)
        positions_T = torch.arange(width, device=device)
        self.lengths += lengths
        shape = (self._new_rows, 1, width, width)
        masks = {kind: _seen(positions_T, positions_T, w).expand(shape) for kind, w in self._layout.windows.items()}
        return positions_T.expand(self._new_rows, width), masks

    def begin_chunk(self, width: int, device: torch.device) -> tuple[Tensor, Masks]:
        """The next pass brings the next `width` tokens of the only row's prompt, or its first ones.

        Returns position_ids (1, width) and masks (1, 1, width, L): L tokens are in the row then, or are in sight.
        """
        start = self.lengths[0] if self.lengths else 0
        stop = start + width
        self.lengths, self._new_rows, self._chunk = [stop], 0, (start, stop)
        positions_T = torch.arange(start, stop, device=device)
        masks = {}
        for kind, window in self._layout.windows.items():
            keys_L = torch.arange(_first_in_sight(start, stop, window), stop, device=device)
            masks[kind] = _seen(positions_T, keys_L, window)[None, None]
        return positions_T[None], masks

    def begin_decode(self, device: torch.device) -> tuple[Tensor, Masks]:
        """The next pass brings one token for every row.

        Returns position_ids (rows, 1) and masks (rows, 1, 1, L).
        """
        self._new_rows, self._chunk = 0, None
        positions_R = torch.tensor(self.lengths, device=device)
        self.lengths = [length + 1 for length in self.lengths]
        self._rows_R = torch.arange(self.rows, device=device)
        masks = {}
        for kind, window in self._layout.windows.items():
            self._slots_R[kind] = positions_R % window
            slots_L = torch.arange(min(max(self.lengths), window), device=device)
            masks[kind] = (slots_L <= positions_R[:, None])[:, None, None]  # all of them, once a row is that long
        return positions_R[:, None], masks

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Called by the model's attention: store the new keys and values, return those to attend to."""
        kind = self._layout.kinds[layer_idx]
        window = self._layout.windows[kind]
        kv = self._room(layer_idx, key_states, value_states, self._chunk[1] if self._chunk else max(self.lengths))
        new = (key_states, value_states)
        if self._new_rows:
            first, width = self.rows - self._new_rows, key_states.shape[2]
            for stored, states in zip(kv, new, strict=True):
                if width <= window:
                    stored[first : self.rows, :, :width] = states
                    continue
                for row, length in enumerate(self.lengths[first:]):
                    _store(stored[first + row], states[row, :, :length], 0, window)
            return new
        if self._chunk:
            start, stop = self._chunk
            if stop <= window:
                for stored, states in zip(kv, new, strict=True):
                    stored[:1, :, start:stop] = states
                return kv[0][:1, :, :stop], kv[1][:1, :, :stop]
            past = torch.arange(_first_in_sight(start, stop, window), start, device=key_states.device) % window
            seen = [torch.cat([stored[:1, :, past], states], 2) for stored, states in zip(kv, new, strict=True)]
            for stored, states in zip(kv, new, strict=True):  # after it was read: it may overwrite what is in sight
                _store(stored[0], states[0], start, window)
            return seen[0], seen[1]
        slots_R, seen_slots = self._slots_R[kind], min(max(self.lengths), window)
        for stored, states in zip(kv, new, strict=True):
            stored[self._rows_R, :, slots_R] = states[:, :, 0]
        return kv[0][: self.rows, :, :seen_slots], kv[1][: self.rows, :, :seen_slots]

    def take(self, other: "SlotCache") -> None:
        """The only row of `other` becomes the last row here."""
        (length,) = other.lengths
        self.lengths.append(length)
        for layer, theirs in other._kv.items():
            slots = min(length, self._window(layer))
            for mine, stored in zip(self._room(layer, *theirs, length), theirs, strict=True):
                mine[self.rows - 1, :, :slots] = stored[0, :, :slots]

    def free(self, row: int) -> None:
        """Forget a row; the last row moves into its place."""
        last = self.rows - 1
        length = self.lengths.pop()
        if row != last:
            self.lengths[row] = length
            for layer, kv in self._kv.items():
                slots = min(length, self._window(layer))
                for stored in kv:
                    stored[row, :, :slots] = stored[last, :, :slots]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(self.lengths, default=0)

    def _window(self, layer: int) -> int:
        return self._layout.windows[self._layout.kinds[layer]]

    def _room(self, layer: int, keys: Tensor, values: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """The layer's buffers, grown where the rows or tokens do not fit. A window's worth of tokens always fits."""
        old, window = self._kv.get(layer), self._window(layer)
        if old and old[0].shape[0] >= self.rows and old[0].shape[2] >= min(tokens, window):
            return old
        self._kv[layer] = (
            _grown(old[0] if old else None, keys, self.rows, tokens, self._first_rows, window),
            _grown(old[1] if old else None, values, self.rows, tokens, self._first_rows, window),
        )
        return self._kv[layer]


def _seen(queries: Tensor, keys: Tensor, window: int) -> Tensor:
    """Which of the keys each query sees, by their positions: (queries, keys)."""
    back_QK = queries[:, None] - keys
    return (back_QK >= 0) & (back_QK < window)


def _first_in_sight(start: int, stop: int, window: int) -> int:
    """The first position that a chunk's keys begin at: the row's first one, as long as no slot is used again."""
    return 0 if stop <= window else max(0, start - window + 1)


def _store(stored: Tensor, states: Tensor, start: int, window: int) -> None:
    """Write a row's tokens (head, token, channel), the first of them at position `start`, into its slots."""
    stop = start + states.shape[1]
    if stop <= window:
        stored[:, start:stop] = states
        return
    kept = torch.arange(max(start, stop - window), stop, device=states.device)
    stored[:, kept % window] = states[:, kept - start]


def _grown(old: Tensor | None, like: Tensor, rows: int, tokens: int, first_rows: int, window: int) -> Tensor:
    """A larger buffer that holds what `old` held, of at most `window` slots. The rest is 0: attention multiplies what
    it masks by 0, and 0 times whatever lay in that memory before could be NaN."""
    have_rows, _, have_tokens, _ = old.shape if old is not None else (first_rows, 0, 0, 0)
    rows, tokens = _doubled(have_rows, rows), min(_doubled(have_tokens or FIRST_TOKENS, tokens), window)
    new = like.new_zeros(rows, like.shape[1], tokens, like.shape[3])
    if old is not None:
        new[:have_rows, :, :have_tokens] = old
    return new


def _doubled(size: int, needed: int) -> int:
    while size < needed:
        size *= 2
    return size


def context_length(config: PreTrainedConfig) -> int:
    """Most tokens that a row may hold: the model's positions.

    Raises InputError for models whose state is not keys and values by position, or whose config has no length.
    """
    CacheLayout.of(config)
    text = config.get_text_config()
    limits = [getattr(text, "max_position_embeddings", None)]
    ropes = getattr(text, "rope_parameters", None) or {}
    for rope in (ropes, *(of_a_kind for of_a_kind in ropes.values() if isinstance(of_a_kind, dict))):
        if rope.get("rope_type") in ("dynamic", "longrope"):
            # Beyond this length their angles depend on the longest row of the batch, so on a request's neighbours.
            limits.append(rope.get("original_max_position_embeddings"))
    known = [int(limit) for limit in limits if limit]
    if not known:
        raise InputError(f"base model of type '{text.model_type}': its config has no max_position_embeddings")
    return min(known)

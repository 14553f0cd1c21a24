"""Documents in windows, each from an aligned place on, with padding in between.

The documents are laid out one after another, each at the next multiple of `alignment`
(the chunks of the model: a memory can begin anew only between chunks). Windows cut
this layout every `context_length` tokens; a document that a window cuts goes on in the
next one, with the same segment id.
"""

import numpy as np


class PackedWindows:
    """Random access to windows, int32 `[2, context_length + 1]`: tokens, segment ids.

    Ids number the documents from 1 and are 0 for padding, whose token is end-of-text:
    the last token of every document predicts its end, and no token another document.

    starts: where in `tokens` documents begin; None: found by reading all of them.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        context_length: int,
        alignment: int,
        end_of_text: int,
        starts: np.ndarray | None = None,
    ):
        self._tokens = tokens
        self._context_length = context_length
        self._end_of_text = end_of_text
        if starts is None:
            # Every document begins with an end-of-text token, and has no other.
            starts = np.flatnonzero(np.asarray(tokens) == end_of_text)
        self._bounds = np.append(starts, len(tokens)).astype(np.int64)
        room = -(-np.diff(self._bounds) // alignment) * alignment
        self._places = np.append(0, np.cumsum(room))
        self.documents = len(starts)

    def __len__(self) -> int:
        return -(-int(self._places[-1]) // self._context_length)

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        size = self._context_length + 1
        begin = index * self._context_length
        window = np.zeros((2, size), np.int32)
        window[0] = self._end_of_text
        first = np.searchsorted(self._places, begin, side="right") - 1
        for document in range(first, len(self._bounds) - 1):
            offset = int(self._places[document]) - begin
            if offset >= size:
                break
            start, stop = self._bounds[document : document + 2]
            skipped = max(0, -offset)
            ids = self._tokens[start + skipped : min(stop, start + size - offset)]
            place = slice(offset + skipped, offset + skipped + len(ids))
            window[0, place] = ids
            window[1, place] = document + 1
        return window

    def weights(self, window: np.ndarray) -> np.ndarray:
        """float32 `[context_length]`: 1 where the text itself has the next token."""
        last = len(self._bounds) - 1
        ends = (window[1, :-1] == last) & (window[1, 1:] != last)
        return ((window[1, :-1] != 0) & ~ends).astype(np.float32)

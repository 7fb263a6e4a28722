"""How many requests one model may have at its engines, of all that there may be.

One that hangs keeps what it gets, and would have all in the end, while the others stand idle.
"""

from collections.abc import Collection, Sequence

_PARTS = 4  # one of them is kept for the models, in equal shares; of the rest each may take all


class Seats:
    def __init__(self, number: int, num_models: int) -> None:
        self._number = number
        self._own = number // (_PARTS * num_models)  # of each model
        self.scarce_from = number - num_models * self._own
        """So many taken; with fewer no model is full"""

    def full(self, taken: Sequence[int], closed: Collection[int]) -> tuple[int, ...]:
        """Models whose next request would take a seat that is another's own; `taken` is by model.

        None where there is no other model that is up and not full: there is nobody to keep seats for.
        """
        kept = [0 if model in closed else max(0, self._own - count) for model, count in enumerate(taken)]
        num_kept, num_left = sum(kept), self._number - sum(taken) - 1
        full = tuple(model for model, own in enumerate(kept) if num_kept - own > num_left)
        return full if len({*full, *closed}) < len(taken) else ()

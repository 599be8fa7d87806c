"""Ids of support images, as a caller names them: checked against those that a bank [M] holds."""

import torch
from torch import Tensor


def whole_numbers(values: Tensor | list[int] | int, name: str, rows: Tensor) -> Tensor:
    """What a caller gave as a tensor [n] int64, one number for each of the rows [n, ...]; a single number is one row.

    Raises:
        ValueError: for other numbers, none at all, or another count.
    """
    values = _whole(values, name, rows.device)
    if len(values) != len(rows):
        raise ValueError(f"{len(values)} {name} for {len(rows)} images: give one for each.")
    return values


def free_ids(ids: Tensor | list[int] | int | None, rows: Tensor, bank_ids: Tensor) -> Tensor:
    """Ids [n] for new rows [n, ...] that the bank does not hold; the next after its own for None.

    Raises:
        ValueError: naming ids that are taken or given twice.
    """
    if ids is None:
        first = int(bank_ids.max()) + 1 if len(bank_ids) else 0
        return torch.arange(first, first + len(rows), device=rows.device)
    ids = whole_numbers(ids, "ids", rows)
    check_unique(ids)
    taken = torch.isin(ids, bank_ids)
    if taken.any():
        raise ValueError(
            f"ids {some(ids[taken])} are in the support bank already: give other ids, or take these out first with"
            " model.remove_support(ids)."
        )
    return ids


def held_ids(ids: Tensor | list[int] | int, bank_ids: Tensor) -> Tensor:
    """Ids [n] of images that the bank holds.

    Raises:
        ValueError: naming those that it does not hold.
    """
    ids = _whole(ids, "ids", bank_ids.device)
    unknown = ~torch.isin(ids, bank_ids)
    if unknown.any():
        raise ValueError(f"ids {some(ids[unknown])} are not in the support bank, which holds {len(bank_ids)} images.")
    return ids


def find_rows(ids: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """For each of ids [n]: the first row of that id in `among` [m >= 1], and whether there is one."""
    ordered, order = among.sort(stable=True)
    row = order[torch.searchsorted(ordered, ids).clamp_max(len(among) - 1)]
    return row, among[row] == ids


def check_unique(ids: Tensor) -> None:
    """Raise a ValueError that names ids [n] given more than once."""
    values, counts = ids.unique(return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"ids {some(values[counts > 1])} are given more than once.")


def some(values: Tensor) -> str:
    """The first ten of values [n], for a message."""
    return str(values[:10].tolist()) + (f" and {len(values) - 10} more" if len(values) > 10 else "")


def _whole(values: Tensor | list[int] | int, name: str, device: torch.device) -> Tensor:
    values = torch.as_tensor(values, device=device).reshape(-1)
    if values.is_floating_point() or values.dtype == torch.bool or not len(values):
        raise ValueError(f"{name} must be whole numbers, at least one; got {some(values)}.")
    return values.long()

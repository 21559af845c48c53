"""What a program of the decode and merge kernels has to know first: where splits lie, whose row it has, which group.

Device functions over the op's tables; knows neither keys nor heads. Splits are the same for every row, searches read
whole tables, some entries at a time. Called by kernel.py.
"""

import triton
import triton.language as tl

_SEARCH: tl.constexpr = tl.constexpr(128)


@triton.jit
def whole_splits(units, MAX_SPLITS: tl.constexpr):
    """Splits that end within `units` times SPLIT keys: 32 of one unit, then 16 of each size that is twice the last."""
    octave = 0
    for size in tl.static_range(MAX_SPLITS // 16 - 1):
        octave += (units > (32 << size)).to(tl.int32)
    return (units >> octave) + 16 * octave


@triton.jit
def split_start(split, SPLIT: tl.constexpr):
    """Keys before a split, counted from split 0: the same for every row, so that rows may share splits."""
    octave = tl.maximum(split // 16 - 1, 0)
    return ((split - 16 * octave) * SPLIT) << octave


@triton.jit
def row_splits(last, context, window, WINDOWED: tl.constexpr, SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """(first visible key, end, key where split 0 starts, splits): functions of this row alone."""
    end_key = tl.maximum(tl.minimum(last + 1, context), 0)
    start_key = 0
    if WINDOWED:
        start_key = tl.maximum(last - window + 1, 0)
    origin = start_key // SPLIT * SPLIT
    num_keys = tl.maximum(end_key - origin, 0)
    splits = whole_splits(num_keys // SPLIT, MAX_SPLITS)
    return start_key, end_key, origin, splits + (split_start(splits, SPLIT) < num_keys).to(tl.int32)


@triton.jit
def row_of(index, start_ptr, num_seqs, ALL_ROWS: tl.constexpr):
    """(row, its sequence, rows of that): row `index`, or without ALL_ROWS the only one of a sequence; 0 rows = none."""
    seq = index
    if ALL_ROWS and (tl.load(start_ptr + index) != index) | (tl.load(start_ptr + index + 1) != index + 1):
        seq = last_at_most(index, start_ptr, num_seqs)
    first = tl.load(start_ptr + seq, mask=seq >= 0, other=0)
    num_rows = tl.load(start_ptr + seq + 1, mask=seq >= 0, other=0) - first
    if ALL_ROWS:
        return index, seq, tl.where(index < first + num_rows, num_rows, 0)
    return first, seq, tl.where(num_rows == 1, 1, 0)


@triton.jit
def last_at_most(value, ptr, size):
    """Index of the last of `size` ascending values that is no larger than `value`; -1 = none."""
    found = -1
    for base in range(0, size, _SEARCH):
        index = base + tl.arange(0, _SEARCH)
        is_one = (index < size) & (tl.load(ptr + index, mask=index < size, other=0) <= value)
        found += tl.sum(is_one.to(tl.int32), 0)
    return found


@triton.jit
def entry_of(seq, member_ptr, num_entries):
    """The first entry of group_seqs that names a sequence; num_entries = none."""
    found = num_entries
    for base in range(0, num_entries, _SEARCH):
        entry = base + tl.arange(0, _SEARCH)
        member = tl.load(member_ptr + entry, mask=entry < num_entries, other=-1)
        found = tl.minimum(found, tl.min(tl.where(member == seq, entry, num_entries), 0))
    return found


@triton.jit
def group_at(entry, group_ptr, num_groups):
    """(first entry, end, shared keys) of the prefix group that has an entry of group_seqs; all 0 = none has."""
    found = -1
    for base in range(0, num_groups, _SEARCH):
        group = base + tl.arange(0, _SEARCH)
        first = tl.load(group_ptr + group * 3, mask=group < num_groups, other=0)
        count = tl.load(group_ptr + group * 3 + 1, mask=group < num_groups, other=0)
        found = tl.maximum(found, tl.max(tl.where((first <= entry) & (entry < first + count), group, -1), 0))
    first = tl.load(group_ptr + found * 3, mask=found >= 0, other=0)
    count = tl.load(group_ptr + found * 3 + 1, mask=found >= 0, other=0)
    return first, first + count, tl.load(group_ptr + found * 3 + 2, mask=found >= 0, other=0)

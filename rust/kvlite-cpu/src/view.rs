//! Checked strided views of caller-owned memory: rows to read or write, the paged cache, block tables.
//!
//! A view is made only when its shape and strides (in elements) fit its memory, so an index below the shape is in
//! bounds. `RowsMut` and `PoolMut` are shared between threads and hold the crate's only raw pointers.

use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::Range;

use crate::{Element, Error, Threads};

/// Tasks per thread of an op that treats rows alone.
const ROW_TASKS: usize = 4;

/// Elements from the first to one past the last of a strided array; None when it is too large to count.
fn extent(shape: &[usize], strides: &[usize]) -> Option<usize> {
    if shape.contains(&0) {
        return Some(0);
    }
    let mut last = 0usize;
    for (&n, &stride) in shape.iter().zip(strides) {
        last = last.checked_add((n - 1).checked_mul(stride)?)?;
    }
    last.checked_add(1)
}

fn check(name: &'static str, len: usize, shape: &[usize], strides: &[usize]) -> Result<(), Error> {
    match extent(shape, strides) {
        Some(needed) if needed <= len => Ok(()),
        _ => Err(Error::Extent { name, len }),
    }
}

/// `check` for [rows, heads, dim] that is written: rows must not overlap either.
fn check_written(
    name: &'static str,
    len: usize,
    [rows, heads, dim]: [usize; 3],
    row_stride: usize,
) -> Result<(), Error> {
    check(name, len, &[rows, heads, dim], &[row_stride, dim, 1])?;
    if rows > 1 && row_stride < heads * dim { Err(Error::Extent { name, len }) } else { Ok(()) }
}

/// [rows, heads, dim] to read; one row is contiguous, rows are `row_stride` apart.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a, E> {
    values: &'a [E],
    pub(crate) rows: usize,
    pub(crate) heads: usize,
    pub(crate) dim: usize,
    row_stride: usize,
}

impl<'a, E: Element> Rows<'a, E> {
    /// Errors when `values` is too short.
    pub fn new(
        name: &'static str,
        values: &'a [E],
        [rows, heads, dim]: [usize; 3],
        row_stride: usize,
    ) -> Result<Self, Error> {
        check(name, values.len(), &[rows, heads, dim], &[row_stride, dim, 1])?;
        Ok(Rows { values, rows, heads, dim, row_stride })
    }

    /// Elements of one row.
    pub(crate) fn row_len(&self) -> usize {
        self.heads * self.dim
    }

    /// All heads of one row, [heads * dim].
    #[inline(always)]
    pub(crate) fn row(&self, row: usize) -> &'a [E] {
        &self.values[row * self.row_stride..][..self.heads * self.dim]
    }

    /// One head of one row, [dim].
    #[inline(always)]
    pub(crate) fn head(&self, row: usize, head: usize) -> &'a [E] {
        &self.row(row)[head * self.dim..][..self.dim]
    }
}

/// [rows, heads, dim] to write, laid out as `Rows`; threads write disjoint (row, head) pairs of it.
#[derive(Debug)]
pub struct RowsMut<'a, E> {
    values: *mut E,
    pub(crate) rows: usize,
    pub(crate) heads: usize,
    pub(crate) dim: usize,
    row_stride: usize,
    memory: PhantomData<&'a mut [E]>,
}

// SAFETY: it stands for a `&mut [E]`; concurrent use goes through `write_heads`, whose callers write disjoint heads.
#[allow(unsafe_code)]
unsafe impl<E: Send> Sync for RowsMut<'_, E> {}

impl<'a, E: Element> RowsMut<'a, E> {
    /// Errors when `values` is too short or rows would overlap.
    pub fn new(
        name: &'static str,
        values: &'a mut [E],
        [rows, heads, dim]: [usize; 3],
        row_stride: usize,
    ) -> Result<Self, Error> {
        check_written(name, values.len(), [rows, heads, dim], row_stride)?;
        Ok(RowsMut { values: values.as_mut_ptr(), rows, heads, dim, row_stride, memory: PhantomData })
    }

    /// Writes `value(0..dim)` to one head of one row.
    ///
    /// # Safety
    /// No other thread touches the same (row, head) during the call.
    #[allow(unsafe_code)]
    #[inline(always)]
    pub(crate) unsafe fn write_head(&self, row: usize, head: usize, value: impl Fn(usize) -> E) {
        // SAFETY: the caller answers for this one head.
        unsafe { self.write_heads(row, head..head + 1, value) }
    }

    /// Writes `value(0..)` to a run of heads of one row.
    ///
    /// # Safety
    /// No other thread touches these heads of the row during the call.
    #[allow(unsafe_code)]
    #[inline(always)]
    pub(crate) unsafe fn write_heads(&self, row: usize, heads: Range<usize>, value: impl Fn(usize) -> E) {
        // SAFETY: the caller answers for these heads.
        for (i, element) in unsafe { self.heads_mut(row, heads) }.iter_mut().enumerate() {
            *element = value(i);
        }
    }

    /// A run of heads of one row, [heads * dim].
    ///
    /// # Safety
    /// Nobody else touches these heads of the row while the slice lives.
    #[allow(unsafe_code, clippy::mut_from_ref)]
    #[inline(always)]
    pub(crate) unsafe fn heads_mut(&self, row: usize, heads: Range<usize>) -> &mut [E] {
        assert!(row < self.rows && heads.start <= heads.end && heads.end <= self.heads);
        let (start, len) = (row * self.row_stride + heads.start * self.dim, heads.len() * self.dim);
        // SAFETY: `new` checked the extent of the shape, row and heads lie in it, and the caller alone uses these heads.
        unsafe { std::slice::from_raw_parts_mut(self.values.add(start), len) }
    }
}

/// [rows, heads, dim] to read and write in place, laid out as `Rows`: cells, because q and k of one QKV matrix interleave.
#[derive(Clone, Copy, Debug)]
pub struct RowsCells<'a, E: Copy> {
    values: &'a [Cell<E>],
    pub(crate) rows: usize,
    pub(crate) heads: usize,
    pub(crate) dim: usize,
    row_stride: usize,
}

impl<'a, E: Element> RowsCells<'a, E> {
    /// Errors when `values` is too short or rows would overlap.
    pub fn new(
        name: &'static str,
        values: &'a [Cell<E>],
        [rows, heads, dim]: [usize; 3],
        row_stride: usize,
    ) -> Result<Self, Error> {
        check_written(name, values.len(), [rows, heads, dim], row_stride)?;
        Ok(RowsCells { values, rows, heads, dim, row_stride })
    }

    pub(crate) fn shape(&self) -> [usize; 3] {
        [self.rows, self.heads, self.dim]
    }

    /// One head of one row, [dim].
    #[inline(always)]
    pub(crate) fn head(&self, row: usize, head: usize) -> &'a [Cell<E>] {
        &self.values[row * self.row_stride + head * self.dim..][..self.dim]
    }

    /// Whether rows of the two share memory with rows of the same index alone, if with any.
    fn meets_by_row(&self, other: &Self) -> bool {
        let (a, b) = (self.values.as_ptr_range(), other.values.as_ptr_range());
        if a.end <= b.start || b.end <= a.start {
            return true;
        }
        let start = |cells: &Self| cells.values.as_ptr() as isize / size_of::<E>().max(1) as isize;
        let width = |cells: &Self| (cells.heads * cells.dim) as isize;
        let (stride, shift) = (self.row_stride as isize, start(other) - start(self));
        self.row_stride == other.row_stride && (width(self) - stride..=stride - width(other)).contains(&shift)
    }
}

/// Calls `task` with runs of the rows of `cells`, which have equally many; it may touch no other rows of them.
///
/// `work` as in `Threads::run`. One task does it all where different rows share memory.
pub(crate) fn by_row<'a, E: Element, const N: usize>(
    threads: &Threads,
    cells: [RowsCells<'a, E>; N],
    work: usize,
    task: impl Fn(Range<usize>, &[RowsCells<'a, E>; N]) + Sync,
) {
    let rows = cells[0].rows;
    let meets_others = |i: usize| cells[i + 1..].iter().any(|other| !cells[i].meets_by_row(other));
    let tasks = if (0..N).any(meets_others) { 1 } else { rows.min(threads.count() * ROW_TASKS) };
    let cells = ByRow(cells);
    threads.run(tasks, work, |i| task(rows * i / tasks..rows * (i + 1) / tasks, cells.get()));
}

/// Cells that threads touch at rows of their own.
struct ByRow<T>(T);

// SAFETY: made by `by_row` alone, which gives every row to one task and starts several only when different rows share no
// memory.
#[allow(unsafe_code)]
unsafe impl<T> Sync for ByRow<T> {}

impl<T> ByRow<T> {
    fn get(&self) -> &T {
        &self.0
    }
}

/// Shape and strides of one layer's K or V: [blocks, block_size, kv_heads, dim], dim contiguous.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CacheLayout {
    pub(crate) num_blocks: usize,
    pub(crate) block_size: usize,
    pub(crate) kv_heads: usize,
    pub(crate) dim: usize,
    strides: [usize; 3],
}

impl CacheLayout {
    fn new(name: &'static str, len: usize, shape: [usize; 4], strides: [usize; 3]) -> Result<Self, Error> {
        let [num_blocks, block_size, kv_heads, dim] = shape;
        check(name, len, &shape, &[strides[0], strides[1], strides[2], 1])?;
        if block_size == 0 || kv_heads == 0 || dim == 0 {
            return Err(Error::Extent { name, len });
        }
        Ok(CacheLayout { num_blocks, block_size, kv_heads, dim, strides })
    }

    /// Where a key's vector starts.
    #[inline(always)]
    pub(crate) fn offset(&self, block: usize, slot: usize, kv_head: usize) -> usize {
        block * self.strides[0] + slot * self.strides[1] + kv_head * self.strides[2]
    }
}

/// One layer's K or V to read.
#[derive(Clone, Copy, Debug)]
pub struct KvCache<'a, E> {
    pub(crate) values: &'a [E],
    pub(crate) layout: CacheLayout,
}

impl<'a, E: Element> KvCache<'a, E> {
    /// Shape [blocks, block_size, kv_heads, dim], strides of the first three. Errors when `values` is too short.
    pub fn new(name: &'static str, values: &'a [E], shape: [usize; 4], strides: [usize; 3]) -> Result<Self, Error> {
        Ok(KvCache { values, layout: CacheLayout::new(name, values.len(), shape, strides)? })
    }
}

/// One layer's K or V to write: cells, because K and V of one pool interleave in memory.
#[derive(Clone, Copy, Debug)]
pub struct KvCacheCells<'a, E: Copy> {
    pub(crate) values: &'a [Cell<E>],
    pub(crate) layout: CacheLayout,
}

impl<'a, E: Element> KvCacheCells<'a, E> {
    /// As `KvCache::new`.
    pub fn new(
        name: &'static str,
        values: &'a [Cell<E>],
        shape: [usize; 4],
        strides: [usize; 3],
    ) -> Result<Self, Error> {
        Ok(KvCacheCells { values, layout: CacheLayout::new(name, values.len(), shape, strides)? })
    }
}

/// All layers of the pool to read and write in place: [blocks, layers, 2, kv_heads, block_size, dim] without gaps.
///
/// Shared between threads that touch disjoint rows.
#[derive(Debug)]
pub struct PoolMut<'a, E> {
    values: *mut E,
    pub(crate) num_blocks: usize,
    pub(crate) layers: usize,
    pub(crate) block_size: usize,
    pub(crate) kv_heads: usize,
    pub(crate) dim: usize,
    memory: PhantomData<&'a mut [E]>,
}

// SAFETY: as `RowsMut`; concurrent use goes through `source_and_target`, whose callers write disjoint rows.
#[allow(unsafe_code)]
unsafe impl<E: Send> Sync for PoolMut<'_, E> {}

impl<'a, E: Element> PoolMut<'a, E> {
    /// Errors unless `values` has exactly the elements of `shape`, and K and V in its third dimension.
    pub fn new(name: &'static str, values: &'a mut [E], shape: [usize; 6]) -> Result<Self, Error> {
        let [num_blocks, layers, sides, kv_heads, block_size, dim] = shape;
        let len = shape.iter().try_fold(1usize, |product, &n| product.checked_mul(n));
        if len != Some(values.len()) || sides != 2 || block_size == 0 || kv_heads == 0 || dim == 0 {
            return Err(Error::Extent { name, len: values.len() });
        }
        let values = values.as_mut_ptr();
        Ok(PoolMut { values, num_blocks, layers, block_size, kv_heads, dim, memory: PhantomData })
    }

    /// One KV head's K (side 0) or V (side 1) of two slots in one layer: one to read, one to write.
    ///
    /// # Safety
    /// The slots differ, nobody writes `source` and nobody else touches `target` while the slices live.
    #[allow(unsafe_code, clippy::mut_from_ref)]
    #[inline(always)]
    pub(crate) unsafe fn source_and_target(
        &self,
        layer: usize,
        side: usize,
        kv_head: usize,
        source: usize,
        target: usize,
    ) -> (&[E], &mut [E]) {
        let slots = self.num_blocks * self.block_size;
        assert!(layer < self.layers && side < 2 && kv_head < self.kv_heads && source < slots && target < slots);
        let offset = |slot: usize| {
            let (block, within) = (slot / self.block_size, slot % self.block_size);
            ((((block * self.layers + layer) * 2 + side) * self.kv_heads + kv_head) * self.block_size + within)
                * self.dim
        };
        // SAFETY: `new` checked the extent, layer, side, head and slots lie in it; the caller answers for aliasing.
        unsafe {
            (
                std::slice::from_raw_parts(self.values.add(offset(source)), self.dim),
                std::slice::from_raw_parts_mut(self.values.add(offset(target)), self.dim),
            )
        }
    }
}

/// [rows, blocks] of block indices; rows are `row_stride` apart.
#[derive(Clone, Copy, Debug)]
pub struct BlockTable<'a> {
    values: &'a [i32],
    pub(crate) rows: usize,
    pub(crate) blocks: usize,
    row_stride: usize,
}

impl<'a> BlockTable<'a> {
    /// Errors when `values` is too short.
    pub fn new(values: &'a [i32], [rows, blocks]: [usize; 2], row_stride: usize) -> Result<Self, Error> {
        check("block_table", values.len(), &[rows, blocks], &[row_stride, 1])?;
        Ok(BlockTable { values, rows, blocks, row_stride })
    }

    #[inline(always)]
    pub(crate) fn row(&self, row: usize) -> &'a [i32] {
        if self.blocks == 0 { &[] } else { &self.values[row * self.row_stride..][..self.blocks] }
    }

    /// Errors unless every block that holds a key of `keys` lies in the pool.
    pub(crate) fn check_keys(
        &self,
        row: usize,
        keys: std::ops::Range<usize>,
        block_size: usize,
        num_blocks: usize,
    ) -> Result<(), Error> {
        if keys.is_empty() {
            return Ok(());
        }
        let first = keys.start / block_size;
        for (i, &block) in self.row(row)[first..keys.end.div_ceil(block_size)].iter().enumerate() {
            if usize::try_from(block).map_or(true, |block| block >= num_blocks) {
                return Err(Error::Block { row, index: first + i, block, num_blocks });
            }
        }
        Ok(())
    }
}

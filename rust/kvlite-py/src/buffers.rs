//! Python memory as checked Rust slices: the one place of this crate that may say `unsafe`.
//!
//! An `Array` holds the exporter's buffer, so the memory lives as long as it does. Format, dimensions, alignment,
//! and strides are checked when it is made; that it may be written and overlaps nothing else that a call uses is checked
//! by `exclusive`. What remains is the contract of every op, as of NumPy's own: no other thread writes an array
//! while a call uses it.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::ops::Range;

use kvlite_cpu::{bf16, f16};
use pyo3::buffer::{Element, PyBuffer, PyUntypedBuffer};
use pyo3::prelude::*;

use crate::errors::invalid;

/// A number format and the one that Python's buffer protocol has for it.
///
/// # Safety
/// Both have the same size and alignment, and every bit pattern is valid in both.
pub unsafe trait Stored: Copy + Send + Sync + 'static {
    /// What the exporter calls it.
    type Raw: Element + Send + Sync;
    /// For messages.
    const NAME: &'static str;
}

// SAFETY: the same type.
unsafe impl Stored for f32 {
    type Raw = f32;
    const NAME: &'static str = "float32";
}
// SAFETY: the same type.
unsafe impl Stored for i32 {
    type Raw = i32;
    const NAME: &'static str = "int32";
}
// SAFETY: the same type.
unsafe impl Stored for i64 {
    type Raw = i64;
    const NAME: &'static str = "int64";
}
// SAFETY: the same type.
unsafe impl Stored for u8 {
    type Raw = u8;
    const NAME: &'static str = "uint8";
}
// SAFETY: a transparent wrapper of u16.
unsafe impl Stored for bf16 {
    type Raw = u16;
    const NAME: &'static str = "uint16 (bfloat16 bits)";
}
// SAFETY: a transparent wrapper of u16.
unsafe impl Stored for f16 {
    type Raw = u16;
    const NAME: &'static str = "uint16 (float16 bits)";
}

/// An N-dimensional array of `T` owned by Python. Strides are in elements and not negative.
pub struct Array<T: Stored, const N: usize> {
    pub name: &'static str,
    pub shape: [usize; N],
    pub strides: [usize; N],
    buffer: PyBuffer<T::Raw>,
    /// Elements from the first to one past the last.
    len: usize,
}

impl<T: Stored, const N: usize> Array<T, N> {
    /// Errors when `object` is no N-dimensional, aligned array of `T` with forward strides.
    pub fn new(name: &'static str, object: &Bound<'_, PyAny>) -> PyResult<Self> {
        Self::with_dimensions(name, object, N)
    }

    /// As `new`, but with N - 1 dimensions the second one is missing and has one element.
    pub fn with_heads(name: &'static str, object: &Bound<'_, PyAny>) -> PyResult<Self> {
        Self::with_dimensions(name, object, N - 1)
    }

    fn with_dimensions(name: &'static str, object: &Bound<'_, PyAny>, fewest: usize) -> PyResult<Self> {
        let buffer = PyUntypedBuffer::get(object)?;
        let format = buffer.format().to_owned();
        let buffer = buffer
            .into_typed::<T::Raw>()
            .map_err(|_| invalid(name, format!("{name} has elements of format {format:?}, expected {}", T::NAME)))?;
        let given = buffer.dimensions();
        if given != N && given != fewest {
            return Err(invalid(name, format!("{name} has {given} dimensions, expected {N}")));
        }
        let size = size_of::<T>();
        let (mut shape, mut strides, mut last) = ([1; N], [0; N], Some(0usize));
        for (i, (&n, &stride)) in buffer.shape().iter().zip(buffer.strides()).enumerate() {
            let i = if i == 0 { 0 } else { i + N - given };
            shape[i] = n;
            // The stride of a dimension with one element is never taken; exporters put anything there.
            strides[i] = match usize::try_from(stride) {
                _ if n <= 1 => 0,
                Ok(stride) if stride % size == 0 => stride / size,
                _ => return Err(invalid(name, format!("{name} has stride {stride} bytes in dimension {i}"))),
            };
            last = last.and_then(|last| last.checked_add(n.saturating_sub(1).checked_mul(strides[i])?));
        }
        let empty = shape.contains(&0);
        if !empty && !(buffer.buf_ptr() as usize).is_multiple_of(align_of::<T>()) {
            return Err(invalid(name, format!("{name} is not aligned to {} bytes", align_of::<T>())));
        }
        let last = last.ok_or_else(|| invalid(name, format!("{name} is too large")))?;
        Ok(Array { name, shape, strides, buffer, len: if empty { 0 } else { last + 1 } })
    }

    /// Errors unless the dimensions from `first` on lie without gaps, last one fastest.
    pub fn packed_from(self, first: usize) -> PyResult<Self> {
        let mut expected = 1;
        for i in (first..N).rev() {
            if self.shape[i] > 1 && self.strides[i] != expected {
                let name = self.name;
                return Err(invalid(
                    name,
                    format!("{name} has stride {} in dimension {i}, expected {expected}", self.strides[i]),
                ));
            }
            expected *= self.shape[i];
        }
        Ok(self)
    }

    /// From the first element to the last, gaps included.
    pub fn slice(&self) -> &[T] {
        if self.len == 0 {
            return &[];
        }
        // SAFETY: `new` checked format and alignment; the exporter vouches for shape and strides, which span `len`
        // elements from `buf_ptr`, and keeps them alive while `buffer` is held.
        unsafe { std::slice::from_raw_parts(self.buffer.buf_ptr() as *const T, self.len) }
    }

    /// Claims the array for writing. `others` are the spans of everything else that the call reads or writes.
    pub fn exclusive(self, others: &[Span]) -> PyResult<Exclusive<T, N>> {
        let (name, own) = self.span();
        if self.buffer.readonly() {
            return Err(invalid(name, format!("{name} is read-only")));
        }
        if let Some((other, _)) = others.iter().find(|(_, span)| own.start < span.end && span.start < own.end) {
            return Err(invalid(name, format!("{name} shares memory with {other}")));
        }
        Ok(Exclusive(self))
    }

    /// Name and addresses.
    pub fn span(&self) -> Span {
        let start = self.buffer.buf_ptr() as usize;
        (self.name, start..start + self.len * size_of::<T>())
    }
}

impl<T: Stored> Array<T, 2> {
    /// One row alone: others may be written meanwhile. None: there is no such row.
    pub fn row(&self, row: usize) -> Option<&[T]> {
        let [num_rows, row_len] = self.shape;
        if row >= num_rows {
            return None;
        }
        if row_len == 0 {
            return Some(&[]);
        }
        // SAFETY: as `slice`; rows are packed (`packed_from(1)` was asked for by the caller that reads rows, and is checked
        // here), and row `row` begins at its stride, inside the buffer.
        assert!(row_len <= 1 || self.strides[1] == 1, "the rows of {} are packed", self.name);
        unsafe {
            let first = (self.buffer.buf_ptr() as *const T).add(row * self.strides[0]);
            Some(std::slice::from_raw_parts(first, row_len))
        }
    }
}

/// An array's name and the addresses between its first and last element.
pub type Span = (&'static str, Range<usize>);

/// An array that this call alone writes, and reads through this value only.
pub struct Exclusive<T: Stored, const N: usize>(Array<T, N>);

impl<T: Stored, const N: usize> Exclusive<T, N> {
    /// From the first element to the last, to write.
    pub fn slice(&mut self) -> &mut [T] {
        if self.0.len == 0 {
            return &mut [];
        }
        // SAFETY: as `Array::slice`; writable and apart from the call's other arrays (`Array::exclusive`), and borrowed
        // from the one value that stands for this memory.
        unsafe { std::slice::from_raw_parts_mut(self.0.buffer.buf_ptr() as *mut T, self.0.len) }
    }

    /// As `slice`, in cells: K and V of one pool interleave, so both are claimed against the inputs alone.
    pub fn cells(&self) -> &[Cell<T>] {
        if self.0.len == 0 {
            return &[];
        }
        // SAFETY: as `Array::slice`; a `Cell<T>` has the layout of `T` and allows shared writes within one thread.
        unsafe { std::slice::from_raw_parts(self.0.buffer.buf_ptr() as *const Cell<T>, self.0.len) }
    }

    /// Shape and strides.
    pub fn layout(&self) -> ([usize; N], [usize; N]) {
        (self.0.shape, self.0.strides)
    }
}

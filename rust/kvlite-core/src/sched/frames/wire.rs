//! Integers, bytes and lists as they lie in a frame: little-endian, every length checked before anything is allocated.
//!
//! Knows nothing of frames. A reader never reads past its end and never panics; `finish` refuses what is left over.

use super::FrameError;

/// Appends values to a frame.
#[derive(Default)]
pub(super) struct Writer {
    pub(super) bytes: Vec<u8>,
}

impl Writer {
    pub(super) fn byte(&mut self, value: u8) {
        self.bytes.push(value);
    }

    pub(super) fn u32(&mut self, value: u32) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    pub(super) fn i32(&mut self, value: i32) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    pub(super) fn u64(&mut self, value: u64) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    /// How many follow; lists longer than the format allows are cut by nobody: the caller's frame is refused as too long.
    pub(super) fn count(&mut self, count: usize) {
        self.u32(u32::try_from(count).unwrap_or(u32::MAX));
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.count(bytes.len());
        self.bytes.extend_from_slice(bytes);
    }
}

/// Takes values from a frame's body.
pub(super) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(super) fn new(body: &'a [u8]) -> Reader<'a> {
        Reader { rest: body }
    }

    pub(super) fn take(&mut self, len: usize, what: &'static str) -> Result<&'a [u8], FrameError> {
        let (taken, rest) = self.rest.split_at_checked(len).ok_or(FrameError::Cut { what })?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], FrameError> {
        let taken = self.take(N, what)?;
        taken.try_into().map_err(|_| FrameError::Cut { what })
    }

    pub(super) fn byte(&mut self, what: &'static str) -> Result<u8, FrameError> {
        Ok(self.array::<1>(what)?[0])
    }

    pub(super) fn flag(&mut self, what: &'static str) -> Result<bool, FrameError> {
        match self.byte(what)? {
            0 => Ok(false),
            1 => Ok(true),
            value => Err(FrameError::Value { what, value: value.into() }),
        }
    }

    pub(super) fn u32(&mut self, what: &'static str) -> Result<u32, FrameError> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(super) fn i32(&mut self, what: &'static str) -> Result<i32, FrameError> {
        self.array(what).map(i32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, what: &'static str) -> Result<u64, FrameError> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A count of items of at least `item_len` bytes each: more than the rest of the frame could hold is an error.
    pub(super) fn count(&mut self, max: u32, item_len: usize, what: &'static str) -> Result<usize, FrameError> {
        let count = self.u32(what)?;
        if count > max {
            return Err(FrameError::Value { what, value: count.into() });
        }
        let count = count as usize;
        match count.checked_mul(item_len) {
            Some(len) if len <= self.rest.len() => Ok(count),
            _ => Err(FrameError::Cut { what }),
        }
    }

    pub(super) fn bytes(&mut self, max: u32, what: &'static str) -> Result<&'a [u8], FrameError> {
        let count = self.count(max, 1, what)?;
        self.take(count, what)
    }

    pub(super) fn finish(self) -> Result<(), FrameError> {
        if self.rest.is_empty() { Ok(()) } else { Err(FrameError::Left { len: self.rest.len() }) }
    }
}

//! AMX: eight registers of 16 rows of 64 bytes, tiles, and what every product of tiles begins and ends with.
//!
//! A product adds, for each of 16 rows of the left tile and each of 16 lanes of the right one, 16 pairs of bf16 to a sum in
//! f32, pair by pair: tile registers 0 to 3 hold sums here, 4 to 7 what is multiplied. The instructions are written out, for
//! the compiler does not offer them yet; it never uses tiles itself. Called by `linear` and `attention`.

use std::arch::asm;
use std::arch::x86_64::__m512i;

use crate::lanes::{LANES, LINE_BYTES};

/// What a register holds, as it lies in memory of its own.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(crate) struct Tile(pub(crate) [__m512i; LANES]);

impl Tile {
    pub(crate) fn zeros() -> Tile {
        // SAFETY: every bit pattern is a value of it.
        #[allow(unsafe_code)]
        unsafe {
            std::mem::zeroed()
        }
    }

    #[inline(always)]
    pub(crate) fn start(&self) -> *const u8 {
        (&raw const self.0).cast()
    }
}

/// The thread's tiles, each 16 rows of 64 bytes; without them, the system need not keep any.
pub(crate) struct Tiles(());

impl Tiles {
    /// # Safety
    /// The machine has AMX (`Kind::Amx`).
    #[allow(unsafe_code)]
    pub(crate) unsafe fn new() -> Tiles {
        #[repr(C, align(64))]
        struct Config {
            palette: u8,
            start_row: u8,
            reserved: [u8; 14],
            row_bytes: [u16; 16],
            rows: [u8; 16],
        }
        let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
        row_bytes[..8].fill(LINE_BYTES as u16);
        rows[..8].fill(LANES as u8);
        let config = Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows };
        // SAFETY: the caller's promise; 64 bytes are read.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &config, options(readonly, nostack, preserves_flags));
        }
        Tiles(())
    }

    /// The four sums become 0.
    #[inline(always)]
    pub(crate) fn clear(&self) {
        // SAFETY: the tiles are configured.
        #[allow(unsafe_code)]
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                options(nomem, nostack, preserves_flags)
            );
        }
    }

    /// Adds four left tiles times one right one: to sum `i` the product of left tile `i`. Tiles start at the addresses; the
    /// strides are bytes from row to row.
    ///
    /// # Safety
    /// Each is 16 rows of 64 bytes that may be read.
    #[allow(unsafe_code)]
    #[inline(always)]
    pub(crate) unsafe fn add_column(&self, left: [*const u8; 4], stride: usize, right: *const u8, right_stride: usize) {
        let [a, b, c, d] = left;
        // SAFETY: the tiles are configured, and the caller's promise.
        unsafe {
            asm!(
                "tileloadd tmm4, [{right} + {right_stride}*1]",
                "tileloadd tmm5, [{a} + {stride}*1]",
                "tdpbf16ps tmm0, tmm5, tmm4",
                "tileloadd tmm6, [{b} + {stride}*1]",
                "tdpbf16ps tmm1, tmm6, tmm4",
                "tileloadd tmm7, [{c} + {stride}*1]",
                "tdpbf16ps tmm2, tmm7, tmm4",
                "tileloadd tmm5, [{d} + {stride}*1]",
                "tdpbf16ps tmm3, tmm5, tmm4",
                right = in(reg) right, right_stride = in(reg) right_stride, stride = in(reg) stride,
                a = in(reg) a, b = in(reg) b, c = in(reg) c, d = in(reg) d,
                options(readonly, nostack, preserves_flags)
            );
        }
    }

    /// As `add_column`, of one left tile and four right ones.
    ///
    /// # Safety
    /// As there.
    #[allow(unsafe_code)]
    #[inline(always)]
    pub(crate) unsafe fn add_row(&self, left: *const u8, left_stride: usize, right: [*const u8; 4], stride: usize) {
        let [a, b, c, d] = right;
        // SAFETY: the tiles are configured, and the caller's promise.
        unsafe {
            asm!(
                "tileloadd tmm4, [{left} + {left_stride}*1]",
                "tileloadd tmm5, [{a} + {stride}*1]",
                "tdpbf16ps tmm0, tmm4, tmm5",
                "tileloadd tmm6, [{b} + {stride}*1]",
                "tdpbf16ps tmm1, tmm4, tmm6",
                "tileloadd tmm7, [{c} + {stride}*1]",
                "tdpbf16ps tmm2, tmm4, tmm7",
                "tileloadd tmm5, [{d} + {stride}*1]",
                "tdpbf16ps tmm3, tmm4, tmm5",
                left = in(reg) left, left_stride = in(reg) left_stride, stride = in(reg) stride,
                a = in(reg) a, b = in(reg) b, c = in(reg) c, d = in(reg) d,
                options(readonly, nostack, preserves_flags)
            );
        }
    }

    /// As `add_column`, of two left tiles and two right ones: sum `2 i + j` is that of left tile `i` and right tile `j`.
    ///
    /// # Safety
    /// As there.
    #[allow(unsafe_code)]
    #[inline(always)]
    pub(crate) unsafe fn add_square(
        &self,
        [a, b]: [*const u8; 2],
        stride: usize,
        [c, d]: [*const u8; 2],
        right_stride: usize,
    ) {
        // SAFETY: the tiles are configured, and the caller's promise.
        unsafe {
            asm!(
                "tileloadd tmm4, [{c} + {right_stride}*1]",
                "tileloadd tmm6, [{a} + {stride}*1]",
                "tdpbf16ps tmm0, tmm6, tmm4",
                "tileloadd tmm5, [{d} + {right_stride}*1]",
                "tdpbf16ps tmm1, tmm6, tmm5",
                "tileloadd tmm7, [{b} + {stride}*1]",
                "tdpbf16ps tmm2, tmm7, tmm4",
                "tdpbf16ps tmm3, tmm7, tmm5",
                a = in(reg) a, b = in(reg) b, stride = in(reg) stride,
                c = in(reg) c, d = in(reg) d, right_stride = in(reg) right_stride,
                options(readonly, nostack, preserves_flags)
            );
        }
    }

    /// Writes the four sums, each to 16 rows of 64 bytes, `stride` bytes from row to row.
    ///
    /// # Safety
    /// Those rows are the caller's.
    #[allow(unsafe_code)]
    #[inline(always)]
    pub(crate) unsafe fn store(&self, [a, b, c, d]: [*mut f32; 4], stride: usize) {
        // SAFETY: the tiles are configured, and the caller's promise.
        unsafe {
            asm!(
                "tilestored [{a} + {stride}*1], tmm0",
                "tilestored [{b} + {stride}*1], tmm1",
                "tilestored [{c} + {stride}*1], tmm2",
                "tilestored [{d} + {stride}*1], tmm3",
                a = in(reg) a, b = in(reg) b, c = in(reg) c, d = in(reg) d, stride = in(reg) stride,
                options(nostack, preserves_flags)
            );
        }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: only a machine with AMX made it.
        #[allow(unsafe_code)]
        unsafe {
            asm!("tilerelease", options(nomem, nostack, preserves_flags));
        }
    }
}

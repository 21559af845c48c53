//! Products of many rows with AVX-512 BF16: a register holds 16 rows of x, weights are broadcast to it.
//!
//! The bits are those of `native` where `invariant` asks for it. There lane l of a sum adds the pairs l, l + 16, ... of
//! K, and then the lanes are added as a tree. Here a pass adds what one lane would, for 8 weight rows and up to 48 rows
//! of x, and the passes come in the order in which the tree pairs lanes. Both sides are packed in that order, so that a
//! pass reads straight on. Without `invariant` a sum goes on from pass to pass instead (up to 1.08x at K = 896):
//!
//! ```text
//!   x, once per call            [panel][lane][chunk of K][up to 3 registers of 16 rows]   elements are pairs of K
//!   16 weight rows, as needed   [tile][lane][chunk of K][8 weight rows]
//! ```
//!
//! The weights stay row by row in memory: a task packs its own into the second-level cache, and each serves all rows of
//! x. Called by `linear` from `FEWEST_ROWS` rows on.

use std::arch::x86_64::*;
use std::cell::RefCell;
use std::ops::Range;
use std::sync::Mutex;

use super::native::padded;
use super::{DOT, Linear, PIECES};
use crate::lanes::{LANES, Lane, PAIRED};
use crate::{Element, Exec, Rows, RowsMut, bf16};

/// With fewer rows many lanes may be empty; at 32 rows the two loops are equally fast (Zen 4).
pub(super) const FEWEST_ROWS: usize = 33;
/// Rows of x that are packed at once: whole panels; more are slower, because they leave the second-level cache.
const BLOCK_ROWS: usize = 288;
/// Registers of rows in a panel: with 8 weight rows, 24 sums, 3 of x and a weight take 28 of 32 registers.
const PANEL: usize = 3;
/// Weight rows of a tile.
const TILE: usize = 8;
/// Weights of a task, packed: with a panel of x they stay in the second-level cache.
const PIECE_BYTES: usize = 320 << 10;

/// One pair of K of 16 rows, or 16 pairs of one row.
pub(super) type Pairs = __m512i;
/// Sums of a tile with a panel, some registers of it unused.
type Sums = [[__m512; PANEL]; TILE];

/// Halvings of LANES.
const LEVELS: usize = LANES.ilog2() as usize;

thread_local! {
    /// The caller's rows of x.
    static PACKED: RefCell<Vec<Pairs>> = const { RefCell::new(Vec::new()) };
    /// The weights of a task.
    static WEIGHTS: RefCell<Vec<[i32; TILE]>> = const { RefCell::new(Vec::new()) };
}

/// Rows of x that meet a weight together.
struct Panel<'a> {
    first: usize,
    /// Registers of rows.
    width: usize,
    /// [lane, chunk, width].
    pairs: &'a mut [Pairs],
}

/// `linear` of bf16 on a machine with AVX-512 BF16.
pub(super) fn compute<A: Element, W: Element>(exec: &Exec, args: &Linear<'_, A, W>, out: &RowsMut<'_, A>) {
    let (outputs, inputs) = (args.weight.rows, args.x.dim);
    let chunks = inputs.div_ceil(DOT * LANES).max(1);
    let threads = exec.threads.count();
    let pieces = (outputs * inputs * size_of::<bf16>()).div_ceil(PIECE_BYTES).next_multiple_of(threads);
    let groups = outputs.div_ceil(LANES);
    let pieces = pieces.max(threads * PIECES).min(groups);
    for start in (0..args.x.rows).step_by(BLOCK_ROWS) {
        let rows = start..args.x.rows.min(start + BLOCK_ROWS);
        PACKED.with_borrow_mut(|packed| {
            let panels = pack(exec, &args.x, rows.clone(), chunks, packed);
            exec.threads.run(pieces, rows.len() * outputs * inputs, |task| {
                let piece = groups * task / pieces * LANES..outputs.min(groups * (task + 1) / pieces * LANES);
                WEIGHTS.with_borrow_mut(|weights| {
                    // SAFETY: the caller's `Isa` says that the instructions were found.
                    #[allow(unsafe_code)]
                    unsafe {
                        compute_piece(args, &panels, chunks, piece, weights, out);
                    }
                });
            });
        });
    }
}

fn pack<'a, A: Element>(
    exec: &Exec,
    x: &Rows<'_, A>,
    rows: Range<usize>,
    chunks: usize,
    packed: &'a mut Vec<Pairs>,
) -> Vec<Panel<'a>> {
    let groups = rows.len().div_ceil(LANES);
    let count = groups.div_ceil(PANEL);
    // SAFETY: every bit pattern is a value of it.
    #[allow(unsafe_code)]
    packed.resize(groups * LANES * chunks, unsafe { std::mem::zeroed() });
    let mut rest = packed.as_mut_slice();
    let panels = (0..count).map(|i| {
        let (start, end) = (groups * i / count, groups * (i + 1) / count);
        let len = (end - start) * LANES * chunks;
        let pairs = rest.split_off_mut(..len).expect("the lengths add up");
        Mutex::new(Panel { first: rows.start + start * LANES, width: end - start, pairs })
    });
    let panels: Vec<_> = panels.collect();
    exec.threads.run(count, rows.len() * x.dim, |i| {
        let panel = &mut panels[i].lock().expect("each is locked once");
        // SAFETY: the caller's `Isa` says that the instructions were found.
        #[allow(unsafe_code)]
        unsafe {
            pack_panel(x, chunks, panel);
        }
    });
    panels.into_iter().map(|panel| panel.into_inner().expect("no task panicked")).collect()
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2")]
fn pack_panel<A: Element>(x: &Rows<'_, A>, chunks: usize, panel: &mut Panel<'_>) {
    for register in 0..panel.width {
        let first = panel.first + register * LANES;
        turn(x, &(first..x.rows.min(first + LANES)), |chunk, pairs| {
            for (at, &lane) in PAIRED.iter().enumerate() {
                panel.pairs[(at * chunks + chunk) * panel.width + register] = pairs[lane];
            }
        });
    }
}

/// Packs up to LANES weight rows into two tiles.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2")]
fn pack_tiles<W: Element>(weight: &Rows<'_, W>, rows: &Range<usize>, chunks: usize, tiles: &mut [[i32; TILE]]) {
    let (low, high) = tiles.split_at_mut(LANES * chunks);
    turn(weight, rows, |chunk, pairs| {
        for (at, &lane) in PAIRED.iter().enumerate() {
            // SAFETY: both are 64 bytes in which every bit pattern is a value.
            #[allow(unsafe_code)]
            let halves: [[i32; TILE]; 2] = unsafe { std::mem::transmute(pairs[lane]) };
            [low[at * chunks + chunk], high[at * chunks + chunk]] = halves;
        }
    });
}

/// The products of all rows of x with the weight rows of `piece`.
#[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512vl,avx2,fma")]
fn compute_piece<A: Element, W: Element>(
    args: &Linear<'_, A, W>,
    panels: &[Panel<'_>],
    chunks: usize,
    piece: Range<usize>,
    packed: &mut Vec<[i32; TILE]>,
    out: &RowsMut<'_, A>,
) {
    let group = 2 * LANES * chunks;
    packed.resize(piece.len().div_ceil(LANES) * group, [0; TILE]);
    let mut sums = [[[_mm512_setzero_ps(); PANEL]; TILE]; LEVELS];
    for (i, panel) in panels.iter().enumerate() {
        for (first, tiles) in piece.clone().step_by(LANES).zip(packed.chunks_exact_mut(group)) {
            let outputs = first..piece.end.min(first + LANES);
            // The first panel waits for memory less when the weights of the next tiles are fetched meanwhile.
            let next = if i == 0 { outputs.end..args.weight.rows.min(outputs.end + LANES) } else { 0..0 };
            if i == 0 {
                pack_tiles(&args.weight, &outputs, chunks, tiles);
            }
            match panel.width {
                1 => block::<A, W, 1>(args, panel, tiles, [outputs, next], &mut sums, out),
                2 => block::<A, W, 2>(args, panel, tiles, [outputs, next], &mut sums, out),
                _ => block::<A, W, PANEL>(args, panel, tiles, [outputs, next], &mut sums, out),
            }
        }
    }
}

/// The products of a panel with two tiles, the weight rows `outputs`; fetches the weight rows `next`.
#[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512vl,avx2,fma")]
fn block<A: Element, W: Element, const R: usize>(
    args: &Linear<'_, A, W>,
    panel: &Panel<'_>,
    tiles: &[[i32; TILE]],
    [outputs, next]: [Range<usize>; 2],
    waiting: &mut [Sums; LEVELS],
    out: &RowsMut<'_, A>,
) {
    let (x, _) = panel.pairs.as_chunks::<R>();
    for row in panel.first..args.x.rows.min(panel.first + R * LANES) {
        // SAFETY: tasks have distinct ranges of outputs.
        #[allow(unsafe_code)]
        fetch::<_MM_HINT_ET0, _>(unsafe { out.heads_mut(row, outputs.clone()) });
    }
    let mut sums = [[[_mm512_setzero_ps(); PANEL]; TILE]; 2];
    for (i, (tile, sums)) in tiles.chunks_exact(tiles.len() / 2).zip(&mut sums).enumerate() {
        let next = (next.start + i * TILE).min(next.end)..next.end;
        let mut ahead = [&[][..]; TILE];
        for (ahead, row) in ahead.iter_mut().zip(next) {
            *ahead = W::as_bf16(args.weight.row(row)).expect("the weights are bf16");
        }
        if args.invariant {
            add_tile::<R, true>(x, tile, ahead, waiting, sums);
        } else {
            add_tile::<R, false>(x, tile, ahead, waiting, sums);
        }
    }
    for register in 0..R {
        let mut columns = [_mm512_setzero_si512(); LANES];
        for (column, sums) in columns.iter_mut().zip(sums.as_flattened()) {
            *column = _mm512_castps_si512(sums[register]);
        }
        write_turned(args, panel.first + register * LANES, outputs.clone(), transpose(columns), out);
    }
}

/// Adds the bias and writes the sums of up to 16 rows of x, the first of which is row `first`, with the weight rows `outputs`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma")]
#[inline]
pub(super) fn write_turned<A: Element, W: Element>(
    args: &Linear<'_, A, W>,
    first: usize,
    outputs: Range<usize>,
    sums: [Pairs; LANES],
    out: &RowsMut<'_, A>,
) {
    let bias = args.bias.map_or(&[][..], |bias| &bias[outputs.clone()]);
    for (sums, row) in sums.iter().zip(first..args.x.rows) {
        // SAFETY: both are 64 bytes in which every bit pattern is a value.
        #[allow(unsafe_code)]
        let sums: &Lane = unsafe { &*std::ptr::from_ref(sums).cast() };
        // SAFETY: tasks have distinct ranges of outputs.
        #[allow(unsafe_code)]
        let target = unsafe { out.heads_mut(row, outputs.clone()) };
        if let (Ok(target), true) = (<&mut [A; LANES]>::try_from(&mut *target), bias.is_empty()) {
            *target = sums.map(A::from_f32);
        } else {
            let mut sums = *sums;
            sums.iter_mut().zip(bias).for_each(|(sum, bias)| *sum += bias.to_f32());
            target.iter_mut().zip(sums).for_each(|(target, sum)| *target = A::from_f32(sum));
        }
    }
}

/// `sums` of 8 weight rows with a panel; fetches the weights `ahead`, some lines at a time.
///
/// `BY_LANE`: lanes are added in pairs, pairs in pairs: at each level a sum is `waiting` for the other half. Otherwise
/// sums go on from lane to lane.
#[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512vl,avx2,fma")]
#[inline(never)] // so that each has the registers to itself
fn add_tile<const R: usize, const BY_LANE: bool>(
    x: &[[Pairs; R]],
    weights: &[[i32; TILE]],
    ahead: [&[bf16]; TILE],
    waiting: &mut [Sums; LEVELS],
    sums: &mut Sums,
) {
    let chunks = weights.len() / LANES;
    let mut acc = [[_mm512_setzero_ps(); R]; TILE];
    for (at, (x, weights)) in x.chunks_exact(chunks).zip(weights.chunks_exact(chunks)).enumerate() {
        for line in ahead[at / 2].chunks(DOT * LANES).skip(at % 2).step_by(2) {
            fetch::<_MM_HINT_T1, _>(line);
        }
        if BY_LANE {
            acc = [[_mm512_setzero_ps(); R]; TILE];
        }
        for (x, weights) in x.iter().zip(weights) {
            for (acc, &weight) in acc.iter_mut().zip(weights) {
                let weight = pairs(_mm512_set1_epi32(weight));
                for (acc, &x) in acc.iter_mut().zip(x) {
                    *acc = _mm512_dpbf16_ps(*acc, weight, pairs(x));
                }
            }
        }
        if !BY_LANE {
            continue;
        }
        let mut level = 0;
        while at >> level & 1 == 1 {
            for (acc, waiting) in acc.iter_mut().zip(&waiting[level]) {
                for (acc, waiting) in acc.iter_mut().zip(waiting) {
                    *acc = _mm512_add_ps(*waiting, *acc);
                }
            }
            level += 1;
        }
        if let Some(waiting) = waiting.get_mut(level) {
            for (waiting, acc) in waiting.iter_mut().zip(acc) {
                waiting[..R].copy_from_slice(&acc);
            }
        }
    }
    for (sums, acc) in sums.iter_mut().zip(acc) {
        sums[..R].copy_from_slice(&acc);
    }
}

/// Asks for the line in which `values` begin.
#[inline(always)]
fn fetch<const HINT: i32, E>(values: &[E]) {
    // SAFETY: a prefetch changes nothing that the program can see.
    #[allow(unsafe_code)]
    unsafe {
        _mm_prefetch::<HINT>(values.as_ptr().cast());
    }
}

#[inline(always)]
fn pairs(pairs: Pairs) -> __m512bh {
    // SAFETY: both are 64 bytes in which every bit pattern is a value.
    #[allow(unsafe_code)]
    unsafe {
        std::mem::transmute(pairs)
    }
}

/// Calls `put` with each chunk of K of up to 16 rows, turned: the pairs of one lane together; the last ends in zeros.
#[target_feature(enable = "avx512f,avx512vl,avx2")]
#[inline]
pub(super) fn turn<E: Element>(values: &Rows<'_, E>, rows: &Range<usize>, mut put: impl FnMut(usize, [Pairs; LANES])) {
    // The last row stands for those that do not exist: nobody looks at its products there.
    let row = |i: usize| E::as_bf16(values.row((rows.start + i).min(rows.end - 1))).expect("both sides are bf16");
    let rows: [(&[_], &[_]); LANES] = std::array::from_fn(|i| row(i).as_chunks::<{ DOT * LANES }>());
    let mut pairs = [_mm512_setzero_si512(); LANES];
    for chunk in 0..rows[0].0.len() {
        for i in 0..LANES {
            pairs[i] = register(&rows[i].0[chunk]);
        }
        put(chunk, transpose(pairs));
    }
    if rows[0].0.is_empty() || !rows[0].1.is_empty() {
        for i in 0..LANES {
            pairs[i] = register(&padded(rows[i].1));
        }
        put(rows[0].0.len(), transpose(pairs));
    }
}

#[inline(always)]
fn register(pairs: &[bf16; DOT * LANES]) -> Pairs {
    // SAFETY: both are 64 bytes in which every bit pattern is a value.
    #[allow(unsafe_code)]
    unsafe {
        std::mem::transmute_copy(pairs)
    }
}

/// [i][j] becomes [j][i]: quarters of four rows are turned within themselves, then quarters change places.
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn transpose(rows: [__m512i; LANES]) -> [__m512i; LANES] {
    let mut quarters = rows;
    for (quarter, r) in quarters.chunks_exact_mut(4).zip(rows.chunks_exact(4)) {
        let (a, b) = (_mm512_unpacklo_epi32(r[0], r[1]), _mm512_unpackhi_epi32(r[0], r[1]));
        let (c, d) = (_mm512_unpacklo_epi32(r[2], r[3]), _mm512_unpackhi_epi32(r[2], r[3]));
        quarter[0] = _mm512_unpacklo_epi64(a, c);
        quarter[1] = _mm512_unpackhi_epi64(a, c);
        quarter[2] = _mm512_unpacklo_epi64(b, d);
        quarter[3] = _mm512_unpackhi_epi64(b, d);
    }
    let mut columns = rows;
    for j in 0..4 {
        let (p, q, r, s) = (quarters[j], quarters[4 + j], quarters[8 + j], quarters[12 + j]);
        let (even, odd) = (_mm512_shuffle_i32x4::<0x88>(p, q), _mm512_shuffle_i32x4::<0xdd>(p, q));
        let (even_high, odd_high) = (_mm512_shuffle_i32x4::<0x88>(r, s), _mm512_shuffle_i32x4::<0xdd>(r, s));
        columns[j] = _mm512_shuffle_i32x4::<0x88>(even, even_high);
        columns[4 + j] = _mm512_shuffle_i32x4::<0x88>(odd, odd_high);
        columns[8 + j] = _mm512_shuffle_i32x4::<0xdd>(even, even_high);
        columns[12 + j] = _mm512_shuffle_i32x4::<0xdd>(odd, odd_high);
    }
    columns
}

//! `sample`: one token per row of logits, greedy or a seeded draw from the filtered softmax.
//!
//! Twin of `kernels/sampling`; noise is the same function of (seed, position, id). Thresholds come from a selection, not a
//! sort. Noise is made only where it could still win: its integer bounds it, and ids with no chance are passed over. Tasks
//! are rows, so a row's token depends on nothing but that row.

use std::cell::RefCell;
use std::sync::atomic::{AtomicI32, Ordering};

use crate::error::expect_len;
use crate::isa::by_isa;
use crate::lanes::{LANES, exp};
use crate::{Element, Error, Exec, Rows};

/// Multiply-adds that a look at one logit costs.
const LOOK_WORK: usize = 2;
/// Largest logits that top-p sorts at first; sixteen times as many while they hold too little.
const FIRST_WIDTH: usize = 256;
/// More than rounding can add to the bound of the noise.
const MARGIN: f32 = 1e-2;
/// One per word of a key: fractional bits of the golden ratio and of pi.
const STREAMS: [u32; 2] = [0x9E37_79B9, 0x243F_6A88];

/// Arguments of `sample`, one per row.
#[derive(Clone, Copy, Debug)]
pub struct Sampling<'a> {
    /// 0 = greedy.
    pub temperature: &'a [f32],
    /// Keeps logits not below the k-th largest; below 1 = all.
    pub top_k: &'a [i32],
    /// Share of the rest that the kept most likely ids must reach; from 1 on = all.
    pub top_p: &'a [f32],
    /// Probability over that of the most likely id below which ids go; 0 = none.
    pub min_p: &'a [f32],
    /// Of the choice.
    pub seed: &'a [i64],
    /// Of the token in its output.
    pub position: &'a [i64],
}

/// Writes `token` [N] for `logits` [N, 1, V]; -1 for a row with a NaN or without a finite maximum.
///
/// Ties go to the lowest id. Cost O(V) a row. Errors before anything is written when lengths disagree.
pub fn sample<E: Element>(
    exec: &Exec,
    logits: &Rows<'_, E>,
    args: &Sampling<'_>,
    token: &mut [i32],
) -> Result<(), Error> {
    for (name, found) in [
        ("length of temperature", args.temperature.len()),
        ("length of top_k", args.top_k.len()),
        ("length of top_p", args.top_p.len()),
        ("length of min_p", args.min_p.len()),
        ("length of seed", args.seed.len()),
        ("length of position", args.position.len()),
        ("length of token", token.len()),
    ] {
        expect_len(name, found, logits.rows)?;
    }
    let found: Vec<AtomicI32> = token.iter().map(|_| AtomicI32::new(-1)).collect();
    exec.threads.run(logits.rows, logits.rows * logits.row_len() * LOOK_WORK, |row| {
        SCRATCH.with_borrow_mut(|scratch| sample_row(exec.isa, logits.row(row), args, row, scratch, &found[row]));
    });
    for (token, found) in token.iter_mut().zip(found) {
        *token = found.into_inner();
    }
    Ok(())
}

/// Buffers of one thread.
#[derive(Default)]
struct Scratch {
    /// (logit - largest) / temperature of every id; -infinity where top-k dropped it.
    scaled: Vec<f32>,
    /// What a selection shuffles.
    chosen: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

by_isa!(sample_row<E> = row_body(
    logits: &[E],
    args: &Sampling<'_>,
    row: usize,
    scratch: &mut Scratch,
    token: &AtomicI32,
));

#[inline(always)]
fn row_body<E: Element, const FUSED: bool>(
    logits: &[E],
    args: &Sampling<'_>,
    row: usize,
    scratch: &mut Scratch,
    token: &AtomicI32,
) {
    let Some(largest) = sound_maximum(logits) else { return };
    let best = logits.iter().position(|x| x.to_f32() == largest).expect("the maximum is one of them");
    let temperature = args.temperature[row];
    let id = if temperature > 0.0 { draw::<E, FUSED>(logits, (largest, best), args, row, scratch) } else { best };
    token.store(id as i32, Ordering::Relaxed);
}

/// The largest logit, if it is finite and none is NaN.
#[inline(always)]
fn sound_maximum<E: Element>(logits: &[E]) -> Option<f32> {
    let (chunks, rest) = logits.as_chunks::<LANES>();
    let mut top = [f32::NEG_INFINITY; LANES];
    let mut faulty = [0u32; LANES];
    let look = |top: &mut f32, faulty: &mut u32, x: f32| {
        *faulty |= u32::from(x.is_nan());
        *top = if x > *top { x } else { *top };
    };
    for chunk in chunks {
        for ((top, faulty), x) in top.iter_mut().zip(&mut faulty).zip(chunk) {
            look(top, faulty, x.to_f32());
        }
    }
    for x in rest {
        look(&mut top[0], &mut faulty[0], x.to_f32());
    }
    let top = top.into_iter().fold(f32::NEG_INFINITY, f32::max);
    (top.is_finite() && faulty.iter().all(|&faulty| faulty == 0)).then_some(top)
}

/// The id with the largest scaled logit plus noise among those that the filters keep; `best` always is.
#[inline(always)]
fn draw<E: Element, const FUSED: bool>(
    logits: &[E],
    (largest, best): (f32, usize),
    args: &Sampling<'_>,
    row: usize,
    Scratch { scaled, chosen }: &mut Scratch,
) -> usize {
    let (temperature, top_k) = (args.temperature[row], usize::try_from(args.top_k[row]).unwrap_or(0));
    let mut floor = f32::NEG_INFINITY;
    if top_k > 0 && top_k < logits.len() {
        chosen.clear();
        chosen.extend(logits.iter().map(|x| x.to_f32()));
        floor = *chosen.select_nth_unstable_by(top_k - 1, |a, b| b.total_cmp(a)).1;
    }
    scaled.clear();
    scaled.extend(logits.iter().map(|x| {
        let x = x.to_f32();
        if x >= floor { (x - largest) / temperature } else { f32::NEG_INFINITY }
    }));
    let mut floor = args.min_p[row].ln();
    if args.top_p[row] < 1.0 {
        floor = floor.max(top_p_floor::<FUSED>(scaled, args.top_p[row], chosen));
    }
    let keys = STREAMS.map(|stream| noise_key(args.seed[row], args.position[row], stream));
    let mut winner = (noise(hash(best, keys)), best);
    for (id, &x) in scaled.iter().enumerate() {
        if x < floor || x + NOISE_MAX < winner.0 {
            continue;
        }
        let hash = hash(id, keys);
        if x + noise_bound(hash) < winner.0 {
            continue;
        }
        let score = x + noise(hash);
        if score > winner.0 || score == winner.0 && id < winner.1 {
            winner = (score, id);
        }
    }
    winner.1
}

/// The smallest of the largest values whose share of the mass e^x first reaches `top_p`.
#[inline(always)]
fn top_p_floor<const FUSED: bool>(scaled: &[f32], top_p: f32, chosen: &mut Vec<f32>) -> f32 {
    let (chunks, rest) = scaled.as_chunks::<LANES>();
    let mut sums = [0.0f64; LANES];
    for chunk in chunks {
        for (sum, &x) in sums.iter_mut().zip(chunk) {
            *sum += f64::from(exp::<FUSED>(x));
        }
    }
    let rest: f64 = rest.iter().map(|&x| f64::from(exp::<FUSED>(x))).sum();
    let goal = (sums.iter().sum::<f64>() + rest) * f64::from(top_p);
    chosen.clear();
    chosen.extend_from_slice(scaled);
    let mut width = FIRST_WIDTH.min(chosen.len());
    loop {
        if width < chosen.len() {
            chosen.select_nth_unstable_by(width - 1, |a, b| b.total_cmp(a));
        }
        let largest = &mut chosen[..width];
        largest.sort_unstable_by(|a, b| b.total_cmp(a));
        let mut mass = 0.0;
        let reached = largest.iter().find(|&&x| {
            mass += f64::from(exp::<FUSED>(x));
            mass >= goal
        });
        match reached {
            Some(&floor) => return floor,
            None if width == scaled.len() => return largest[width - 1],
            None => width = (width * 16).min(scaled.len()),
        }
    }
}

/// A 32-bit finaliser: lowbias32 of C. Wellons' hash prospector.
#[inline(always)]
fn mix(mut x: u32) -> u32 {
    x = (x ^ x >> 16).wrapping_mul(0x7FEB_352D);
    x = (x ^ x >> 15).wrapping_mul(0x846C_A68B);
    x ^ x >> 16
}

fn noise_key(seed: i64, position: i64, stream: u32) -> u32 {
    let words = [seed as u32, (seed >> 32) as u32, position as u32, (position >> 32) as u32];
    words.into_iter().fold(stream, |state, word| mix(state ^ word))
}

/// 31 bits for one id of one row.
#[inline(always)]
fn hash(id: usize, keys: [u32; 2]) -> u32 {
    mix(mix(id as u32 ^ keys[0]) ^ keys[1]) >> 1
}

/// Standard Gumbel noise of a hash: -ln E, E = -ln(1 - v) exponential for v uniform in (0, 1). Small v make the largest
/// noise, so below 1/64 a series keeps their precision.
#[inline(always)]
fn noise(hash: u32) -> f32 {
    let v = ((hash as f32 + 0.5) * (-31f32).exp2()).min(1.0 - (-24f32).exp2());
    let series = v * (1.0 + v * (0.5 + v * (1.0 / 3.0 + v * 0.25)));
    let e = if v < 1.0 / 64.0 { series } else { -(1.0 - v).ln() };
    -e.ln()
}

/// At least `noise(hash)`: E is above v, and the leading zeros of the hash say how small v can be.
#[inline(always)]
fn noise_bound(hash: u32) -> f32 {
    hash.leading_zeros() as f32 * std::f32::consts::LN_2 + MARGIN
}

/// At least every noise.
const NOISE_MAX: f32 = 32.0 * std::f32::consts::LN_2 + MARGIN;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_noise_is_above_its_bound() {
        let edges = (0..31).flat_map(|bit| [1u32 << bit, (1 << bit) - 1, (1 << bit) + 1]);
        let spread = (0..200_000u32).map(|i| mix(i) >> 1);
        for hash in edges.chain(spread).chain([(1 << 31) - 1]) {
            let noise = noise(hash);
            assert!(noise <= noise_bound(hash) - MARGIN / 2.0, "{hash}: {noise} above {}", noise_bound(hash));
            assert!(noise.is_finite() && noise < NOISE_MAX);
        }
    }
}

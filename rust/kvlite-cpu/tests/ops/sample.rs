//! `sample` against a sort in f64 that makes noise for every kept id.

use kvlite_cpu::{Element, Error, Exec, Rows, Sampling, bf16, f16, sample};

use crate::oracle::{Rng, every_isa};

const VOCAB: usize = 5003;
/// Two scores that are nearer than rounding may come in either order.
const NEAR: f64 = 1e-5;

/// Filters and temperature of one row.
#[derive(Clone, Copy, Debug)]
struct Choice {
    temperature: f32,
    top_k: i32,
    top_p: f32,
    min_p: f32,
}

const CHOICES: [Choice; 9] = [
    Choice { temperature: 0.0, top_k: 3, top_p: 0.5, min_p: 0.5 },
    Choice { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 },
    Choice { temperature: 30.0, top_k: 0, top_p: 1.0, min_p: 0.0 },
    Choice { temperature: 0.7, top_k: 40, top_p: 1.0, min_p: 0.0 },
    Choice { temperature: 0.7, top_k: -1, top_p: 0.9, min_p: 0.0 },
    Choice { temperature: 50.0, top_k: 0, top_p: 0.7, min_p: 0.0 }, // more than the first width reach the share
    Choice { temperature: 50.0, top_k: 4000, top_p: 0.999, min_p: 0.0 },
    Choice { temperature: 2.0, top_k: 0, top_p: 1.0, min_p: 0.3 },
    Choice { temperature: 3.0, top_k: 500, top_p: 0.0, min_p: 1.0 },
];

fn mix(mut x: u32) -> u32 {
    x = (x ^ x >> 16).wrapping_mul(0x7FEB_352D);
    x = (x ^ x >> 15).wrapping_mul(0x846C_A68B);
    x ^ x >> 16
}

fn gumbel(id: usize, seed: i64, position: i64) -> f64 {
    let words = [seed as u32, (seed >> 32) as u32, position as u32, (position >> 32) as u32];
    let [a, b] = [0x9E37_79B9, 0x243F_6A88].map(|stream| words.iter().fold(stream, |key, word| mix(key ^ word)));
    let v = ((f64::from(mix(mix(id as u32 ^ a) ^ b) >> 1) + 0.5) / 2f64.powi(31)).min(1.0 - 2f64.powi(-24));
    -(-(-v).ln_1p()).ln()
}

/// Score of every id that the filters keep, -infinity of the others.
fn scores(logits: &[f64], choice: Choice, seed: i64, position: i64) -> Vec<f64> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    let largest = logits[order[0]];
    let x = |id: usize| (logits[id] - largest) / f64::from(choice.temperature);
    if choice.top_k > 0 && (choice.top_k as usize) < order.len() {
        let last = logits[order[choice.top_k as usize - 1]];
        order.retain(|&id| logits[id] >= last);
    }
    if choice.top_p < 1.0 {
        let goal = order.iter().map(|&id| x(id).exp()).sum::<f64>() * f64::from(choice.top_p);
        let mut mass = 0.0;
        let reached = order.iter().find(|&&id| {
            mass += x(id).exp();
            mass >= goal
        });
        let last = logits[*reached.unwrap_or(&order[order.len() - 1])];
        order.retain(|&id| logits[id] >= last);
    }
    order.retain(|&id| x(id) >= f64::from(choice.min_p).ln());
    let mut scores = vec![f64::NEG_INFINITY; logits.len()];
    for id in order {
        scores[id] = x(id) + gumbel(id, seed, position);
    }
    scores
}

fn run<E: Element>(exec: &Exec, logits: &[E], stride: usize, choices: &[Choice], seed: i64) -> Vec<i32> {
    let mut token = vec![i32::MIN; choices.len()];
    let rows = Rows::new("logits", logits, [choices.len(), 1, VOCAB], stride).expect("fits");
    let of = |field: fn(&Choice) -> f32| choices.iter().map(field).collect::<Vec<_>>();
    let position: Vec<i64> = (0..choices.len() as i64).map(|row| row << 33 | 7).collect();
    let args = Sampling {
        temperature: &of(|c| c.temperature),
        top_k: &choices.iter().map(|c| c.top_k).collect::<Vec<_>>(),
        top_p: &of(|c| c.top_p),
        min_p: &of(|c| c.min_p),
        seed: &vec![seed; choices.len()],
        position: &position,
    };
    sample(exec, &rows, &args, &mut token).expect("valid");
    token
}

fn check<E: Element>() {
    let (mut rng, stride) = (Rng::new(3), VOCAB + 5);
    let logits: Vec<E> = (0..CHOICES.len() * stride).map(|_| E::from_f32(rng.unit() * 12.0)).collect();
    for exec in every_isa() {
        for seed in [0, -5, 1 << 40] {
            let tokens = run(&exec, &logits, stride, &CHOICES, seed);
            for (row, (&token, &choice)) in tokens.iter().zip(&CHOICES).enumerate() {
                let line: Vec<f64> = logits[row * stride..][..VOCAB].iter().map(|x| f64::from(x.to_f32())).collect();
                let scores =
                    if choice.temperature > 0.0 { scores(&line, choice, seed, (row as i64) << 33 | 7) } else { line };
                let best = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                assert!(scores[token as usize] >= best - NEAR, "{:?} row {row}, seed {seed}: {choice:?}", exec.isa);
                if choice.temperature == 0.0 {
                    assert_eq!(token as usize, scores.iter().position(|&x| x == best).expect("it is there"));
                }
            }
        }
    }
}

#[test]
fn tokens_are_those_of_a_sort_with_noise_for_every_id() {
    check::<f32>();
    check::<bf16>();
    check::<f16>();
}

#[test]
fn faulty_rows_give_minus_one_and_a_lone_number_gives_itself() {
    let mut logits = vec![f32::NEG_INFINITY; 4 * VOCAB];
    logits[VOCAB - 1] = f32::NAN;
    logits[VOCAB + 17] = f32::INFINITY;
    logits[3 * VOCAB + 4321] = -3.0;
    for exec in every_isa() {
        for choice in [CHOICES[0], CHOICES[1], CHOICES[4], CHOICES[6]] {
            assert_eq!(run(&exec, &logits, VOCAB, &[choice; 4], 1), [-1, -1, -1, 4321]);
        }
    }
}

#[test]
fn lengths_that_disagree_are_named_and_nothing_is_written() {
    let (logits, mut token) = ([0.0f32; 6], [7; 2]);
    let rows = Rows::new("logits", &logits, [2, 1, 3], 3).expect("fits");
    let args = Sampling {
        temperature: &[0.0; 2],
        top_k: &[0; 2],
        top_p: &[1.0; 2],
        min_p: &[0.0; 3],
        seed: &[0; 2],
        position: &[0; 2],
    };
    let error = sample(&Exec::detect(1), &rows, &args, &mut token).expect_err("three for two rows");
    assert_eq!(error, Error::Shape { name: "length of min_p", found: 3, expected: 2 });
    assert_eq!(token, [7; 2]);
}

//! `rms_norm`, `add_rms_norm`, `rope` and `silu_mul` against f64 on every instruction set, in place and in strided views.

use std::cell::Cell;

use kvlite_cpu::{Element, Error, Exec, Rows, RowsCells, add_rms_norm, bf16, f16, rms_norm, rope, silu_mul};

use crate::oracle::{Rng, every_isa};

/// Between rows.
const GAP: usize = 3;
/// Of an input that is worth waking a thread for, whichever the op.
const ROWS: usize = 397;

fn random<E: Element>(rows: usize, len: usize, seed: u64) -> Vec<E> {
    let mut rng = Rng::new(seed);
    let mut values = vec![E::from_f32(f32::NAN); rows * (len + GAP)];
    for row in values.chunks_exact_mut(len + GAP) {
        row[..len].fill_with(|| E::from_f32(2.0 * rng.unit()));
    }
    values
}

fn cells<E: Element>(values: &mut [E], shape: [usize; 3]) -> RowsCells<'_, E> {
    let cells = Cell::from_mut(values).as_slice_of_cells();
    RowsCells::new("x", cells, shape, shape[1] * shape[2] + GAP).expect("fits")
}

fn near(got: impl Element, expected: f64, tolerance: f64) -> bool {
    (f64::from(got.to_f32()) - expected).abs() <= tolerance * expected.abs().max(0.1)
}

fn check_norm<E: Element>(tolerance: f64) {
    for exec in every_isa() {
        for (rows, heads, dim) in [(1, 1, 1), (3, 2, 16), (2, 1, 100), (4, 3, 37), (1, 1, 1024)] {
            let (x, residual) = (random::<E>(rows, heads * dim, 1), random::<E>(rows, heads * dim, 2));
            let weight = random::<E>(1, dim, 3)[..dim].to_vec();
            let (shape, stride) = ([rows, heads, dim], heads * dim + GAP);
            for with_residual in [false, true] {
                let (mut x, mut residual, mut out) =
                    (x.clone(), residual.clone(), vec![E::from_f32(f32::NAN); x.len()]);
                let before = (x.clone(), residual.clone());
                {
                    let (x, residual, out) =
                        (cells(&mut x, shape), cells(&mut residual, shape), cells(&mut out, shape));
                    if with_residual {
                        add_rms_norm(&exec, &x, &residual, &weight, 1e-5, &out).expect("valid");
                    } else {
                        rms_norm(&exec, &x, &weight, 1e-5, &out).expect("valid");
                    }
                }
                for (row, head) in (0..rows).flat_map(|row| (0..heads).map(move |head| (row, head))) {
                    let at = |d: usize| row * stride + head * dim + d;
                    let input = |d: usize| {
                        let x = before.0[at(d)].to_f32();
                        let sum = if with_residual { E::from_f32(before.1[at(d)].to_f32() + x).to_f32() } else { x };
                        f64::from(sum)
                    };
                    let squares: f64 = (0..dim).map(|d| input(d) * input(d)).sum();
                    let inverse = 1.0 / (squares / dim as f64 + 1e-5).sqrt();
                    for d in 0..dim {
                        let expected = input(d) * inverse * f64::from(weight[d].to_f32());
                        assert!(near(out[at(d)], expected, tolerance), "{:?} {shape:?} [{row}, {head}, {d}]", exec.isa);
                        assert!(!with_residual || f64::from(residual[at(d)].to_f32()) == input(d));
                    }
                }
                assert!(out.chunks(stride).all(|row| row[heads * dim..].iter().all(|x| x.to_f32().is_nan())));
                if !with_residual {
                    let view = cells(&mut x, shape);
                    rms_norm(&exec, &view, &weight, 1e-5, &view).expect("valid");
                    assert!(x.iter().zip(&out).all(|(a, b)| a.to_f32().to_bits() == b.to_f32().to_bits()), "in place");
                }
            }
        }
    }
}

#[test]
fn norms_equal_the_oracle_in_place_and_with_a_residual() {
    check_norm::<f32>(1e-6);
    check_norm::<bf16>(1.2e-2);
    check_norm::<f16>(1.5e-3);
}

fn check_rope<E: Element>(tolerance: f64) {
    for exec in every_isa() {
        for (heads, kv_heads, dim, half) in [(2, 1, 8, 4), (3, 3, 40, 13), (4, 2, 64, 32)] {
            let (rows, width) = (3, (heads + kv_heads) * dim);
            let mut qk = random::<E>(rows, width, 5);
            let before = qk.clone();
            let (cos, sin) = (random::<f32>(9, half, 6), random::<f32>(9, half, 7));
            let positions = [8, 0, 5];
            let table = |values| Rows::new("cos", values, [9, 1, half], half + GAP).expect("fits");
            {
                let all = Cell::from_mut(&mut qk[..]).as_slice_of_cells();
                let q = RowsCells::new("q", all, [rows, heads, dim], width + GAP).expect("fits");
                let k = RowsCells::new("k", &all[heads * dim..], [rows, kv_heads, dim], width + GAP).expect("fits");
                rope(&exec, &q, &k, &positions, &table(&cos), &table(&sin)).expect("valid");
            }
            for (i, (&got, &old)) in qk.iter().zip(&before).enumerate() {
                let (row, column) = (i / (width + GAP), i % (width + GAP));
                let (d, start) = (column % dim, i - column % dim);
                if column >= width || d >= 2 * half {
                    assert_eq!(got.to_f32().to_bits(), old.to_f32().to_bits(), "{i} is not rotated");
                    continue;
                }
                let at = positions[row] as usize * (half + GAP) + d % half;
                let (c, s) = (f64::from(cos[at]), f64::from(sin[at]));
                let (low, high) = (before[start + d % half], before[start + d % half + half]);
                let (low, high) = (f64::from(low.to_f32()), f64::from(high.to_f32()));
                let expected = if d < half { low * c - high * s } else { high * c + low * s };
                assert!(near(got, expected, tolerance), "{:?} row {row} column {column}", exec.isa);
            }
        }
    }
}

#[test]
fn heads_of_a_fused_matrix_are_rotated_in_place() {
    check_rope::<f32>(1e-5);
    check_rope::<bf16>(5e-3);
    check_rope::<f16>(1e-3);
}

fn check_gate<E: Element>(tolerance: f64) {
    for exec in every_isa() {
        for (rows, width) in [(1, 1), (3, 37), (2, 64)] {
            let mut gate_up = random::<E>(rows, 2 * width, 8);
            gate_up[0] = E::from_f32(-120.0);
            let mut out = vec![E::from_f32(f32::NAN); rows * (width + GAP)];
            let input = Rows::new("gate_up", &gate_up, [rows, 1, 2 * width], 2 * width + GAP).expect("fits");
            silu_mul(&exec, &input, &cells(&mut out, [rows, 1, width])).expect("valid");
            for (row, column) in (0..rows).flat_map(|row| (0..width).map(move |column| (row, column))) {
                let at = row * (2 * width + GAP) + column;
                let (gate, up) = (f64::from(gate_up[at].to_f32()), f64::from(gate_up[at + width].to_f32()));
                let expected = gate / (1.0 + (-gate).exp()) * up;
                assert!(near(out[row * (width + GAP) + column], expected, tolerance), "{:?} {row} {column}", exec.isa);
            }
            assert!(out.chunks(width + GAP).all(|row| row[width..].iter().all(|x| x.to_f32().is_nan())));
        }
    }
}

#[test]
fn gates_equal_the_oracle_down_to_gates_whose_exponential_overflows() {
    check_gate::<f32>(1e-6);
    check_gate::<bf16>(5e-3);
    check_gate::<f16>(1e-3);
}

/// Of one thread, and of as many as `threads`, which take rows of one matrix in any order.
fn of_threads(op: impl Fn(&Exec, &[Cell<f32>], &[Cell<f32>])) {
    let run = |threads: usize| {
        let (mut x, mut y) = (random::<f32>(ROWS, 1024, 11), random::<f32>(ROWS, 1024, 12));
        let cells = |values| Cell::from_mut(values).as_slice_of_cells();
        op(&Exec::detect(threads), cells(&mut x[..]), cells(&mut y[..]));
        [x, y].concat().into_iter().map(f32::to_bits).collect::<Vec<_>>()
    };
    let alone = run(1);
    for threads in [2, 5] {
        assert!(run(threads) == alone, "{threads} threads");
    }
}

#[test]
fn threads_that_share_the_rows_change_no_bit_and_leave_out_none() {
    fn view(cells: &[Cell<f32>], shape: [usize; 3]) -> RowsCells<'_, f32> {
        RowsCells::new("x", cells, shape, 1024 + GAP).expect("fits")
    }
    let weight: Vec<f32> = random(1, 1024, 13);
    of_threads(|exec, x, y| {
        let (x, y) = (view(x, [ROWS, 1, 1024]), view(y, [ROWS, 1, 1024]));
        add_rms_norm(exec, &x, &y, &weight[..1024], 1e-5, &x).expect("valid");
        rms_norm(exec, &x, &weight[..1024], 1e-5, &x).expect("valid");
    });
    of_threads(|exec, x, y| {
        // Each row is written to the next one's place: one thread must compute them in order.
        let (low, next) = (view(x, [ROWS - 1, 1, 1024]), view(&x[1024 + GAP..], [ROWS - 1, 1, 1024]));
        rms_norm(exec, &low, &weight[..1024], 1e-5, &next).expect("valid");
        rms_norm(exec, &view(y, [ROWS, 1, 1024]), &weight[..1024], 1e-5, &view(y, [ROWS, 1, 1024])).expect("valid");
    });
    let angles: Vec<f32> = random(ROWS, 32, 14);
    let table = Rows::new("cos", &angles, [ROWS, 1, 32], 32 + GAP).expect("fits");
    let positions: Vec<i32> = (0..ROWS as i32).rev().collect();
    of_threads(|exec, x, _| {
        let (q, k) = (view(x, [ROWS, 12, 64]), view(&x[12 * 64..], [ROWS, 4, 64]));
        rope(exec, &q, &k, &positions, &table, &table).expect("valid");
    });
    of_threads(|exec, x, y| {
        let input: Vec<f32> = x.iter().map(Cell::get).collect();
        let gate_up = Rows::new("gate_up", &input, [ROWS, 1, 1024], 1024 + GAP).expect("fits");
        silu_mul(exec, &gate_up, &view(y, [ROWS, 1, 512])).expect("valid");
    });
}

#[test]
fn shapes_and_positions_that_do_not_fit_are_refused_before_anything_is_written() {
    let exec = &Exec::detect(1);
    let (mut x, mut y) = (vec![1.0f32; 32], vec![f32::NAN; 32]);
    let table = vec![1.0f32; 8];
    let view = |values| RowsCells::new("x", Cell::from_mut(values).as_slice_of_cells(), [2, 2, 8], 16).expect("fits");
    let (a, b) = (view(&mut x[..]), view(&mut y[..]));
    let cos = Rows::new("cos", &table, [2, 1, 4], 4).expect("fits");
    let wide = Rows::new("cos", &table, [1, 1, 8], 8).expect("fits");
    for error in [
        rms_norm(exec, &a, &[1.0; 7], 1e-5, &b).expect_err("weight"),
        rope(exec, &b, &b, &[0], &cos, &cos).expect_err("positions"),
        rope(exec, &b, &b, &[0, 0], &wide, &wide).expect_err("cos"),
        silu_mul(exec, &Rows::new("gate_up", &table, [1, 1, 8], 8).expect("fits"), &b).expect_err("gate_up"),
    ] {
        assert!(matches!(error, Error::Shape { .. }), "{error}");
    }
    for value in [2, -1] {
        let error = rope(exec, &b, &b, &[0, value], &cos, &cos).expect_err("outside the tables");
        assert_eq!(error, Error::Position { token: 1, value, positions: 2 });
    }
    assert!(y.iter().all(|x| x.is_nan()));
    let overlapping = RowsCells::new("x", Cell::from_mut(&mut x[..]).as_slice_of_cells(), [2, 2, 8], 15);
    assert!(matches!(overlapping, Err(Error::Extent { name: "x", .. })));
}

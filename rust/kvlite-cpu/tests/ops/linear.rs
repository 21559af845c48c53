//! `linear` against f64 on every instruction set, and its law: a row's bits depend on that row alone.

use kvlite_cpu::{Element, Error, Exec, Isa, Linear, Rows, RowsMut, Threads, bf16, f16, linear};

use crate::oracle::{Rng, bits, every_isa};

/// Between rows of x, weight and out.
const GAP: usize = 3;

struct Problem<A, W> {
    rows: usize,
    inputs: usize,
    outputs: usize,
    x: Vec<A>,
    weight: Vec<W>,
    bias: Option<Vec<W>>,
}

fn poisoned<E: Element>(rows: usize, len: usize, mut value: impl FnMut() -> f32) -> Vec<E> {
    let mut values = vec![E::from_f32(f32::NAN); rows * (len + GAP)];
    values.chunks_exact_mut(len + GAP).for_each(|row| row[..len].fill_with(|| E::from_f32(value())));
    values
}

impl<A: Element, W: Element> Problem<A, W> {
    fn new(rows: usize, inputs: usize, outputs: usize, biased: bool) -> Self {
        let mut rng = Rng::new((rows * 31 + inputs * 7 + outputs) as u64);
        let x = poisoned(rows, inputs, || rng.unit());
        let weight = poisoned(outputs, inputs, || rng.unit());
        let bias = biased.then(|| (0..outputs).map(|_| W::from_f32(rng.unit())).collect());
        Problem { rows, inputs, outputs, x, weight, bias }
    }

    fn args(&self) -> Linear<'_, A, W> {
        Linear {
            x: Rows::new("x", &self.x, [self.rows, 1, self.inputs], self.inputs + GAP).expect("fits"),
            weight: Rows::new("weight", &self.weight, [self.outputs, 1, self.inputs], self.inputs + GAP).expect("fits"),
            bias: self.bias.as_deref(),
            invariant: true,
        }
    }

    fn run(&self, exec: &Exec) -> Vec<A> {
        self.run_as(exec, true)
    }

    /// [rows, outputs + GAP].
    fn run_as(&self, exec: &Exec, invariant: bool) -> Vec<A> {
        let mut out = vec![A::from_f32(f32::NAN); self.rows * (self.outputs + GAP)];
        let mut view = RowsMut::new("out", &mut out, [self.rows, self.outputs, 1], self.outputs + GAP).expect("fits");
        linear(exec, &Linear { invariant, ..self.args() }, &mut view).expect("valid arguments");
        out
    }

    /// `tolerance` is relative to the sum of the products' sizes.
    fn check(&self, exec: &Exec, tolerance: f64) {
        self.check_as(exec, true, tolerance);
        self.check_as(exec, false, tolerance);
    }

    fn check_as(&self, exec: &Exec, invariant: bool, tolerance: f64) {
        let out = self.run_as(exec, invariant);
        let stride = self.inputs + GAP;
        for row in 0..self.rows {
            for n in 0..self.outputs {
                let bias = self.bias.as_ref().map_or(0.0, |bias| f64::from(bias[n].to_f32()));
                let (mut expected, mut size) = (bias, bias.abs());
                for k in 0..self.inputs {
                    let product =
                        f64::from(self.x[row * stride + k].to_f32()) * f64::from(self.weight[n * stride + k].to_f32());
                    expected += product;
                    size += product.abs();
                }
                let got = f64::from(out[row * (self.outputs + GAP) + n].to_f32());
                let near = (got - expected).abs() <= tolerance * (size + 1e-30);
                let (rows, inputs, outputs) = (self.rows, self.inputs, self.outputs);
                assert!(near, "{:?} {rows}x{inputs}x{outputs} [{row}, {n}]: {got} != {expected}", exec.isa);
            }
            let gap = &out[row * (self.outputs + GAP) + self.outputs..][..GAP];
            assert!(gap.iter().all(|x| x.to_f32().is_nan()), "wrote between rows");
        }
    }
}

fn check_shapes<A: Element, W: Element>(tolerance: f64) {
    for exec in every_isa() {
        for (i, rows) in [1, 2, 3, 4, 5, 6, 7, 11, 13, 32, 35].into_iter().enumerate() {
            for (j, inputs) in [1, 16, 31, 64, 100].into_iter().enumerate() {
                let outputs = [1, 2, 5, 16, 33][(i + j) % 5];
                Problem::<A, W>::new(rows, inputs, outputs, (i + j) % 2 == 0).check(&exec, tolerance);
            }
        }
        Problem::<A, W>::new(14, 3000, 4, false).check(&exec, tolerance); // one pair of rows exceeds a block
        for (rows, inputs, outputs) in [(12, 512, 6), (14, 513, 7), (13, 1030, 9)] {
            Problem::<A, W>::new(rows, inputs, outputs, true).check(&exec, tolerance); // parts of K, ragged quads
        }
        for (rows, inputs, outputs) in [(33, 31, 9), (48, 64, 16), (50, 100, 33), (65, 32, 1), (291, 33, 3)] {
            Problem::<A, W>::new(rows, inputs, outputs, inputs % 2 == 0).check(&exec, tolerance); // panels of any width
        }
    }
}

#[test]
fn products_of_f32_equal_the_oracle() {
    check_shapes::<f32, f32>(3e-7);
}

#[test]
fn products_of_16_bit_weights_with_f32_rows_equal_the_oracle() {
    check_shapes::<f32, bf16>(3e-7);
    check_shapes::<f32, f16>(3e-7);
}

#[test]
fn products_of_16_bit_weights_with_rows_of_the_same_equal_the_oracle() {
    check_shapes::<bf16, bf16>(5e-3);
    check_shapes::<f16, f16>(6e-4);
}

fn check_law<A: Element, W: Element>() {
    for isa in Isa::available() {
        let alone = Exec { isa, threads: Threads::new(1) };
        let together = Exec { isa, threads: Threads::new(3) };
        let all = Problem::<A, W>::new(100, 1100, 150, true);
        let out = all.run(&together);
        let stride = all.inputs + GAP;
        assert_eq!(bits(&all.run(&alone)), bits(&out), "{isa:?}: threads change bits");
        for first in [0, 1, 2, 5, 17, 39, 60] {
            for count in [1, 2, 4, 10, 23, 40] {
                let x = all.x[first * stride..(first + count) * stride].to_vec();
                let some = Problem { rows: count, x, weight: all.weight.clone(), bias: all.bias.clone(), ..all };
                let expected = &out[first * (all.outputs + GAP)..][..count * (all.outputs + GAP)];
                assert_eq!(bits(&some.run(&alone)), bits(expected), "{isa:?}: rows {first}..+{count}");
            }
        }
    }
}

#[test]
fn a_row_keeps_its_bits_alone_among_others_and_on_any_number_of_threads() {
    check_law::<f32, f32>();
    check_law::<f32, bf16>();
    check_law::<f32, f16>();
    check_law::<bf16, bf16>();
}

/// Without `invariant` the law holds among products of as many rows as have a form of their own.
#[test]
fn a_row_of_many_as_f32_keeps_its_bits_among_others() {
    for isa in Isa::available() {
        let [alone, together] = [1, 3].map(|threads| Exec { isa, threads: Threads::new(threads) });
        let all = Problem::<f32, bf16>::new(100, 1100, 150, true);
        let (out, stride) = (all.run_as(&together, false), all.inputs + GAP);
        for (first, count) in [(0, 100), (0, 20), (1, 20), (7, 23), (40, 60), (61, 37)] {
            let x = all.x[first * stride..(first + count) * stride].to_vec();
            let some = Problem { rows: count, x, weight: all.weight.clone(), bias: all.bias.clone(), ..all };
            let expected = &out[first * (all.outputs + GAP)..][..count * (all.outputs + GAP)];
            assert_eq!(bits(&some.run_as(&alone, false)), bits(expected), "{isa:?}: rows {first}..+{count}");
        }
    }
}

#[test]
fn a_row_of_nan_stays_in_its_row() {
    for exec in every_isa() {
        let mut problem = Problem::<f32, f32>::new(9, 40, 20, false);
        let clean = problem.run(&exec);
        problem.x[4 * (40 + GAP)..][..40].fill(f32::NAN);
        let dirty = problem.run(&exec);
        for (row, (clean, dirty)) in clean.chunks(20 + GAP).zip(dirty.chunks(20 + GAP)).enumerate() {
            assert!(if row == 4 { dirty.iter().all(|x| x.is_nan()) } else { bits(clean) == bits(dirty) });
        }
    }
}

#[test]
fn no_rows_no_outputs_and_no_inputs_are_no_fault() {
    for exec in every_isa() {
        assert!(Problem::<f32, bf16>::new(0, 8, 4, false).run(&exec).is_empty());
        Problem::<f32, bf16>::new(2, 8, 0, false).check(&exec, 0.0);
        Problem::<bf16, bf16>::new(2, 8, 0, true).check(&exec, 0.0);
        Problem::<f32, bf16>::new(2, 0, 4, true).check(&exec, 0.0);
        Problem::<bf16, bf16>::new(1, 0, 4, true).check(&exec, 0.0);
        Problem::<bf16, bf16>::new(2, 0, 4, true).check(&exec, 0.0);
        Problem::<bf16, bf16>::new(40, 8, 20, false).check(&exec, 5e-3); // leaves something in the buffers
        Problem::<bf16, bf16>::new(40, 0, 4, true).check(&exec, 0.0);
        Problem::<bf16, bf16>::new(40, 8, 0, true).check(&exec, 0.0);
    }
}

#[test]
fn shapes_that_disagree_are_refused_before_anything_is_written() {
    let exec = Exec { isa: Isa::detect(), threads: Threads::new(1) };
    let problem = Problem::<f32, f32>::new(3, 8, 4, true);
    let good = problem.args();
    let narrow = Rows::new("weight", &problem.weight, [4, 1, 7], 11).expect("fits");
    for (args, shape, name) in [
        (Linear { weight: narrow, ..good }, [3, 4, 1], "columns of weight"),
        (Linear { bias: Some(&[0.0; 3]), ..good }, [3, 4, 1], "length of bias"),
        (good, [2, 4, 1], "rows of out"),
        (good, [3, 5, 1], "columns of out"),
    ] {
        let mut out = vec![f32::NAN; 15];
        let mut view = RowsMut::new("out", &mut out, shape, 5).expect("fits");
        let error = linear(&exec, &args, &mut view).expect_err("accepted");
        assert!(matches!(error, Error::Shape { name: found, .. } if found == name), "{error}");
        assert!(out.iter().all(|x| x.is_nan()));
    }
}

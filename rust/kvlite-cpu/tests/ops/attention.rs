//! Correctness, masks, poison and bit-for-bit independence of batch, chunking, blocks and threads.

use crate::oracle::{Problem, Shape, bits, every_isa};
use kvlite_cpu::{Element, Error, Exec, Threads, bf16, f16};

fn shape(heads: usize, kv_heads: usize, dim: usize, block_size: usize, sequences: &[(usize, usize)]) -> Shape {
    Shape { heads, kv_heads, dim, block_size, window: 0, sequences: sequences.to_vec() }
}

fn odd_shapes() -> Vec<Shape> {
    let mut shapes = vec![
        shape(1, 1, 16, 1, &[(1, 1)]),
        shape(4, 2, 64, 16, &[(40, 40), (1, 1), (300, 1), (257, 3)]),
        shape(7, 1, 20, 3, &[(9, 9), (31, 2), (256, 1)]),
        shape(3, 1, 8, 1, &[(5, 5), (17, 1)]),
        shape(6, 2, 96, 16, &[(530, 35), (2, 1)]),
        shape(14, 2, 64, 16, &[(70, 1), (513, 4)]),
        shape(5, 5, 17, 3, &[(100, 50), (33, 33)]),
    ];
    for window in [1, 7, 64, 256, 1000] {
        shapes.push(Shape { window, ..shape(4, 2, 32, 16, &[(600, 40), (300, 1), (3, 3)]) });
    }
    for group in 1..=9 {
        shapes.push(shape(2 * group, 2, 31 * group % 80 + 3, 16, &[(70, 1), (261, 6)]));
    }
    shapes
}

#[test]
fn odd_shapes_agree_with_the_naive_oracle() {
    for (seed, shape) in odd_shapes().iter().enumerate() {
        for exec in every_isa() {
            Problem::<f32>::new(shape, seed as u64).check(&exec, 2e-6);
            Problem::<bf16>::new(shape, seed as u64).check(&exec, 4e-3);
            Problem::<f16>::new(shape, seed as u64).check(&exec, 5e-4);
        }
    }
}

#[test]
fn a_row_sees_keys_up_to_its_last_key_and_no_others() {
    for exec in every_isa() {
        let mut problem = Problem::<f32>::new(&shape(4, 2, 64, 16, &[(300, 40), (20, 4)]), 1);
        for (i, last) in problem.last_key.iter_mut().enumerate() {
            *last = [299, 0, 255, 256, 7, 130][i % 6]; // out of order, beyond the second context too
        }
        problem.check(&exec, 2e-6);
    }
}

/// K and V of `keys` become NaN; it must reach the rows that see one of them and no others.
fn check_poison<E: Element>(window: usize, dim: usize, keys: std::ops::Range<usize>) {
    for exec in every_isa() {
        let mut problem = Problem::<E>::new(&Shape { window, ..shape(6, 2, dim, 16, &[(300, 60)]) }, 2);
        let before = problem.run(&exec);
        let (heads, stride, width) = (problem.shape.heads, problem.row_stride(), stride_used(&problem));
        for key in keys.clone() {
            let block = problem.table[problem.seq_row[0] as usize * problem.table_blocks + key / 16] as usize;
            for side_and_head in 0..4 {
                let start = ((block * 4 + side_and_head) * 16 + key % 16) * dim;
                problem.pool[start..start + dim].fill(E::from_f32(f32::NAN));
            }
        }
        let after = problem.run(&exec);
        for row in 0..60 {
            let end = 241 + row;
            let start = if window == 0 { 0 } else { end - window };
            let name = format!("{:?} window {window} dim {dim} keys {keys:?} row {row}", exec.isa);
            if start < keys.end && keys.start < end {
                assert!(after.0[row * stride..][..width].iter().all(|x| x.to_f32().is_nan()), "{name} sees NaN");
            } else {
                assert_eq!(bits(&before.0[row * stride..][..width]), bits(&after.0[row * stride..][..width]), "{name}");
                assert_eq!(bits(&before.1[row * heads..][..heads]), bits(&after.1[row * heads..][..heads]), "{name}");
            }
        }
    }
}

#[test]
fn keys_reach_the_rows_that_see_them_and_no_others_even_as_nan() {
    for (window, keys) in [(0, 271..300), (0, 256..257), (0, 299..300), (33, 0..230), (33, 231..232), (34, 240..241)] {
        check_poison::<f32>(window, 64, keys.clone());
        check_poison::<bf16>(window, 64, keys.clone());
        check_poison::<bf16>(window, 50, keys.clone());
        check_poison::<f16>(window, 21, keys);
    }
}

#[test]
fn a_row_without_visible_keys_gets_zero_and_minus_infinity() {
    for exec in every_isa() {
        let mut problem = Problem::<f32>::new(&shape(4, 2, 64, 16, &[(20, 3), (5, 1)]), 3);
        problem.last_key[1] = -1;
        problem.context_len[1] = 0;
        let (out, lse) = problem.run(&exec);
        for row in [1, 3] {
            assert!(out[row * problem.row_stride()..][..256].iter().all(|&x| x == 0.0));
            assert!(lse[row * 4..][..4].iter().all(|&x| x == f32::NEG_INFINITY));
        }
        problem.check(&exec, 2e-6);
    }
}

#[test]
fn rows_of_no_sequence_stay_untouched() {
    let exec = Exec::detect(1);
    let mut problem = Problem::<f32>::new(&shape(4, 2, 64, 16, &[(20, 6)]), 4);
    problem.query_start = vec![2, 4];
    let (out, lse) = problem.run(&exec);
    for row in 0..6 {
        let touched = (2..4).contains(&row);
        let values = &out[row * problem.row_stride()..][..256];
        assert!(values.iter().chain(&lse[row * 4..][..4]).all(|x| x.is_nan() != touched), "row {row}");
    }
}

#[test]
fn a_nan_query_spoils_its_own_row_alone() {
    for exec in every_isa() {
        let mut problem = Problem::<f32>::new(&shape(4, 2, 64, 16, &[(300, 6), (40, 1)]), 5);
        let (clean, _) = problem.run(&exec);
        let stride = problem.row_stride();
        problem.q[2 * stride] = f32::NAN;
        let (spoiled, lse) = problem.run(&exec);
        for row in 0..7 {
            let same = bits(&clean[row * stride..][..256]) == bits(&spoiled[row * stride..][..256]);
            assert_eq!(same, row != 2, "row {row}");
        }
        assert!(spoiled[2 * stride].is_nan() && lse[2 * 4].is_nan());
    }
}

/// One sequence's context in a pool of its own, computed `chunk` rows per call.
fn alone<E: Element>(problem: &Problem<E>, sequence: usize, chunk: usize, exec: &Exec) -> (Vec<u32>, Vec<u32>) {
    let (first, last) = (problem.query_start[sequence] as usize, problem.query_start[sequence + 1] as usize);
    let (width, stride, heads) = (stride_used(problem), problem.row_stride(), problem.shape.heads);
    let (mut out, mut lse) = (vec![], vec![]);
    for start in (first..last).step_by(chunk) {
        let end = last.min(start + chunk);
        let query_start = [start as i32, end as i32];
        // A chunk's context ends with its own last row.
        let context_len = [problem.last_key[end - 1] + 1];
        let mut args = problem.args();
        args.query_start = &query_start;
        args.context_len = &context_len;
        args.seq_row = &problem.seq_row[sequence..sequence + 1];
        let (o, l) = problem.try_run(exec, &args).expect("valid arguments");
        for row in start..end {
            out.extend(bits(&o[row * stride..][..width]));
            lse.extend(bits(&l[row * heads..][..heads]));
        }
    }
    (out, lse)
}

fn stride_used<E: Element>(problem: &Problem<E>) -> usize {
    problem.shape.heads * problem.shape.dim
}

fn check_independence<E: Element>(shape: &Shape, seed: u64) {
    for exec in every_isa() {
        let problem = Problem::<E>::new(shape, seed);
        let (out, lse) = problem.run(&exec);
        for count in [2, 3] {
            let threads = Threads::new(count);
            let (threaded, threaded_lse) = problem.run(&Exec { isa: exec.isa, threads });
            let finite =
                |values: &[E]| bits(&values.iter().map(|x| x.to_f32()).filter(|x| !x.is_nan()).collect::<Vec<_>>());
            assert_eq!(finite(&out), finite(&threaded), "{count} threads");
            assert_eq!(bits(&lse), bits(&threaded_lse));
        }
        for sequence in 0..shape.sequences.len() {
            let rows = problem.query_start[sequence] as usize..problem.query_start[sequence + 1] as usize;
            let stride = problem.row_stride();
            let batched: Vec<u32> =
                rows.clone().flat_map(|row| bits(&out[row * stride..][..stride_used(&problem)])).collect();
            let batched_lse = bits(&lse[rows.start * shape.heads..rows.end * shape.heads]);
            for chunk in [1, 3, 7, 32, 1000] {
                let (o, l) = alone(&problem, sequence, chunk, &exec);
                assert!(o == batched && l == batched_lse, "{:?} {shape:?} sequence {sequence} chunk {chunk}", exec.isa);
            }
        }
    }
}

#[test]
fn a_row_is_bit_identical_alone_batched_chunked_and_threaded() {
    // More than WAKING_WORK, or threads that sleep would not take part.
    let sequences = [(40, 40), (1, 1), (300, 1), (257, 3), (600, 70)];
    check_independence::<f32>(&shape(4, 2, 64, 16, &sequences), 6);
    check_independence::<f32>(&Shape { window: 100, ..shape(7, 1, 24, 3, &sequences) }, 7);
    check_independence::<bf16>(&shape(3, 3, 64, 16, &sequences), 8);
    check_independence::<f16>(&shape(14, 2, 32, 1, &sequences), 9);
    check_independence::<bf16>(&Shape { window: 101, ..shape(14, 2, 40, 16, &sequences) }, 10);
    check_independence::<bf16>(&shape(9, 1, 17, 3, &sequences), 11);
}

fn check_cut<E: Element>(shape: &Shape) {
    for exec in every_isa() {
        let problem = Problem::<E>::new(shape, 14);
        let (out, lse) = problem.run(&exec);
        for count in [2, 5, 8] {
            let (cut, cut_lse) = problem.run(&Exec { isa: exec.isa, threads: Threads::new(count) });
            for row in 0..problem.last_key.len() {
                let values = |out: &[E]| bits(&out[row * problem.row_stride()..][..stride_used(&problem)]);
                assert_eq!(values(&out), values(&cut), "{:?} {shape:?} {count} threads row {row}", exec.isa);
            }
            assert_eq!(bits(&lse), bits(&cut_lse));
        }
        problem.check(&Exec { isa: exec.isa, threads: Threads::new(8) }, 4e-3);
    }
}

#[test]
fn a_row_that_several_threads_share_has_the_bits_it_has_on_one() {
    let sequences = [(20, 1), (3000, 1), (0, 0), (64, 2), (1029, 1)];
    check_cut::<f32>(&shape(7, 1, 64, 16, &sequences));
    check_cut::<f32>(&shape(2, 2, 20, 16, &sequences));
    check_cut::<bf16>(&shape(14, 2, 64, 16, &sequences));
    check_cut::<bf16>(&Shape { window: 1501, ..shape(3, 1, 24, 3, &sequences) });
}

#[test]
fn rows_that_lie_anywhere_and_in_any_order_keep_the_bits_they_have_alone() {
    check_any_order::<f32>();
    check_any_order::<bf16>();
}

fn check_any_order<E: Element>() {
    for (heads, kv_heads) in [(4, 2), (7, 1)] {
        for exec in every_isa() {
            let mut problem = Problem::<E>::new(&shape(heads, kv_heads, 64, 16, &[(700, 40)]), 12);
            problem.last_key.iter_mut().enumerate().for_each(|(i, last)| *last = (i as i32 * 263 + 5) % 700);
            let (stride, (out, lse)) = (problem.row_stride(), problem.run(&exec));
            for row in 0..40 {
                let mut args = problem.args();
                let query_start = [row as i32, row as i32 + 1];
                args.query_start = &query_start;
                let (alone, alone_lse) = problem.try_run(&exec, &args).expect("valid arguments");
                let width = stride_used(&problem);
                assert_eq!(bits(&out[row * stride..][..width]), bits(&alone[row * stride..][..width]), "row {row}");
                assert_eq!(bits(&lse[row * heads..][..heads]), bits(&alone_lse[row * heads..][..heads]));
            }
        }
    }
}

#[test]
fn block_size_and_placement_never_change_a_bit() {
    for exec in every_isa() {
        let reference = Problem::<f32>::new(&shape(4, 2, 64, 16, &[(300, 9), (17, 2)]), 10);
        let expected = reference.run(&exec);
        for block_size in [1, 3, 64] {
            let mut other = Problem::<f32>::new(&shape(4, 2, 64, block_size, &[(300, 9), (17, 2)]), 11);
            other.q.clone_from(&reference.q);
            for sequence in 0..2 {
                let row = reference.seq_row[sequence] as usize;
                for key in 0..reference.context_len[sequence] as usize {
                    let block = other.table[row * other.table_blocks + key / block_size] as usize;
                    for side in 0..2 {
                        for head in 0..2 {
                            let start = (((block * 2 + side) * 2 + head) * block_size + key % block_size) * 64;
                            let vector = reference.key(side, row, key, head);
                            other.pool[start..start + 64].iter_mut().zip(vector).for_each(|(t, s)| *t = s as f32);
                        }
                    }
                }
            }
            let got = other.run(&exec);
            let finite = |values: &[f32]| bits(&values.iter().copied().filter(|x| !x.is_nan()).collect::<Vec<_>>());
            assert_eq!(finite(&expected.0), finite(&got.0), "block size {block_size}");
            assert_eq!(bits(&expected.1), bits(&got.1));
        }
    }
}

fn refused(change: impl Fn(&mut Problem<f32>)) -> Error {
    let mut problem = Problem::<f32>::new(&shape(4, 2, 64, 16, &[(40, 2), (20, 1)]), 12);
    change(&mut problem);
    problem.try_run(&Exec::detect(1), &problem.args()).expect_err("accepted")
}

#[test]
fn bad_arguments_are_named_instead_of_read_out_of_bounds() {
    let blocks = Problem::<f32>::new(&shape(4, 2, 64, 16, &[(40, 2), (20, 1)]), 12).num_blocks;
    for block in [-1, blocks as i32, i32::MAX, i32::MIN] {
        let error = refused(|p| p.table[p.seq_row[0] as usize * p.table_blocks + 2] = block);
        assert_eq!(error, Error::Block { row: 2, index: 2, block, num_blocks: blocks });
    }
    assert!(matches!(
        refused(|p| p.context_len[1] = 16 * 4 + 1),
        Error::ContextLen { sequence: 1, value: 65, limit: 64 }
    ));
    assert!(matches!(refused(|p| p.context_len[0] = -1), Error::ContextLen { sequence: 0, value: -1, .. }));
    assert!(matches!(refused(|p| p.seq_row[1] = 3), Error::SeqRow { sequence: 1, value: 3, rows: 3 }));
    assert!(matches!(refused(|p| p.seq_row[1] = -1), Error::SeqRow { .. }));
    assert!(matches!(refused(|p| p.query_start[2] = 4), Error::QueryStart { index: 2, value: 4, low: 2, high: 3 }));
    assert!(matches!(refused(|p| p.query_start[1] = -2), Error::QueryStart { index: 1, .. }));
    assert!(matches!(refused(|p| p.query_start[0] = 3), Error::QueryStart { index: 1, value: 2, low: 3, .. }));
    assert!(matches!(refused(|p| p.query_start.truncate(2)), Error::Shape { name: "length of query_start", .. }));
    assert!(matches!(refused(|p| p.context_len.truncate(1)), Error::Shape { name: "length of context_len", .. }));
}

#[test]
fn a_block_that_no_row_sees_may_be_nonsense() {
    let mut problem = Problem::<f32>::new(&Shape { window: 10, ..shape(4, 2, 64, 16, &[(60, 2)]) }, 13);
    let row = problem.seq_row[0] as usize * problem.table_blocks;
    problem.table[row] = -5; // the window has left it
    problem.run(&Exec::detect(1));
}

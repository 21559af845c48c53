//! `key_mass` against the naive sum, and against `attention`: the masses of a row add up to its heads.

use crate::oracle::{Problem, Shape, bits, every_isa};
use kvlite_cpu::{BlockTable, Error, Exec, Isa, KeyMass, Rows, Threads, key_mass};

fn problem(window: usize) -> Problem<f32> {
    let shape = Shape { heads: 6, kv_heads: 2, dim: 24, block_size: 3, window, sequences: vec![(600, 50)] };
    Problem::new(&shape, 21)
}

fn run(
    problem: &Problem<f32>,
    lse: &[f32],
    rows: &[i32],
    keys: std::ops::Range<usize>,
    exec: &Exec,
) -> Result<Vec<f32>, Error> {
    let mut out = vec![f32::NAN; keys.len()];
    let row = problem.seq_row[0] as usize * problem.table_blocks;
    let args = KeyMass {
        q: problem.args().q,
        lse: Rows::new("lse", lse, [problem.last_key.len(), 6, 1], 6)?,
        k_cache: problem.args().k_cache,
        block_table: BlockTable::new(&problem.table[row..][..problem.table_blocks], [1, problem.table_blocks], 0)?,
        rows,
        last_key: &problem.last_key,
        scale: problem.scale(),
        keys,
    };
    key_mass(exec, &args, &mut out)?;
    Ok(out)
}

#[test]
fn masses_agree_with_the_naive_sum() {
    let problem = problem(0);
    for exec in every_isa() {
        let (_, lse) = problem.run(&exec);
        let rows = [49, 3, 17, 3];
        let out = run(&problem, &lse, &rows, 100..590, &exec).expect("valid");
        for (i, &got) in out.iter().enumerate() {
            let mut expected = 0.0;
            for &row in &rows {
                for head in 0..6 {
                    if 100 + i <= problem.last_key[row as usize] as usize {
                        let k = problem.key(0, problem.seq_row[0] as usize, 100 + i, head / 3);
                        let dot: f64 = problem.query(row as usize, head).iter().zip(k).map(|(a, b)| a * b).sum();
                        expected += (dot * f64::from(problem.scale()) - problem.naive(0, row as usize, head).1).exp();
                    }
                }
            }
            assert!((f64::from(got) - expected).abs() < 1e-6, "key {}: {got} != {expected}", 100 + i);
        }
    }
}

#[test]
fn the_masses_of_a_row_add_up_to_its_heads() {
    let problem = problem(0);
    let exec = Exec::detect(1);
    let (_, lse) = problem.run(&exec);
    let total: f32 = run(&problem, &lse, &[11], 0..600, &exec).expect("valid").iter().sum();
    assert!((total - 6.0).abs() < 1e-4, "{total}");
}

#[test]
fn threads_and_the_asked_range_never_change_a_bit() {
    let problem = problem(0);
    let rows: Vec<i32> = (0..50).collect();
    for isa in Isa::available() {
        let one = Exec { isa, threads: Threads::new(1) };
        let (_, lse) = problem.run(&one);
        let expected = run(&problem, &lse, &rows, 0..600, &one).expect("valid");
        let three = Exec { isa, threads: Threads::new(3) };
        assert_eq!(bits(&expected), bits(&run(&problem, &lse, &rows, 0..600, &three).expect("valid")));
        assert_eq!(bits(&expected[37..411]), bits(&run(&problem, &lse, &rows, 37..411, &three).expect("valid")));
    }
}

#[test]
fn a_row_that_saw_nothing_adds_nothing() {
    let problem = problem(0);
    let exec = Exec::detect(1);
    let lse = vec![f32::NEG_INFINITY; 50 * 6];
    assert!(run(&problem, &lse, &[0, 1], 0..10, &exec).expect("valid").iter().all(|&x| x == 0.0));
}

#[test]
fn bad_rows_ranges_and_blocks_are_refused() {
    let mut problem = problem(0);
    let exec = Exec::detect(1);
    let lse = vec![0.0; 50 * 6];
    assert!(matches!(run(&problem, &lse, &[50], 0..10, &exec), Err(Error::QueryRow { value: 50, .. })));
    assert!(matches!(run(&problem, &lse, &[-1], 0..10, &exec), Err(Error::QueryRow { value: -1, .. })));
    assert!(matches!(run(&problem, &lse, &[0], 0..604, &exec), Err(Error::KeyRange { limit: 603, .. })));
    let row = problem.seq_row[0] as usize * problem.table_blocks;
    problem.table[row + 1] = problem.num_blocks as i32;
    assert!(matches!(run(&problem, &lse, &[0], 0..4, &exec), Err(Error::Block { index: 1, .. })));
}

//! Prefix groups change no bit of `attention`, whoever is in them; groups that lie are refused.

use kvlite_cpu::{Element, Error, Exec, Isa, PrefixGroups, Threads, bf16, f16};

use crate::oracle::{Problem, Shape, bits, every_isa};

/// Context and query rows of sequences whose first keys are those of sequence 0.
const SEQUENCES: [(usize, usize); 7] = [(600, 1), (700, 3), (300, 1), (513, 1), (40, 40), (512, 1), (1100, 33)];

fn shared<E: Element>(heads: usize, kv_heads: usize, dim: usize, block_size: usize) -> Problem<E> {
    let shape = Shape { heads, kv_heads, dim, block_size, window: 0, sequences: SEQUENCES.to_vec() };
    let mut problem = Problem::<E>::new(&shape, 3);
    let (width, leader) = (problem.table_blocks, problem.seq_row[0] as usize);
    for (sequence, &(context, _)) in SEQUENCES.iter().enumerate().skip(1) {
        let row = problem.seq_row[sequence] as usize;
        let whole = SEQUENCES[0].0.min(context) / block_size;
        problem.table.copy_within(leader * width..leader * width + whole, row * width);
    }
    problem
}

fn run<E: Element>(
    problem: &Problem<E>,
    exec: &Exec,
    groups: Option<PrefixGroups<'_>>,
) -> Result<[Vec<u32>; 2], Error> {
    let mut args = problem.args();
    args.groups = groups;
    let (out, lse) = problem.try_run(exec, &args)?;
    Ok([bits(&out), bits(&lse)])
}

fn check<E: Element>(heads: usize, kv_heads: usize, dim: usize, block_size: usize) {
    let problem = shared::<E>(heads, kv_heads, dim, block_size);
    let groupings: [(&[[i32; 3]], &[i32]); 6] = [
        (&[[0, 4, 256]], &[0, 1, 2, 3]),
        (&[[0, 4, 512]], &[3, 0, 1, 5]),
        (&[[0, 2, 512], [0, 0, 0], [2, 2, 256]], &[1, 5, 2, 6]),
        (&[[1, 3, 500]], &[9, 5, 1, 3]), // the rest of a split is each one's own
        (&[[0, 2, 40]], &[0, 2]),        // less than a split
        (&[[0, 6, 256]], &[0, 1, 2, 3, 5, 6]),
    ];
    for exec in every_isa() {
        let alone = run(&problem, &exec, None).expect("valid");
        for (groups, seqs) in groupings {
            for threads in [1, 2, 8] {
                let exec = Exec { isa: exec.isa, threads: Threads::new(threads) };
                let together = run(&problem, &exec, Some(PrefixGroups { groups, seqs })).expect("valid");
                assert!(alone == together, "{:?}, {groups:?} {seqs:?}, {threads} threads", exec.isa);
            }
        }
    }
}

#[test]
fn a_row_has_the_bits_in_a_group_that_it_has_alone() {
    check::<bf16>(14, 2, 64, 16);
    check::<f32>(4, 4, 32, 8);
    check::<f16>(3, 1, 20, 1);
    check::<f32>(8, 2, 64, 256);
}

#[test]
fn shared_keys_are_read_once() {
    // By the first one's table: the others' entries could be anything that is refused, so they are looked at, not followed.
    let mut problem = shared::<f32>(4, 2, 64, 16);
    let exec = Exec { isa: Isa::detect(), threads: Threads::new(1) };
    let groups = Some(PrefixGroups { groups: &[[0, 2, 512]], seqs: &[0, 1] });
    let row = problem.seq_row[1] as usize * problem.table_blocks;
    problem.table[row + 31] = problem.table[row + 40];
    assert_eq!(run(&problem, &exec, groups), Err(Error::GroupKeys { index: 0, seq: 1, keys: 512 }));
    let fewer = Some(PrefixGroups { groups: &[[0, 2, 496]], seqs: &[0, 1] });
    run(&problem, &exec, fewer).expect("the 31 blocks before are shared");
}

#[test]
fn groups_that_say_what_is_not_so_are_refused() {
    let problem = shared::<f32>(4, 2, 64, 16);
    let exec = Exec { isa: Isa::detect(), threads: Threads::new(1) };
    let refused = |groups: &[[i32; 3]], seqs: &[i32]| {
        run(&problem, &exec, Some(PrefixGroups { groups, seqs })).expect_err("accepted")
    };
    for group in [[0, 3, 256], [-1, 2, 256], [1, i32::MAX, 256], [0, -1, 256], [0, 2, -1]] {
        let [first, count, keys] = group;
        assert_eq!(refused(&[group], &[0, 1]), Error::PrefixGroup { index: 0, first, count, keys });
    }
    for seq in [-1, 7] {
        assert_eq!(refused(&[[0, 2, 256]], &[0, seq]), Error::GroupSeq { index: 0, seq, sequences: 7 });
        assert_eq!(refused(&[[0, 2, 256]], &[seq, 0]), Error::GroupSeq { index: 0, seq, sequences: 7 });
    }
    let twice = refused(&[[0, 2, 256], [1, 2, 256]], &[0, 1, 2]);
    assert_eq!(twice, Error::GroupSeq { index: 1, seq: 1, sequences: 7 });
    // Sequence 2 has 300 keys, and a table row ends before a million.
    assert_eq!(refused(&[[0, 2, 512]], &[0, 2]), Error::GroupKeys { index: 0, seq: 2, keys: 512 });
    assert_eq!(refused(&[[0, 2, 1 << 20]], &[0, 1]), Error::GroupKeys { index: 0, seq: 0, keys: 1 << 20 });
}

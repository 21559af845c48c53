//! A random problem over a shuffled, poisoned pool, and the stupidest attention there is.

use kvlite_cpu::{Attention, BlockTable, Element, Error, Exec, KvCache, Rows, RowsMut, attention};

/// xorshift64*: the tests' only randomness.
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Rng {
        Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        ((self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % n as u64) as usize
    }

    /// Uniform in [-1, 1).
    pub fn unit(&mut self) -> f32 {
        self.below(1 << 24) as f32 / (1 << 23) as f32 - 1.0
    }
}

/// Shape of a problem; every sequence has `(context_len, query rows at its end)`.
#[derive(Clone, Debug)]
pub struct Shape {
    pub heads: usize,
    pub kv_heads: usize,
    pub dim: usize,
    pub block_size: usize,
    pub window: usize,
    pub sequences: Vec<(usize, usize)>,
}

/// One layer of a pool `[blocks, 2, block_size, KH, D]` (K and V interleave) with queries over it.
pub struct Problem<E> {
    pub shape: Shape,
    pub q: Vec<E>,
    pub pool: Vec<E>,
    pub num_blocks: usize,
    pub table: Vec<i32>,
    pub table_blocks: usize,
    pub query_start: Vec<i32>,
    pub context_len: Vec<i32>,
    pub seq_row: Vec<i32>,
    pub last_key: Vec<i32>,
}

/// Rows of q and out have this many spare elements behind them, as in a fused QKV matrix.
pub const ROW_PADDING: usize = 5;

impl<E: Element> Problem<E> {
    /// Slots that hold no key are NaN; so are two spare blocks and unused table entries point nowhere.
    pub fn new(shape: &Shape, seed: u64) -> Problem<E> {
        let mut rng = Rng::new(seed);
        let Shape { heads, kv_heads, dim, block_size, .. } = *shape;
        let table_blocks = shape.sequences.iter().map(|s| s.0.div_ceil(block_size)).max().unwrap_or(0) + 1;
        let used: usize = shape.sequences.iter().map(|s| s.0.div_ceil(block_size)).sum();
        let num_blocks = used + 2;
        let mut order: Vec<usize> = (0..num_blocks).collect();
        for i in (1..num_blocks).rev() {
            order.swap(i, rng.below(i + 1));
        }
        let block_len = 2 * block_size * kv_heads * dim;
        let mut pool = vec![E::from_f32(f32::NAN); num_blocks * block_len];
        let rows = shape.sequences.len() + 1;
        let mut table = vec![-7i32; rows * table_blocks];
        let (mut query_start, mut context_len, mut seq_row, mut last_key) = (vec![0], vec![], vec![], vec![]);
        for (s, &(context, queries)) in shape.sequences.iter().enumerate() {
            let row = rows - 1 - s; // not the sequence's own index
            for b in 0..context.div_ceil(block_size) {
                table[row * table_blocks + b] = order.pop().expect("enough blocks") as i32;
            }
            for key in 0..context {
                let block = table[row * table_blocks + key / block_size] as usize;
                for side in 0..2 {
                    for head in 0..kv_heads {
                        let start =
                            block * block_len + ((side * kv_heads + head) * block_size + key % block_size) * dim;
                        pool[start..start + dim].fill_with(|| E::from_f32(rng.unit()));
                    }
                }
            }
            query_start.push(query_start[s] + queries as i32);
            context_len.push(context as i32);
            seq_row.push(row as i32);
            last_key.extend((context - queries..context).map(|key| key as i32));
        }
        let mut q = vec![E::from_f32(f32::NAN); last_key.len() * (heads * dim + ROW_PADDING)];
        for row in q.chunks_exact_mut(heads * dim + ROW_PADDING) {
            row[..heads * dim].fill_with(|| E::from_f32(2.0 * rng.unit()));
        }
        let shape = shape.clone();
        Problem { shape, q, pool, num_blocks, table, table_blocks, query_start, context_len, seq_row, last_key }
    }

    pub fn scale(&self) -> f32 {
        1.3 / (self.shape.dim as f32).sqrt()
    }

    pub fn row_stride(&self) -> usize {
        self.shape.heads * self.shape.dim + ROW_PADDING
    }

    pub fn caches(&self) -> (KvCache<'_, E>, KvCache<'_, E>) {
        let Shape { kv_heads, dim, block_size, .. } = self.shape;
        let half = block_size * kv_heads * dim;
        let (shape, strides) = ([self.num_blocks, block_size, kv_heads, dim], [2 * half, dim, block_size * dim]);
        (
            KvCache::new("k_cache", &self.pool, shape, strides).expect("fits"),
            KvCache::new("v_cache", &self.pool[half..], shape, strides).expect("fits"),
        )
    }

    pub fn args(&self) -> Attention<'_, E> {
        let Shape { heads, dim, .. } = self.shape;
        let (k_cache, v_cache) = self.caches();
        let rows = self.table.len() / self.table_blocks;
        Attention {
            q: Rows::new("q", &self.q, [self.last_key.len(), heads, dim], self.row_stride()).expect("fits"),
            k_cache,
            v_cache,
            block_table: BlockTable::new(&self.table, [rows, self.table_blocks], self.table_blocks).expect("fits"),
            query_start: &self.query_start,
            context_len: &self.context_len,
            seq_row: &self.seq_row,
            last_key: &self.last_key,
            scale: self.scale(),
            groups: None,
            window: self.shape.window,
        }
    }

    /// (out [T, row_stride], lse [T, H]) from poisoned buffers.
    pub fn run(&self, exec: &Exec) -> (Vec<E>, Vec<f32>) {
        self.try_run(exec, &self.args()).expect("valid arguments")
    }

    pub fn try_run(&self, exec: &Exec, args: &Attention<'_, E>) -> Result<(Vec<E>, Vec<f32>), Error> {
        let Shape { heads, dim, .. } = self.shape;
        let rows = self.last_key.len();
        let mut out = vec![E::from_f32(f32::NAN); rows * self.row_stride()];
        let mut lse = vec![f32::NAN; rows * heads];
        let mut out_view = RowsMut::new("out", &mut out, [rows, heads, dim], self.row_stride())?;
        let mut lse_view = RowsMut::new("lse", &mut lse, [rows, heads, 1], heads)?;
        attention(exec, args, &mut out_view, &mut lse_view)?;
        Ok((out, lse))
    }

    /// One vector of K (side 0) or V (side 1), f64.
    pub fn key(&self, side: usize, seq_row: usize, key: usize, kv_head: usize) -> Vec<f64> {
        let Shape { kv_heads, dim, block_size, .. } = self.shape;
        let block = self.table[seq_row * self.table_blocks + key / block_size] as usize;
        let start = (((block * 2 + side) * kv_heads + kv_head) * block_size + key % block_size) * dim;
        self.pool[start..start + dim].iter().map(|x| f64::from(x.to_f32())).collect()
    }

    pub fn query(&self, row: usize, head: usize) -> Vec<f64> {
        let start = row * self.row_stride() + head * self.shape.dim;
        self.q[start..start + self.shape.dim].iter().map(|x| f64::from(x.to_f32())).collect()
    }

    /// (out [D], lse) of one row and head in f64.
    pub fn naive(&self, sequence: usize, row: usize, head: usize) -> (Vec<f64>, f64) {
        let kv_head = head / (self.shape.heads / self.shape.kv_heads);
        let seq_row = self.seq_row[sequence] as usize;
        let q = self.query(row, head);
        let (mut total, mut out) = (0.0f64, vec![0.0f64; self.shape.dim]);
        for key in 0..self.context_len[sequence] {
            let last = self.last_key[row];
            if key > last || self.shape.window > 0 && i64::from(key) <= i64::from(last) - self.shape.window as i64 {
                continue;
            }
            let k = self.key(0, seq_row, key as usize, kv_head);
            let dot: f64 = q.iter().zip(&k).map(|(a, b)| a * b).sum();
            let weight = (dot * f64::from(self.scale())).exp();
            total += weight;
            for (o, v) in out.iter_mut().zip(self.key(1, seq_row, key as usize, kv_head)) {
                *o += weight * v;
            }
        }
        if total > 0.0 {
            out.iter_mut().for_each(|o| *o /= total);
        }
        (out, total.ln())
    }

    /// Panics where `run` and `naive` disagree by more than `tolerance` (absolute; values are below 1).
    pub fn check(&self, exec: &Exec, tolerance: f64) {
        let (out, lse) = self.run(exec);
        for sequence in 0..self.seq_row.len() {
            for row in self.query_start[sequence] as usize..self.query_start[sequence + 1] as usize {
                for head in 0..self.shape.heads {
                    let (expected, expected_lse) = self.naive(sequence, row, head);
                    let got = lse[row * self.shape.heads + head];
                    let same = f64::from(got) == expected_lse || (f64::from(got) - expected_lse).abs() < 1e-5;
                    assert!(same, "{:?} {:?} row {row}: lse {got} != {expected_lse}", exec.isa, self.shape);
                    let start = row * self.row_stride() + head * self.shape.dim;
                    for (d, e) in expected.iter().enumerate() {
                        let got = out[start + d].to_f32();
                        let near = (f64::from(got) - e).abs() <= tolerance;
                        assert!(near, "{:?} {:?} row {row} head {head} [{d}]: {got} != {e}", exec.isa, self.shape);
                    }
                }
            }
        }
        let stride = self.row_stride();
        let padding = out.chunks_exact(stride).flat_map(|row| &row[stride - ROW_PADDING..]);
        assert!(padding.into_iter().all(|x| x.to_f32().is_nan()), "wrote between rows");
    }
}

/// One thread, every instruction set of this machine.
pub fn every_isa() -> Vec<Exec> {
    kvlite_cpu::Isa::available().into_iter().map(|isa| Exec { isa, threads: kvlite_cpu::Threads::new(1) }).collect()
}

pub fn bits<E: Element>(values: &[E]) -> Vec<u32> {
    values.iter().map(|x| x.to_f32().to_bits()).collect()
}

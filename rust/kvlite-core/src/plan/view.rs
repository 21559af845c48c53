//! `PlanView`: the reader of a written plan, for tests, benches and the binding's debug view.
//!
//! Owns nothing; trusts the header that `PlanWriter::seal` wrote.

use super::{Header, Layout, Region};

/// Reads one written plan; used by tests, benches and the binding's debug view.
#[derive(Clone, Copy)]
pub struct PlanView<'a> {
    layout: &'a Layout,
    arena: &'a [i32],
}

impl<'a> PlanView<'a> {
    /// Looks at `arena`, which `step` has filled.
    pub fn new(layout: &'a Layout, arena: &'a [i32]) -> PlanView<'a> {
        PlanView { layout, arena }
    }

    /// One header field.
    pub fn header(&self, field: Header) -> i32 {
        self.arena[field as usize]
    }

    /// The first `rows` rows of a region, flat and row-major.
    pub fn flat(&self, region: Region, rows: usize) -> &'a [i32] {
        let spec = self.layout.region(region);
        &self.arena[spec.offset..][..rows * spec.cols]
    }

    /// The filled rows of a counted region, `COLS` integers each.
    pub fn rows<const COLS: usize>(&self, region: Region) -> impl Iterator<Item = [i32; COLS]> + 'a {
        let count = match region {
            Region::Sample => Header::NumSamples,
            Region::BlockUpdate => Header::NumBlockUpdates,
            Region::PrefixGroup => Header::NumPrefixGroups,
            Region::Place => Header::NumPlaces,
            Region::SourceBlocks => Header::NumSourceBlocks,
            Region::Score => Header::NumScores,
            Region::BlockCopy => Header::NumBlockCopies,
            Region::Admitted => Header::NumAdmitted,
            Region::Committed => Header::NumCommitted,
            Region::Finished => Header::NumFinished,
            _ => panic!("region {region:?} has no row count of its own"),
        };
        assert_eq!(self.layout.region(region).cols, COLS, "columns of {region:?}");
        let rows = self.header(count) as usize;
        self.flat(region, rows).chunks_exact(COLS).map(|row| row.try_into().expect("chunks have COLS integers"))
    }

    /// Rebuilds full block tables: applies this plan's changes to `tables` (`[max_num_seqs][blocks]`).
    pub fn expand(&self, tables: &mut [Vec<u32>]) {
        for [seq_row, index, block] in self.rows::<3>(Region::BlockUpdate) {
            let table = &mut tables[seq_row as usize];
            let index = index as usize;
            if table.len() <= index {
                table.resize(index + 1, u32::MAX);
            }
            table[index] = block as u32;
        }
    }
}

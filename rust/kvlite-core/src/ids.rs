//! Newtypes for everything the core names by number, so that a row is never mistaken for a block.
//!
//! Owns no behaviour beyond packing. Used by every module; knows none.

use std::fmt;

/// A token id as it crosses the boundary: `0 <= id < vocab_size`.
pub type Token = i32;

/// Who asked. Nothing crosses a tenant: every lookup takes one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct TenantId(pub u32);

/// A block at one moment of its life. The generation grows each time the block is freed, so a name that outlived its
/// block is caught at the next use instead of reading somebody else's KV.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockId {
    /// Position in the pool, `0 <= index < num_blocks`; what plans and block tables carry.
    pub index: u32,
    /// The block's generation when the name was taken.
    pub generation: u32,
}

impl fmt::Debug for BlockId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "b{}g{}", self.index, self.generation)
    }
}

/// The root under which a prompt is looked up: one per tenant for exact KV. Recipes of blended KV get roots of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Namespace(u32);

impl Namespace {
    /// The exact-KV root of `tenant`.
    pub fn exact(tenant: TenantId) -> Namespace {
        assert!(tenant.0 < 1 << 31, "tenant ids are below 2^31; `add` checks them");
        Namespace(tenant.0)
    }

    /// The number that stands for this root in a block's parent field.
    pub(crate) fn number(self) -> u32 {
        self.0
    }
}

//! Newtypes for everything the core names by number, so that a row is never mistaken for a block.
//!
//! Owns no behaviour beyond packing. Used by every module; knows none.

use std::fmt;

/// A token id as it crosses the boundary: `0 <= id < vocab_size`.
pub type Token = i32;

/// Who asked. Nothing crosses a tenant: every lookup takes one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct TenantId(pub u32);

impl TenantId {
    /// Nobody's and everybody's: what it stores every tenant may read, and only an operator writes it.
    pub const PUBLIC: TenantId = TenantId((1 << 31) - 1);
}

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

/// A waiting sequence, ordered as it is going to be served; unique, because choices of a request differ and every other
/// rank does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Waiter {
    /// Place in line: what the policy said, then the arrival.
    pub rank: (i64, u64),
    /// Tells choices of one request apart.
    pub choice: u32,
    /// Where the core keeps it.
    pub slot: u32,
}

/// What the KV of a block in the tree is, and so who may read it: the exact KV of one tenant, or what one recipe made.
///
/// A number below 2^31 is a tenant's exact KV, one from there on a recipe's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Label(u32);

/// Numbers from here on are recipes.
const RECIPE_BIT: u32 = 1 << 31;

impl Label {
    /// Exact KV that every tenant may read and only an operator publishes.
    pub const PUBLIC: Label = Label(TenantId::PUBLIC.0);

    /// The exact KV of `tenant`.
    pub fn exact(tenant: TenantId) -> Label {
        assert!(tenant.0 < RECIPE_BIT, "tenant ids are below 2^31; `add` checks them");
        Label(tenant.0)
    }

    /// What the recipe `number`, below 2^31, made.
    pub fn recipe(number: u32) -> Label {
        assert!(number < RECIPE_BIT, "recipes are numbered below 2^31");
        Label(number | RECIPE_BIT)
    }

    /// Whether KV of this label was made by plain forward passes over everything before it.
    pub fn is_exact(self) -> bool {
        self.0 < RECIPE_BIT
    }

    /// The number, for a hash.
    pub(crate) fn number(self) -> u32 {
        self.0
    }
}

/// Which labels a prompt may read, by block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lookup {
    /// Read, beside [`Label::PUBLIC`], wherever no recipe is asked for.
    pub own: Label,
    /// A recipe's label and the first block of the prompt that has to carry it.
    pub recipe: Option<(Label, usize)>,
}

impl Lookup {
    /// Exact KV alone.
    pub fn exact(own: Label) -> Lookup {
        Lookup { own, recipe: None }
    }

    /// Whether KV of this label may be read as block `at` of the prompt.
    pub fn may_read(self, label: Label, at: usize) -> bool {
        match self.recipe {
            Some((recipe, from_block)) if at >= from_block => label == recipe,
            _ => label == self.own || label == Label::PUBLIC,
        }
    }
}

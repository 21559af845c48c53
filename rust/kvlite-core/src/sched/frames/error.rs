//! `FrameError`: what can be wrong with bytes that should be a frame, or with a frame's sender; one sentence per variant.
//!
//! The binding raises it as `FrameError`; whoever reads the link closes it then.

use thiserror::Error;

use super::{HEADER_LEN, MAGIC, MAX_FRAME_LEN, VERSION};

/// Why bytes are no frame.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum FrameError {
    /// Too short for a header, or longer than any frame.
    #[error("a frame of {len} bytes, allowed are {HEADER_LEN} to {MAX_FRAME_LEN}")]
    Length {
        /// What was given.
        len: usize,
    },
    /// Not a migration frame.
    #[error("a frame begins with {magic:02x?}, expected {MAGIC:02x?}")]
    Magic {
        /// What was given.
        magic: [u8; 4],
    },
    /// Another version of the format.
    #[error("a frame of version {version}, this engine speaks {VERSION}")]
    Version {
        /// What was given.
        version: u16,
    },
    /// A kind that does not exist, or not here.
    #[error("a frame of kind {kind} is not expected here")]
    Kind {
        /// What was given.
        kind: u8,
    },
    /// The header's length is not the frame's.
    #[error("a frame says that {said} bytes follow its header, {len} do")]
    BodyLength {
        /// In the header.
        said: u32,
        /// Behind it.
        len: usize,
    },
    /// Flipped bits.
    #[error("a frame's digest does not match its bytes")]
    Digest,
    /// The body ends early.
    #[error("a frame ends inside {what}")]
    Cut {
        /// The field.
        what: &'static str,
    },
    /// The body goes on behind its end.
    #[error("a frame has {len} bytes too many")]
    Left {
        /// How many.
        len: usize,
    },
    /// A field out of range.
    #[error("{what} of a frame is {value}, which is not allowed")]
    Value {
        /// The field.
        what: &'static str,
        /// What was given.
        value: i64,
    },
    /// A reason that is no text.
    #[error("the reason in a frame is not UTF-8")]
    Text,
    /// A well-formed frame that its sender may not send.
    #[error("{what}")]
    Protocol {
        /// The rule that it breaks.
        what: &'static str,
    },
}

//! `CoreError`: what a caller can cause, one sentence per variant. Faults of our own are asserts, not variants.
//!
//! The binding maps it to Python exceptions in one match (`kvlite-py/src/errors.rs`).

use thiserror::Error;

/// A request or a setting that the core refuses; nothing has changed when one is returned.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum CoreError {
    /// A limit out of range.
    #[error("{field} is {value}, allowed are {low} to {high}")]
    Config {
        /// The setting's name.
        field: &'static str,
        /// What was given.
        value: u64,
        /// Smallest allowed value.
        low: u64,
        /// Largest allowed value.
        high: u64,
    },
    /// The admission watermark is no share.
    #[error("watermark_ratio is {value}, allowed is a share above 0 and at most 1")]
    Watermark {
        /// What was given.
        value: f64,
    },
}

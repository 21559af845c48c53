//! `Element`: the number formats that KV, queries and outputs are stored in. Arithmetic is f32 everywhere.

use half::{bf16, f16};

/// A stored number: f32, bf16 or f16.
pub trait Element: Copy + Default + Send + Sync + 'static {
    /// Exact.
    fn to_f32(self) -> f32;
    /// Rounded once, to nearest even.
    fn from_f32(value: f32) -> Self;
    /// The same memory as f32 where no conversion is needed.
    fn as_f32(values: &[Self]) -> Option<&[f32]>;
    /// The same memory as bf16 if it is that.
    fn as_bf16(_: &[Self]) -> Option<&[bf16]> {
        None
    }
}

impl Element for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(value: f32) -> f32 {
        value
    }
    #[inline(always)]
    fn as_f32(values: &[f32]) -> Option<&[f32]> {
        Some(values)
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> bf16 {
        bf16::from_f32(value)
    }
    #[inline(always)]
    fn as_f32(_: &[bf16]) -> Option<&[f32]> {
        None
    }
    #[inline(always)]
    fn as_bf16(values: &[bf16]) -> Option<&[bf16]> {
        Some(values)
    }
}

impl Element for f16 {
    /// In integer and one multiplication, so that it vectorises on every instruction set.
    #[inline(always)]
    fn to_f32(self) -> f32 {
        let bits = u32::from(self.to_bits());
        // Exponent moved to f32's place and rebased by 2^112; that also makes subnormals right.
        let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((127 + 112) << 23);
        let infinite = if bits & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
        f32::from_bits(magnitude.to_bits() | infinite | (bits & 0x8000) << 16)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> f16 {
        f16::from_f32(value)
    }
    #[inline(always)]
    fn as_f32(_: &[f16]) -> Option<&[f32]> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_value_converts_as_the_half_crate_does() {
        for bits in 0..=u16::MAX {
            let (ours, theirs) = (Element::to_f32(f16::from_bits(bits)), f16::from_bits(bits).to_f32());
            assert!(ours.to_bits() == theirs.to_bits() || ours.is_nan() && theirs.is_nan(), "f16 {bits:#06x}");
            let (ours, theirs) = (Element::to_f32(bf16::from_bits(bits)), bf16::from_bits(bits).to_f32());
            assert!(ours.to_bits() == theirs.to_bits() || ours.is_nan() && theirs.is_nan(), "bf16 {bits:#06x}");
        }
    }
}

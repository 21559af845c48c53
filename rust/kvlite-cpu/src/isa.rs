//! `Isa`: which instruction set the inner loops are compiled for, chosen once at start.
//!
//! One generic body per op is compiled several times (`by_isa!`); only rounding can differ, because the wide ones fuse
//! multiply and add. The only `unsafe` here is the call of a function whose instructions were found at run time.

/// An instruction set that this machine has: values are made by `detect` and `available` alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(pub(crate) Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
pub(crate) enum Kind {
    Portable,
    Avx2,
    Avx512,
    Avx512Bf16,
    /// And tiles of bf16.
    Amx,
}

impl Isa {
    /// The widest one that this machine has.
    pub fn detect() -> Isa {
        *Isa::available().last().expect("the portable one always exists")
    }

    /// Every one that this machine has, narrowest first.
    pub fn available() -> Vec<Isa> {
        let mut found = vec![Isa(Kind::Portable)];
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            found.push(Isa(Kind::Avx2));
            // VL too: without it code that takes halves of a register, as sums across lanes do, has 16 registers, not 32.
            let wide = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl");
            if wide && is_x86_feature_detected!("avx512bw") {
                found.push(Isa(Kind::Avx512));
                if is_x86_feature_detected!("avx512bf16") {
                    found.push(Isa(Kind::Avx512Bf16));
                    if has_tiles() {
                        found.push(Isa(Kind::Amx));
                    }
                }
            }
        }
        found
    }

    /// Its name, for reports.
    pub fn name(self) -> &'static str {
        match self.0 {
            Kind::Portable => "portable",
            Kind::Avx2 => "avx2",
            Kind::Avx512 => "avx512",
            Kind::Avx512Bf16 => "avx512_bf16",
            Kind::Amx => "amx",
        }
    }

    /// Whether an instruction multiplies pairs of bf16.
    pub(crate) fn has_bf16(self) -> bool {
        matches!(self.0, Kind::Avx512Bf16 | Kind::Amx)
    }
}

/// Whose caches these are: some hints mean other things to them.
#[cfg(target_arch = "x86_64")]
pub(crate) fn is_intel() -> bool {
    static IS_INTEL: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *IS_INTEL.get_or_init(|| {
        let vendor = cpuid(0);
        [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).concat() == *b"GenuineIntel"
    })
}

#[cfg(target_arch = "x86_64")]
fn cpuid(leaf: u32) -> std::arch::x86_64::CpuidResult {
    // SAFETY: every 64-bit x86 has the instruction; newer compilers call it safe.
    #[allow(unsafe_code, unused_unsafe)]
    unsafe {
        std::arch::x86_64::__cpuid_count(leaf, 0)
    }
}

/// Whether there are tiles of bf16 and the system lets this process have them; asks for that, once.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn has_tiles() -> bool {
    const TILES_AND_BF16: u32 = 1 << 24 | 1 << 22;
    const ARCH_PRCTL: usize = 158;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const TILE_DATA: usize = 18;
    static HAS_TILES: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *HAS_TILES.get_or_init(|| {
        if cpuid(0).eax < 7 || cpuid(7).edx & TILES_AND_BF16 != TILES_AND_BF16 {
            return false;
        }
        let mut result = ARCH_PRCTL;
        // SAFETY: the call changes what threads of this process may use, and no memory.
        #[allow(unsafe_code)]
        unsafe {
            std::arch::asm!("syscall", inout("rax") result, in("rdi") ARCH_REQ_XCOMP_PERM, in("rsi") TILE_DATA,
                out("rcx") _, out("r11") _, options(nostack));
        }
        result == 0
    })
}

#[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
fn has_tiles() -> bool {
    false
}

/// Defines `fn $name<E>(isa, ...)`, which runs `$body::<E, FUSED>(...)` compiled for `isa`; E is one or more element types.
macro_rules! by_isa {
    ($name:ident < $($element:ident),+ > = $body:ident ( $($arg:ident : $type:ty),* $(,)? )) => {
        #[allow(unsafe_code)]
        fn $name<$($element: Element),+>(isa: $crate::isa::Isa, $($arg: $type),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma")]
                fn avx2<$($element: Element),+>($($arg: $type),*) {
                    $body::<$($element),+, true>($($arg),*);
                }
                #[target_feature(enable = "avx512f,avx512vl,avx2,fma")]
                fn avx512<$($element: Element),+>($($arg: $type),*) {
                    $body::<$($element),+, true>($($arg),*);
                }
                match isa.0 {
                    // SAFETY: an `Isa` is made only after its instructions were detected (`Isa::available`).
                    $crate::isa::Kind::Avx512 | $crate::isa::Kind::Avx512Bf16 | $crate::isa::Kind::Amx => return unsafe { avx512::<$($element),+>($($arg),*) },
                    // SAFETY: as above.
                    $crate::isa::Kind::Avx2 => return unsafe { avx2::<$($element),+>($($arg),*) },
                    $crate::isa::Kind::Portable => {}
                }
            }
            // Elsewhere a fused multiply-add may be a library call; 64-bit Arm always has the instruction.
            let _ = isa;
            $body::<$($element),+, { cfg!(target_arch = "aarch64") }>($($arg),*);
        }
    };
}
pub(crate) use by_isa;

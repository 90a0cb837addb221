//! Weft's kernel programs. One file a hook; the maps they share are in `maps.rs`, the types in `weft-ebpf-common`.
//!
//! Only contexts of the kernel's stable interface are touched, so one object serves every kernel.
#![no_std]
#![no_main]

mod connect;
mod maps;
mod save;
mod sk_lookup;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // Nothing here panics: the verifier would refuse the loop.
    loop {}
}

/// The helpers that set return values and storage are for programs under the GPL.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

//! Makes the eBPF object part of the library: `cargo xtask build-ebpf` writes it, or WEFT_EBPF_OBJECT names it.
//! Without one an empty object is embedded, and `Kernel::open` says what to do.

use std::path::PathBuf;

fn main() -> std::io::Result<()> {
    println!("cargo::rerun-if-env-changed=WEFT_EBPF_OBJECT");
    let var = |name| std::env::var_os(name).map(PathBuf::from).unwrap_or_default();
    let object = match std::env::var_os("WEFT_EBPF_OBJECT") {
        Some(path) => PathBuf::from(path),
        None => var("CARGO_MANIFEST_DIR").join("../../target/bpf/weft.o"),
    };
    println!("cargo::rerun-if-changed={}", object.display());
    let embedded = var("OUT_DIR").join("weft.o");
    match std::fs::read(&object) {
        Ok(bytes) => std::fs::write(embedded, bytes),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => std::fs::write(embedded, []),
        Err(error) => Err(error),
    }
}
